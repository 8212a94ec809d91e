"""A block's bytes: written beside its place and hashed meanwhile."""

import hashlib
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epalm.store.atomic import Draft

MOST_FILES = 65_536
FEWER_FILES = 10_240
"""What macOS allows, though it names no limit."""


class DraftBlock(NamedTuple):
    """A block written beside its place, which no reader sees.

    Attributes:
        sha256: of its rows' bytes.
        files: in the order in which they are published.
    """

    sha256: str
    files: tuple[Draft, ...]

    def publish(self) -> None:
        """Flush it to disk and put it in its place."""
        for file in self.files:
            file.publish()

    def discard(self) -> None:
        """Delete what was not published."""
        for file in self.files:
            file.discard()


def draft_block(
    path: Path, head: bytes | bytearray, rows: NDArray[np.generic], size: int
) -> DraftBlock:
    """Write a block of one file, `size` bytes long: `head`, the rows in C order, and zeros."""
    draft = Draft(path)
    try:
        draft.set_size(size)
        content = _as_bytes(rows)
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(hashlib.sha256, content)
            draft.write(head)
            draft.write(content)
            return DraftBlock(digest.result().hexdigest(), (draft,))
    except BaseException:
        draft.discard()
        raise


def checksum(rows: NDArray[np.generic]) -> str:
    """SHA-256 of rows in C order."""
    return hashlib.sha256(_as_bytes(rows)).hexdigest()


def allow_many_files() -> None:
    """Raise this process's limit on open files as far as it may: a mapped block holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (MOST_FILES, FEWER_FILES):
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if soft >= most:
            return
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return


def _as_bytes(rows: NDArray[np.generic]) -> memoryview:
    """The rows' memory as bytes, not copied where it is in C order already."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
