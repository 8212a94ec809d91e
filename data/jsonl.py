"""Anyone's data: one JSON object a line, or a CSV table with the same columns.

    {"id": "1", "media": "cat.jpg", "prompt": "What is this?", "answers": ["cat"], "split": "train"}

    id,media,prompt,answers,split
    1,cat.jpg,What is this?,cat|a cat,train

`captions` may stand in the place of `answers`; in a CSV cell, `|` separates them. `type` is
optional and breaks scores down. Media paths are relative to `data.media_root`, by default the
annotation file's folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import Record, distinct, read_table
from epalm.data.collect import Collector
from epalm.data.example import SPLITS, Dataset
from epalm.errors import EpalmError

SETTINGS = {"media_root", "media_name"}
_FIELDS = {"id", "media", "prompt", "answers", "captions", "split", "type"}
_LISTS = ("answers", "captions")
_COLUMNS = ["id", "media", "split"]  # that every table has


def load(config: DataConfig) -> Dataset:
    """Read an annotation file.

    Raises:
        EpalmError: naming file, line and field.
    """
    path = Path(config.path).expanduser()
    if not path.is_file():
        what = "a folder, not an annotation file" if path.is_dir() else "no such annotation file"
        raise EpalmError(f"data.path: {path}: {what}")
    collector = Collector(config, path.stem)
    for record in _cells(path) if config.kind == "csv" else _lines(path):
        _add(collector, record)
    return collector.dataset()


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                fields = json.loads(line, object_pairs_hook=distinct(f"{path}, {place}"))
            except UnicodeDecodeError as error:
                raise EpalmError(
                    f"{path}, {place}: not UTF-8 ({error}); save it as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise EpalmError(
                    f"{path}, {place}: not valid JSON ({error}); write one JSON object a line"
                ) from None
            if not isinstance(fields, dict):
                raise EpalmError(
                    f"{path}, {place}: must be one JSON object with the fields {sorted(_FIELDS)}"
                )
            yield Record(fields, path, place)


def _cells(path: Path) -> Iterator[Record]:
    """An empty cell is a field that is not there."""
    for record in read_table(path, _COLUMNS):
        cells = {key: record.text(key, empty=True) for key in record.keys()}
        lists = {key: cell.split("|") for key, cell in cells.items() if key in _LISTS}
        yield record.with_fields({k: v for k, v in (cells | lists).items() if cells[k]})


def _add(collector: Collector, record: Record) -> None:
    if unknown := set(record.keys()) - _FIELDS:
        raise record.error(f"unknown field {min(unknown)!r}; known: {sorted(_FIELDS)}")
    kinds = [key for key in _LISTS if key in record]
    if len(kinds) != 1:
        raise record.error("needs exactly one of the fields 'answers' and 'captions'")
    references = record.texts(kinds[0])
    split = record.text("split")
    if split not in SPLITS:
        raise record.error(f"field 'split' is {split!r}; use one of {', '.join(SPLITS)}")
    promptless = kinds == ["captions"] and "prompt" not in record
    collector.add(
        record,
        record.identifier("id"),
        {"media": record.text("media")},
        "" if promptless else record.text("prompt", empty=kinds == ["captions"]),
        references,
        split,
        record.text("type") if "type" in record else "",
    )
