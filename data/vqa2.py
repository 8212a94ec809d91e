"""VQA v2: open questions about COCO's images, each answered by ten people.

`data.path` is a folder with the official files

    v2_OpenEnded_mscoco_train2014_questions.json   v2_mscoco_train2014_annotations.json
    v2_OpenEnded_mscoco_val2014_questions.json     v2_mscoco_val2014_annotations.json

`data.splits: standard` takes train2014 as train and val2014 as val. `karpathy` needs all four files
and, beside them, `dataset_coco.json` (Karpathy's split of the images; restval joins train) or the
`karpathy_{train,val,test}.json` that the official eP-ALM code distributes. test2015 has no public
answers and is not read.

`data.media_name` may name {folder}, such as train2014, and {image}, a number.
"""

from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import Record, annotation_file, files_by_split, read_list, read_object
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset
from epalm.errors import EpalmError

SETTINGS = {"media_root", "splits", "media_name"}
FOLDERS = {"train": "train2014", "val": "val2014"}
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
PUBLISHED = {
    "standard": {"train": Counts(443757, 82783), "val": Counts(214354, 40504)},
    "karpathy": {
        "train": Counts(605102, 113287),
        "val": Counts(26729, 5000),
        "test": Counts(26280, 5000),
    },
}


def load(config: DataConfig) -> Dataset:
    """Read questions with their ten answers; the answer type is the example's type.

    Raises:
        EpalmError: naming file, record and field.
    """
    if config.splits not in PUBLISHED:
        raise EpalmError(f"data.splits: {config.splits!r} is not one of {', '.join(PUBLISHED)}")
    field, split_of = _karpathy(config) if config.splits == "karpathy" else ("", {})
    collector = Collector(config, "vqa2", "{folder}/COCO_{folder}_{image:012}.jpg")
    for split, path in _question_files(config, all_of_them=bool(field)).items():
        folder = FOLDERS[split]
        answers = _answers(config, folder)
        for record in read_object(path).records("questions"):
            identifier = record.identifier("question_id")
            if field:
                key = record.identifier(field)
                if key not in split_of:
                    raise record.error(f"{field} {key} stands in none of the Karpathy splits")
                split = split_of[key]
            note = answers.get(identifier)
            if note is None:
                raise record.error(f"question_id {identifier} has no annotation")
            collector.add(
                record,
                identifier,
                {"folder": folder, "image": record.number("image_id")},
                record.text("question"),
                note.column("answers", "answer"),
                split,
                note.text("answer_type"),
                {"question_type": note.text("question_type")},
            )
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Questions and images of each split (visualqa.org; the Karpathy split of VL-T5)."""
    return PUBLISHED.get(config.splits, {})


def karpathy_split(record: Record) -> str:
    """Ours, of an image in `dataset_coco.json` (convention 19)."""
    given = record.text("split")
    if given not in KARPATHY_SPLITS:
        raise record.error(
            f"field 'split' is {given!r}; it must be one of {', '.join(KARPATHY_SPLITS)}"
        )
    return KARPATHY_SPLITS[given]


def _question_files(config: DataConfig, all_of_them: bool) -> dict[str, Path]:
    names = {s: f"v2_OpenEnded_mscoco_{f}_questions.json" for s, f in FOLDERS.items()}
    if all_of_them:
        return {split: annotation_file(config, name) for split, name in names.items()}
    return files_by_split(config, names)


def _answers(config: DataConfig, folder: str) -> dict[str, Record]:
    path = annotation_file(config, f"v2_mscoco_{folder}_annotations.json")
    found: dict[str, Record] = {}
    for record in read_object(path).records("annotations"):
        identifier = record.identifier("question_id")
        if identifier in found:
            raise record.error(f"question_id {identifier} stands in an earlier record too")
        found[identifier] = record
    return found


def _karpathy(config: DataConfig) -> tuple[str, dict[str, str]]:
    """The field that tells a question's split, and the split of each of its values."""
    folder = Path(config.path).expanduser()
    if (folder / "dataset_coco.json").is_file():
        images = read_object(annotation_file(config, "dataset_coco.json")).records("images")
        return "image_id", {r.identifier("cocoid"): karpathy_split(r) for r in images}
    if not any(folder.glob("karpathy_*.json")):
        raise EpalmError(
            "data.splits: karpathy needs dataset_coco.json or karpathy_{train,val,test}.json in "
            f"{folder}; docs/datasets.md has the layout"
        )
    splits: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for record in read_list(annotation_file(config, f"karpathy_{split}.json")):
            splits[record.identifier("question_id")] = split
    return "question_id", splits
