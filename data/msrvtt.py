"""MSR-VTT captions: ten thousand clips of web videos, twenty captions each.

`data.path` is a folder with `train_val_videodatainfo.json` and `test_videodatainfo.json`, or with
`MSRVTT_data.json`, which holds both. `data.splits: standard` has 6,513, 497 and 2,990 videos; `7k`
trains on the first two together, as the paper does, and has no val.

`data.media_name` may name {video}, such as video0.
"""

from collections import defaultdict
from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import annotation_file, read_object
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset
from epalm.errors import EpalmError

SETTINGS = {"media_root", "splits", "media_name"}
FILES = ("train_val_videodatainfo.json", "test_videodatainfo.json")
JOINT_FILE = "MSRVTT_data.json"
SPLITS = {
    "standard": {"train": "train", "validate": "val", "test": "test"},
    "7k": {"train": "train", "validate": "train", "test": "test"},
}
PUBLISHED = {
    "standard": {"train": Counts(6513, 6513), "val": Counts(497, 497), "test": Counts(2990, 2990)},
    "7k": {"train": Counts(7010, 7010), "test": Counts(2990, 2990)},
}


def load(config: DataConfig) -> Dataset:
    """Read videos with their captions; EpalmError naming file, record and field."""
    if config.splits not in SPLITS:
        raise EpalmError(f"data.splits: {config.splits!r} is not one of {', '.join(SPLITS)}")
    split_of = SPLITS[config.splits]
    joint = (Path(config.path).expanduser() / JOINT_FILE).is_file()
    collector = Collector(config, "msrvtt", "{video}.mp4")
    for name in (JOINT_FILE,) if joint else FILES:
        dataset = read_object(annotation_file(config, name))
        captions: dict[str, list[str]] = defaultdict(list)
        for sentence in dataset.records("sentences"):
            captions[sentence.identifier("video_id")].append(sentence.text("caption", empty=True))
        for record in dataset.records("videos"):
            video, split = record.identifier("video_id"), record.text("split")
            if split not in split_of:
                raise record.error(
                    f"field 'split' is {split!r}; it must be one of {', '.join(split_of)}"
                )
            collector.add(record, video, {"video": video}, "", captions[video], split_of[split])
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Videos of each split (Xu et al., 2016)."""
    return PUBLISHED.get(config.splits, {})
