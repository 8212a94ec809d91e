"""COCO captions, by Karpathy's `dataset_coco.json`: five captions an image, or a few more.

`data.path` is a folder with that file. One example is one image with all its captions, of which
training draws one at each step (convention 19 has one item per caption there: an epoch of the
official code is five of ours). Images of restval join train.

`data.media_name` may name {folder}, such as train2014, and {file}.
"""

from epalm.config import DataConfig
from epalm.data.annotations import annotation_file, read_object
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset
from epalm.data.vqa2 import karpathy_split

SETTINGS = {"media_root", "media_name"}
PUBLISHED = {"train": Counts(113287, 113287), "val": Counts(5000, 5000), "test": Counts(5000, 5000)}


def load(config: DataConfig) -> Dataset:
    """Read images with their captions; EpalmError naming file, record and field."""
    collector = Collector(config, "coco", "{folder}/{file}")
    dataset = read_object(annotation_file(config, "dataset_coco.json"))
    for record in dataset.records("images"):
        collector.add(
            record,
            record.identifier("cocoid"),
            {"folder": record.text("filepath"), "file": record.text("filename")},
            "",
            record.column("sentences", "raw"),
            karpathy_split(record),
        )
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Images of each split (Karpathy and Fei-Fei, 2015)."""
    return PUBLISHED
