"""What `predict` is asked: one file, all files of a folder, or the lines of a file."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from epalm.errors import EpalmError


class Asked(NamedTuple):
    """Prompts about one media file.

    Attributes:
        name: of the media, as it was given.
    """

    name: str
    media: Path
    prompts: tuple[str, ...]


def asked(path: Path, prompts: Sequence[str]) -> list[Asked]:
    """All that a path stands for.

    Args:
        path: a media file; a folder, of whose files none is passed over but hidden ones; or a
            `.jsonl` file with a `media` path, relative to it, and a `prompt` in each line.
        prompts: asked about each media; of a `.jsonl` file, where a line has no prompt.

    Raises:
        EpalmError: an empty folder, no prompt, or a line that is none.
    """
    if path.suffix == ".jsonl" and path.is_file():
        lines = list(_lines(path, prompts))
        return [
            Asked(name, path.parent / name, tuple(text for _, some in group for text in some))
            for name, group in groupby(lines, key=lambda line: line[0])
        ]
    if not prompts:
        raise EpalmError("predict: give a prompt with --ask; --ask '' where the model needs none")
    if not path.is_dir():
        return [Asked(str(path), path, tuple(prompts))]
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not shown:
        raise EpalmError(f"{path}: no files in this folder")
    return [Asked(str(name), path / name, tuple(prompts)) for name in shown]


def _lines(path: Path, prompts: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Media and prompts of each line."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also undecodable bytes
            raise EpalmError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("media"), str):
            raise EpalmError(f"{where}: field 'media' must be the path of a file")
        given = record.get("prompt")
        if given is None and not prompts:
            raise EpalmError(f"{where}: field 'prompt' is missing; add it, or give --ask")
        if given is not None and not isinstance(given, str):
            raise EpalmError(f"{where}: field 'prompt' must be a text")
        yield record["media"], prompts if given is None else (given,)
