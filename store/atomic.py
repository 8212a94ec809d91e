"""Files that are complete or absent, locks that end with their process, logs that may be cut."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """A file beside `path`, to be written; then flushed to disk and renamed over it.

    The caller must be the only writer of `path` (see `locked`): what a killed writer left half
    written is overwritten. Without `flush`, a power failure may take the file's content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if flush:
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | memoryview | str, flush: bool = True) -> None:
    """Write beside the place, flush to disk, then rename over it; see `replacing`."""
    with replacing(path, flush) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for it; the system ends it when the process dies."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_still(stream, path):  # else the folder was replaced while we waited
                yield
                return


def claim(path: Path) -> BinaryIO | None:
    """An existing file, open and exclusively locked until it is closed.

    None when another process holds it, or when it is gone. The system ends the lock of a process
    that dies, so that a stale claim cannot be.
    """
    try:
        stream = path.open("rb+")  # network file systems lock only what is open for writing
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(stream, path):
            return stream
    except BlockingIOError:
        pass
    stream.close()
    return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is appended to line by line; none when it is not there.

    A line that a crash cut short is left out.
    """
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _is_still(stream: IO[Any], path: Path) -> bool:
    """The open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
