"""MSRVTT-QA and MSVD-QA: questions about short videos, made from their captions (Xu et al., 2017).

`data.path` is a folder with `train_qa.json`, `val_qa.json` and `test_qa.json`, and for `msvd-qa`
with `youtube_mapping.txt` (MSVD's own list of clips and their numbers: `-4wsuPCjDBc_5_15 vid1`),
unless `data.media_name` does without {clip}. An example's type is its question's first word.

`data.media_name` may name {video}, a number, and for `msvd-qa` {clip}, such as -4wsuPCjDBc_5_15.
"""

from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import Record, annotation_file, files_by_split, read_list
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset
from epalm.errors import EpalmError

SETTINGS = {"media_root", "files", "media_name"}
FILES = {"train": "train_qa.json", "val": "val_qa.json", "test": "test_qa.json"}
MAPPING = "youtube_mapping.txt"
MEDIA = {"msrvtt-qa": "video{video}.mp4", "msvd-qa": "{clip}.avi"}
WORDS = ("what", "who", "how", "when", "where")
"""First words by which these datasets' scores are broken down."""
PUBLISHED = {
    "msrvtt-qa": {
        "train": Counts(158581, 6513),
        "val": Counts(12278, 497),
        "test": Counts(72821, 2990),
    },
    "msvd-qa": {
        "train": Counts(30933, 1200),
        "val": Counts(6415, 250),
        "test": Counts(13157, 520),
    },
}


def load(config: DataConfig) -> Dataset:
    """Read questions with one answer; EpalmError naming file, record and field."""
    pattern = config.media_name or MEDIA[config.kind]
    clips = _clips(config) if "{clip" in pattern else None
    collector = Collector(config, config.kind, pattern)
    for split, path in files_by_split(config, FILES).items():
        for record in read_list(path):
            question = record.text("question")
            first = question.split()[0].lower()
            collector.add(
                record,
                record.identifier("id"),
                _names(record, clips),
                question,
                [record.text("answer")],
                split,
                first if first in WORDS else "other",
            )
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Questions and videos of each split."""
    return {} if config.files else PUBLISHED[config.kind]


def _names(record: Record, clips: dict[int, str] | None) -> dict[str, str | int]:
    video = record.number("video_id")
    if clips is None:
        return {"video": video}
    if video not in clips:
        raise record.error(f"video_id {video} stands in no line of {MAPPING}")
    return {"video": video, "clip": clips[video]}


def _clips(config: DataConfig) -> dict[int, str]:
    """Names of MSVD's clips, by their numbers."""
    path = annotation_file(config, MAPPING)
    found: dict[int, str] = {}
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("vid") or not words[1][3:].isdigit():
            raise EpalmError(f"{path}, line {number}: must be a clip and number, as in `a vid1`")
        found[int(words[1][3:])] = words[0]
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise EpalmError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
