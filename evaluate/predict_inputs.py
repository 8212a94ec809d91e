"""What `predict` is asked: one file, all files of a folder, or lines of a file or of the input."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from epalm.errors import EpalmError

STDIN = Path("-")


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
            `.jsonl` file with a `media` path, relative to it, and a `prompt` in each line; or `-`,
            such lines from the standard input, their paths relative to the working folder.
        prompts: asked about each media; of lines, where one has no prompt.

    Raises:
        EpalmError: nothing there, an empty folder, no prompt, or a line that is none.
    """
    if path == STDIN:
        return _of_lines(sys.stdin.buffer.read(), "standard input", Path(), prompts)
    if path.suffix == ".jsonl" and path.is_file():
        return _of_lines(path.read_bytes(), str(path), path.parent, prompts)
    if not prompts:
        raise EpalmError("predict: give a prompt with --ask; --ask '' where the model needs none")
    if not path.exists():
        raise EpalmError(f"predict: {path}: no such file or folder")
    if not path.is_dir():
        return [Asked(str(path), path, tuple(prompts))]
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not shown:
        raise EpalmError(f"{path}: no files in this folder")
    return [Asked(str(name), path / name, tuple(prompts)) for name in shown]


def _of_lines(content: bytes, name: str, folder: Path, prompts: Sequence[str]) -> list[Asked]:
    """Lines about one media that follow each other are one."""
    found = [
        Asked(media, folder / media, tuple(text for _, some in group for text in some))
        for media, group in groupby(_lines(content, name, prompts), key=lambda line: line[0])
    ]
    if not found:
        raise EpalmError(f"{name}: holds no lines")
    return found


def _lines(
    content: bytes, name: str, prompts: Sequence[str]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Media and prompts of each line."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
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
