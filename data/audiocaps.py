"""AudioCaps: ten-second clips of AudioSet; one caption each in train, five in val and test.

`data.path` is a folder with the official `train.csv`, `val.csv` and `test.csv` (columns
audiocap_id, youtube_id, start_time, caption). The sound is on YouTube, and no longer all of it;
`data.bad_media: skip` leaves out what could not be had.

`data.media_name` may name {split}, {youtube_id} and {start_time}.
"""

from epalm.config import DataConfig
from epalm.data.annotations import Record, files_by_split, read_table
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset

SETTINGS = {"media_root", "files", "media_name"}
FILES = {"train": "train.csv", "val": "val.csv", "test": "test.csv"}
COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]
PUBLISHED = {"train": Counts(49838, 49838), "val": Counts(495, 495), "test": Counts(975, 975)}


def load(config: DataConfig) -> Dataset:
    """Read clips with all their captions; EpalmError naming file, record and field."""
    collector = Collector(config, "audiocaps", "{split}/{youtube_id}.wav")
    for split, path in files_by_split(config, FILES).items():
        clips: dict[tuple[str, str], tuple[Record, dict[str, str]]] = {}
        for record in read_table(path, COLUMNS):
            clip = record.identifier("youtube_id"), record.identifier("start_time")
            captions = clips.setdefault(clip, (record, {}))[1]
            identifier = record.identifier("audiocap_id")
            if identifier in captions:
                raise record.error(f"audiocap_id {identifier} stands in an earlier record too")
            captions[identifier] = record.text("caption", empty=True)
        for (youtube, start), (record, captions) in clips.items():
            names = {"split": split, "youtube_id": youtube, "start_time": start}
            identifier = f"{youtube}_{start}"
            collector.add(record, identifier, names, "", captions.values(), split)
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Clips of each split (Kim et al., 2019; its first version's files)."""
    return {} if config.files else PUBLISHED
