"""easy-VQA: 64x64 images of one coloured shape, with questions and 13 possible answers.

Read from the files of its Python package (`wheel:easy-vqa==1.0`), or from that package's `data`
folder. It has the splits train and test; `data.val_from_train` makes a val.
"""

import json
from pathlib import Path

from epalm.address import resolve
from epalm.config import DataConfig
from epalm.data.example import Counts, Dataset, Example
from epalm.data.media import MediaRoot
from epalm.errors import EpalmError

SETTINGS: set[str] = set()


def load(config: DataConfig) -> Dataset:
    """Read both splits; media ids are like `train/images/12.png`."""
    given = resolve(config.path)
    packaged = given / "easy_vqa" / "data"
    root = packaged if packaged.is_dir() else given
    examples: list[Example] = []
    for split in ("train", "test"):
        examples += _read_split(root, split)
    media_root = MediaRoot(str(root))
    media = {e.media: media_root.find(e.media) for e in examples}
    return Dataset(config.name or "easy-vqa", tuple(examples), media, media_root)


def published(config: DataConfig) -> dict[str, Counts]:
    """Questions and images of each split, counted in the package."""
    return {"train": Counts(38575, 4000), "test": Counts(9673, 1000)}


def _read_split(root: Path, split: str) -> list[Example]:
    path = root / split / "questions.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            Example(
                id=f"{split}/{number}",
                media=f"{split}/images/{int(image)}.png",
                prompt=str(question),
                references=(str(answer),),
                split=split,
                type=_question_type(str(question)),
            )
            for number, (question, answer, image) in enumerate(rows)
        ]
    except (OSError, ValueError, TypeError) as error:
        raise EpalmError(f"{path}: not easy-VQA's question file ({error})") from None


def _question_type(question: str) -> str:
    if not question.startswith("what"):
        return "yes/no"
    return "color" if "color" in question else "shape"
