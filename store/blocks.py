"""A block's bytes: hashed while they are written."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HASHER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")


def checksum(rows: NDArray[np.generic]) -> str:
    """SHA-256 of rows in C order."""
    return hashlib.sha256(as_bytes(rows)).hexdigest()


def write_rows(path: Path, offset: int, rows: NDArray[np.generic], size: int) -> str:
    """Write rows at an offset of an existing file, make it `size` bytes long; their SHA-256.

    The rest of the file, unused rows, reads as zeros and takes no space.
    """
    content = as_bytes(rows)
    digest = _HASHER.submit(hashlib.sha256, content)  # both release the interpreter lock
    with path.open("rb+", buffering=0) as stream:
        stream.seek(offset)
        while content:
            content = content[stream.write(content) :]
        stream.truncate(size)
    return digest.result().hexdigest()


def as_bytes(rows: NDArray[np.generic]) -> Any:
    """The rows' memory as bytes, not copied where it is in C order already."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
