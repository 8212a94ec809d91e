"""A block's bytes: hashed while they are written."""

import hashlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE = 2**21
"""Bytes after which the disk is set to work: a huge page, so that the file is mapped in such."""

MOST_FILES = 65_536


def checksum(rows: NDArray[np.generic]) -> str:
    """SHA-256 of rows in C order."""
    return hashlib.sha256(as_bytes(rows)).hexdigest()


def write_rows(path: Path, offset: int, rows: NDArray[np.generic], size: int) -> str:
    """Write rows at an offset of an existing file, `size` bytes long in the end, and flush it.

    The rest of the file, unused rows, reads as zeros and takes no space. Returns their SHA-256,
    which is reckoned meanwhile.
    """
    content = as_bytes(rows)
    with ThreadPoolExecutor(1) as beside, path.open("rb+", buffering=0) as stream:
        digest = beside.submit(hashlib.sha256, content)
        if os.fstat(stream.fileno()).st_size != size:
            stream.truncate(size)  # first: afterwards it would wait for the disk
        stream.seek(offset)
        while content:
            written = stream.write(content[: PIECE - offset % PIECE])
            _begin_writeback(stream.fileno(), offset, written)
            content, offset = content[written:], offset + written
        os.fsync(stream.fileno())
        return digest.result().hexdigest()


def allow_many_files() -> None:
    """Raise this process's limit on open files as far as it may: a mapped block holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _begin_writeback(descriptor: int, begin: int, length: int) -> None:
    """Let the disk begin before the fsync; dirty pages are written, not dropped, by this advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def as_bytes(rows: NDArray[np.generic]) -> Any:
    """The rows' memory as bytes, not copied where it is in C order already."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
