"""Clotho (2.1): sounds of 15 to 30 seconds from Freesound, five captions each.

`data.path` is a folder with `clotho_captions_development.csv`, `…_validation.csv` and
`…_evaluation.csv` (columns file_name, caption_1 to caption_5): our train, val and test.

`data.media_name` may name {folder}, such as development, and {file}.
"""

from epalm.config import DataConfig
from epalm.data.annotations import files_by_split, read_table
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset

SETTINGS = {"media_root", "files", "media_name"}
FOLDERS = {"train": "development", "val": "validation", "test": "evaluation"}
CAPTIONS = [f"caption_{number}" for number in range(1, 6)]
PUBLISHED = {"train": Counts(3839, 3839), "val": Counts(1045, 1045), "test": Counts(1045, 1045)}


def load(config: DataConfig) -> Dataset:
    """Read sounds with their five captions; EpalmError naming file, record and field."""
    collector = Collector(config, "clotho", "{folder}/{file}")
    default = {split: f"clotho_captions_{folder}.csv" for split, folder in FOLDERS.items()}
    for split, path in files_by_split(config, default).items():
        for record in read_table(path, ["file_name", *CAPTIONS]):
            names = {"folder": FOLDERS[split], "file": record.text("file_name")}
            captions = [record.text(column, empty=True) for column in CAPTIONS]
            collector.add(record, f"{split}/{names['file']}", names, "", captions, split)
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Sounds of each split (version 2.1)."""
    return {} if config.files else PUBLISHED
