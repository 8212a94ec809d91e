"""Conceptual Captions (CC3M): captions from the web, one an image.

Either the official tables, captions and addresses of images separated by tabs, in the folder
`data.path`; images then have the number of their line, from 0, as img2dataset names them: by
default they are looked for as `train/00000/000000000.jpg` and so on. The first line may name the
columns, which img2dataset wants, and has no number then.

Or WebDataset shards: `data.files` gives the shards of each split as a glob or brace list, relative
to `data.path`, ending in .tar; captions are their .txt members, or the `caption` of their .json
members, and `data.media_root` is not used.

Many addresses are dead; `data.bad_media: skip` leaves out what could not be had.

`data.media_name` may name {split}, and the numbers {row} and {shard}, which is row // 10000.
"""

import json
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epalm.config import DataConfig
from epalm.data.annotations import Record, files_by_split, read_table
from epalm.data.archive_index import found_once
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset
from epalm.data.media import Media, MediaRoot, expand
from epalm.errors import EpalmError

SETTINGS = {"media_root", "files", "media_name"}
FILES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
PUBLISHED = {
    "Train_GCC-training.tsv": Counts(3318333, 3318333),
    "Validation_GCC-1.1.0-Validation.tsv": Counts(15840, 15840),
}
COLUMNS = ["caption", "url"]
SHARD_ROWS = 10000  # img2dataset's default
IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of the members of a sample that are taken for its image."""

Samples = dict[str, dict[str, Media]]
"""Of a shard's samples, by key, the members by their extensions."""


def load(config: DataConfig) -> Dataset:
    """Read images with one caption; EpalmError naming file, record and field."""
    if any(name.endswith(".tar") for name in config.files.values()):
        return _load_shards(config)
    collector = Collector(config, "cc3m", "{split}/{shard:05}/{row:09}.jpg")
    for split, path in files_by_split(config, FILES).items():
        for row, record in enumerate(_rows(path)):
            names: dict[str, str | int] = {"split": split, "row": row, "shard": row // SHARD_ROWS}
            collector.add(record, f"{split}/{row}", names, "", [record.text("caption")], split)
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Rows of the official tables."""
    return {s: PUBLISHED[f] for s, f in (config.files or FILES).items() if f in PUBLISHED}


def _rows(path: Path) -> Iterator[Record]:
    """A table's rows, without the line that names the columns where there is one."""
    rows = read_table(path, COLUMNS, tabs=True, header=False)
    first = next(rows, None)
    if first and [first.text(column, empty=True) for column in COLUMNS] != COLUMNS:
        yield first
    yield from rows


def _load_shards(config: DataConfig) -> Dataset:
    if config.media_root or config.media_name:
        raise EpalmError(
            "data.media_root, data.media_name: have no meaning for shards; leave them out"
        )
    folder = Path(config.path).expanduser()
    lists = {split: str(folder / name) for split, name in config.files.items()}
    root = MediaRoot(*lists.values(), under=folder)
    if root.absent or not root.members:
        where = root.absent[0] if root.absent else ", ".join(lists.values())
        raise EpalmError(f"data.files: {where}: no such shards; captions are read from them")
    split_of = {path: split for split, words in lists.items() for path, _ in expand(words)}
    shards: dict[Path, Samples] = defaultdict(lambda: defaultdict(dict))
    for identifier, media in root.members.items():
        place, name = posixpath.split(identifier)
        key, _, extension = name.partition(".")
        shards[media.path][f"{place}/{key}"][extension.lower()] = media
    collector = Collector(config, "cc3m", root=root)
    for archive, samples in shards.items():
        for (key, parts), caption in zip(samples.items(), _captions(archive, samples), strict=True):
            image = next((parts[e].id for e in IMAGES if e in parts), f"{key}.jpg")
            record = Record({}, archive, _place(key))
            collector.add(record, key, {"media": image}, "", [caption], split_of[archive])
    return collector.dataset()


def _captions(archive: Path, samples: Samples) -> list[str]:
    """The caption of each sample of a shard, in order; EpalmError when one cannot be read."""

    def whole(tree: Any) -> list[str]:
        texts = [text for text in tree if isinstance(text, str)]
        if len(texts) != len(samples):
            raise ValueError("not the captions of these samples")
        return texts

    return found_once(
        archive,
        "captions",
        lambda: [_caption(archive, key, parts) for key, parts in samples.items()],
        whole,
    )


def _caption(archive: Path, key: str, parts: dict[str, Media]) -> str:
    place = _place(key)
    try:
        if "txt" in parts:
            fields = {"caption": parts["txt"].read().decode()}
        else:
            fields = json.loads(parts["json"].read()) if "json" in parts else {}
    except (OSError, ValueError, RecursionError) as error:
        raise EpalmError(f"{archive}, {place}: its caption cannot be read ({error})") from None
    if not isinstance(fields, dict):
        raise EpalmError(f"{archive}, {place}: its .json member must hold an object")
    return Record(fields, archive, place).text("caption")


def _place(key: str) -> str:
    return f"sample {posixpath.basename(key)}"
