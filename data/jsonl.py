"""Anyone's data: one JSON object a line.

    {"id": "1", "media": "cat.jpg", "prompt": "What is this?", "answers": ["cat"], "split": "train"}

`captions` may stand in the place of `answers`; `type` is optional and breaks scores down.
Media paths are relative to `data.media_root`, by default the annotation file's folder.
"""

import json
import os
from pathlib import Path
from typing import Any

from epalm.config import DataConfig
from epalm.data.example import SPLITS, Dataset, Example, Media
from epalm.errors import EpalmError

_FIELDS = {"id", "media", "prompt", "answers", "captions", "split", "type"}


def load(config: DataConfig) -> Dataset:
    """Read an annotation file.

    Raises:
        EpalmError: naming file, line and field.
    """
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise EpalmError(f"data.path: {path}: no such annotation file")
    root = Path(config.media_root).expanduser() if config.media_root else path.parent
    examples: dict[str, Example] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            example = _example(_object(line, where), where)
            if example.id in examples:
                raise EpalmError(f"{where}: id {example.id!r} stands on an earlier line too")
            examples[example.id] = example
    if not examples:
        raise EpalmError(f"{path}: holds no examples")
    media = {e.media: Media(e.media, root / e.media) for e in examples.values()}
    return Dataset(config.name or path.stem, tuple(examples.values()), media, root)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # also undecodable bytes
        raise EpalmError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise EpalmError(f"{where}: must be a JSON object with the fields {sorted(_FIELDS)}")
    unknown = set(record) - _FIELDS
    if unknown:
        raise EpalmError(f"{where}: unknown field {min(unknown)!r}; known: {sorted(_FIELDS)}")
    return record


def _example(record: dict[str, Any], where: str) -> Example:
    kinds = [key for key in ("answers", "captions") if key in record]
    if len(kinds) != 1:
        raise EpalmError(f"{where}: needs exactly one of the fields 'answers' and 'captions'")
    references = record[kinds[0]]
    if not isinstance(references, list) or not references:
        raise EpalmError(f"{where}: field {kinds[0]!r} must be a list of at least one text")
    for text in references:
        if not isinstance(text, str) or not text.strip():
            raise EpalmError(f"{where}: field {kinds[0]!r} holds {text!r}; give texts, not empty")
    identifier = record.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        record = {**record, "id": str(identifier)}
    media, split = _text(record, "media", where), _text(record, "split", where)
    if split not in SPLITS:
        raise EpalmError(f"{where}: field 'split' is {split!r}; use one of {', '.join(SPLITS)}")
    if not _can_name_a_file(media):
        raise EpalmError(f"{where}: field 'media' is {media!r}, which cannot name a file")
    if Path(media).is_absolute() or ".." in Path(media).parts:
        raise EpalmError(f"{where}: field 'media' ({media}) leaves the media root")
    promptless = kinds == ["captions"] and not record.get("prompt")
    return Example(
        id=_text(record, "id", where),
        media=Path(media).as_posix(),
        prompt="" if promptless else _text(record, "prompt", where),
        references=tuple(references),
        split=split,
        type=_text(record, "type", where) if "type" in record else "",
    )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise EpalmError(f"{where}: field {key!r} is missing")
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise EpalmError(f"{where}: field {key!r} is {value!r}; it must be a text, not empty")
    return value


def _can_name_a_file(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
