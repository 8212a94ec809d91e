"""What a shard backend must do, and the table of those there are."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.blocks import DraftBlock

Told = Mapping[int, tuple[str, NDArray[np.bool_]]]
"""By number of a block, its number format, and (n,) False where a row holds nothing."""


class ShardBackend(Protocol):
    """Blocks of feature rows on disk, each written once and read by mapping it.

    Args:
        folder: the column's, where the backend's files live.
        row_shape: (layers, tokens, D).
        dtype: the column's number format. A block may be float32 instead, where it has to be.
        shard_rows: rows of a full block; a block may have fewer.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int): ...

    def reserve(self, shards: int) -> None:
        """Prepare for blocks 0 to `shards` - 1; called under the column's lock before any write."""
        ...

    def draft(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> DraftBlock:
        """Write one block beside its place; to be published or discarded.

        Args:
            shard: the block's number.
            rows: (n, layers, tokens, D), n <= shard_rows, in the column's dtype or float32.
            valid: (n,) False where a row's media could not be encoded.
        """
        ...

    def is_whole(self, shard: int, rows: int, dtype: str) -> bool:
        """The block's file is there and has the size that so many rows need."""
        ...

    def map(self, shard: int, rows: int, dtype: str) -> NDArray[np.generic]:
        """The block, memory-mapped and read-only: (rows, layers, tokens, D)."""
        ...

    def valid(self, shard: int, rows: int) -> NDArray[np.bool_]:
        """What other readers are told: which rows (n,) hold features."""
        ...

    def tell_anew(self, shards: int, told: Told) -> None:
        """Write again what other readers are told of whole blocks; features stay as they are.

        Called under the column's lock.

        Args:
            shards: blocks 0 to `shards` - 1 may be there.
            told: of some of them.
        """
        ...

    def files(self, shard: int) -> list[Path]:
        """The files there are that belong to a block, in the order in which to delete them."""
        ...

    def shards(self) -> set[int]:
        """Numbers of the blocks whose files are there, with or without marker."""
        ...


BACKENDS = {
    "zarr": "epalm.store.zarr_backend:ZarrBackend",
    "hdf5": "epalm.store.hdf5_backend:HDF5Backend",
}


def check_backend(name: str) -> None:
    """EpalmError when there is no such backend."""
    if name not in BACKENDS:
        raise EpalmError(f"store.backend: {name!r} is not one of {', '.join(BACKENDS)}")


def open_backend(
    name: str, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int
) -> ShardBackend:
    """The backend called `name`; EpalmError when there is none."""
    check_backend(name)
    module, cls = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module), cls)(folder, row_shape, dtype, shard_rows)
