"""What a shard backend must do, and the table of those there are."""

import importlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError


class ShardBackend(Protocol):
    """Fixed-size blocks of feature rows on disk.

    A block has the shape (shard_rows, L, tokens, D); the last rows of one may be unused.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int): ...

    def write(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> str:
        """Write one whole block atomically; returns the SHA-256 of its bytes.

        Args:
            shard: the block's number.
            rows: (n, L, tokens, D), n <= shard_rows.
            valid: (n,) False where a row's media could not be decoded.
        """
        ...

    def is_whole(self, shard: int) -> bool:
        """The block's file is there and has its full size."""
        ...

    def map(self, shard: int) -> NDArray[np.generic]:
        """The block, memory-mapped and read-only: (shard_rows, L, tokens, D)."""
        ...


BACKENDS = {"zarr": "epalm.store.zarr_backend:ZarrBackend"}


def open_backend(
    name: str, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int
) -> ShardBackend:
    """The backend called `name`; EpalmError when there is none."""
    if name not in BACKENDS:
        raise EpalmError(f"store.backend: {name!r} is not one of {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module), cls)(folder, row_shape, dtype, shard_rows)
