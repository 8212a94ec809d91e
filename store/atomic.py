"""Files that are complete or absent, locks that end with their process, logs that may be cut."""

import errno
import fcntl
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from epalm.errors import EpalmError

PIECE = 2**21
"""Bytes after which the disk is set to work: a huge page, so that the file is mapped in such."""

Kinds = Mapping[str, type | tuple[type, ...]]
"""By name of a field, what its value may be an instance of; a bool is no number here."""

NONE: Kinds = {}
NUMBER = (int, float)

_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR
}  # fmt: skip
"""A full disk is none of them: there the folder is right."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


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
        with naming_file(self.path):
            while left:
                written = self._stream.write(left[: PIECE - self._size % PIECE])
                if self.flush:
                    _begin_writeback(self._stream.fileno(), self._size, written)
                left, self._size = left[written:], self._size + written

    def publish(self) -> None:
        """Flush to disk, then rename over what is there."""
        with naming_file(self.path):
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
def naming_file(path: Path) -> Iterator[None]:
    """Within it, an error of the system that names no file (a full disk) names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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
    """Hold an exclusive lock, waiting for it; the system ends it when the process dies.

    Raises:
        EpalmError: its folder is gone, or the file system has no locks.
    """
    while True:
        try:
            stream = path.open("a")
        except FileNotFoundError:  # to make it would be in the way of a conversion
            raise EpalmError(
                f"{path.parent}: was moved or deleted meanwhile; run the same command again"
            ) from None
        with stream:
            _flock(stream, path, fcntl.LOCK_EX)
            if _is_still(stream, path):  # else the folder was replaced while we waited
                yield
                return


def claim(path: Path) -> BinaryIO | None:
    """An existing file, open and exclusively locked until it is closed.

    None when another process holds it, or when it is gone. The system ends the lock of a process
    that dies, so that a stale claim cannot be.

    Raises:
        EpalmError: the file system has no locks.
    """
    try:
        stream = path.open("rb+")  # network file systems lock only what is open for writing
    except FileNotFoundError:
        return None
    with ExitStack() as unless_held:
        unless_held.enter_context(stream)
        try:
            _flock(stream, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if _is_still(stream, path):
            unless_held.pop_all()
            return stream
    return None


def read_json_lines(
    path: Path, required: Kinds = NONE, optional: Kinds = NONE, whole: bool = False
) -> list[dict[str, Any]]:
    """The objects of a file that has one a line; none when it is not there.

    Args:
        required: kinds of the fields that each must have.
        optional: kinds of fields that it may have.
        whole: the file was not written line by line; else a line that a crash cut short is left
            out.

    Raises:
        EpalmError: a line that is something else: somebody has changed it.
    """
    found = []
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line.decode())
            wrong = wrong_field(tree, required, optional)
        except UnicodeDecodeError as error:
            wrong = f"not UTF-8 ({error.reason})"
        except (ValueError, RecursionError) as error:
            if not whole:
                continue
            wrong = f"not valid JSON ({error})"
        if wrong:
            raise EpalmError(f"{path}, line {number}: {wrong}; mend the line or delete it")
        found.append(tree)
    return found


def wrong_field(tree: Any, required: Kinds, optional: Kinds = NONE) -> str:
    """What keeps something read from JSON from being an object with such fields; else empty."""
    if not isinstance(tree, dict):
        return "not a JSON object"
    if missing := sorted(required.keys() - tree.keys()):
        return f"has no field {missing[0]!r}"
    for name, kinds in {**required, **optional}.items():
        if name in tree and not _is_of(tree[name], kinds):
            return f"{name} cannot be {reprlib.repr(tree[name])}"
    return ""


def _is_of(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))


def _begin_writeback(descriptor: int, begin: int, length: int) -> None:
    """Let the disk begin before the fsync; dirty pages are written, not dropped, by this advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def _flock(stream: IO[Any], path: Path, how: int) -> None:
    """Lock an open file; EpalmError where its file system cannot."""
    try:
        fcntl.flock(stream, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise EpalmError(
            f"{path}: its file system has no locks ({error.strerror}); set the folder it is in "
            "(store.root, or runs) to one on another disk"
        ) from None


def _is_still(stream: IO[Any], path: Path) -> bool:
    """The open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
