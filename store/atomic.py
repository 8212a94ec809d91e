"""Files that are complete or absent, locks that end with their process, logs that may be cut."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from epalm.errors import EpalmError

PIECE = 2**21
"""Bytes after which the disk is set to work: a huge page, so that the file is mapped in such."""

_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR
}  # fmt: skip
"""A full disk is none of them: there the folder is right."""


class Draft:
    """A file written beside its place, until `publish` puts it there.

    In a `with`, what was not published is deleted. The caller must be the only writer of `path`
    (see `locked`): what a killed writer left half written is overwritten.

    Args:
        path: its place.
        flush: without it, a power failure may take the file's content.
    """

    def __init__(self, path: Path, flush: bool = True):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.flush = path, flush
        self._partial = path.with_name(f".{path.name}.partial")
        self._stream = self._partial.open("wb", buffering=0)
        self._size = 0

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def set_size(self, size: int) -> None:
        """Bytes that the file will have; what is not written reads as zeros and takes no space.

        Before anything is written: afterwards it would wait for the disk.
        """
        self._stream.truncate(size)

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Append; the disk begins with it at once, so that publishing waits the less."""
        left = memoryview(content)
        while left:
            written = self._stream.write(left[: PIECE - self._size % PIECE])
            if self.flush:
                _begin_writeback(self._stream.fileno(), self._size, written)
            left, self._size = left[written:], self._size + written

    def publish(self) -> None:
        """Flush to disk, then rename over what is there."""
        if self.flush:
            os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Delete it, unless it was published."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write beside the place, flush to disk, then rename over it; see `Draft`."""
    with Draft(path) as draft:
        draft.write(content.encode() if isinstance(content, str) else content)
        draft.publish()


@contextmanager
def writing_into(folder: Path, field: str) -> Iterator[None]:
    """Within it, that `folder` cannot be written to is an error of the field that names it.

    Raises:
        EpalmError: it, or something in it or above it, is read-only, not ours or no folder.
    """
    try:
        yield
    except OSError as error:
        path = Path(error.filename or "/").absolute()
        place = folder.absolute()
        if error.errno in _REFUSED and (path.is_relative_to(place) or path in place.parents):
            raise EpalmError(
                f"{field}: {folder} cannot be written to ({path}: {error.strerror}); make it a "
                "folder that can be, or set another"
            ) from None
        raise


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


def _begin_writeback(descriptor: int, begin: int, length: int) -> None:
    """Let the disk begin before the fsync; dirty pages are written, not dropped, by this advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def _is_still(stream: IO[Any], path: Path) -> bool:
    """The open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
