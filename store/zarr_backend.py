"""Zarr v3 shards: one uncompressed chunk per shard.

The folder is a plain Zarr group that any reader opens: `features` (rows, L, tokens, D) and `valid`
(rows,). A chunk of `features` is a file of C-order little-endian numbers, so we write it with one
atomic rename and read it by mapping it, and leave the metadata to zarr.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import zarr
from numpy.typing import NDArray

from epalm.store.atomic import write_atomic


class ZarrBackend:
    """See `ShardBackend`."""

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int):
        self.folder = folder
        self.block_shape = (shard_rows, *row_shape)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.map = lru_cache(maxsize=512)(self._map)  # each holds a file descriptor

    def write(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> str:
        block = np.zeros(self.block_shape, self.dtype)
        block[: len(rows)] = rows
        mask = np.zeros(len(block), np.uint8)
        mask[: len(rows)] = valid
        self._grow((shard + 1) * len(block))
        write_atomic(self._chunk(shard), block.data.cast("B"))
        write_atomic(self.folder / "valid" / "c" / str(shard), mask.data)
        return hashlib.sha256(block.data).hexdigest()

    def is_whole(self, shard: int) -> bool:
        size = int(np.prod(self.block_shape)) * self.dtype.itemsize
        chunk = self._chunk(shard)
        return chunk.is_file() and chunk.stat().st_size == size

    def _map(self, shard: int) -> NDArray[np.generic]:
        return np.memmap(self._chunk(shard), self.dtype, mode="r", shape=self.block_shape)

    def _chunk(self, shard: int) -> Path:
        zeros = ["0"] * (len(self.block_shape) - 1)
        return self.folder.joinpath("features", "c", str(shard), *zeros)

    def _grow(self, rows: int) -> None:
        """Make both arrays at least so many rows long; rows not yet written read as not valid."""
        group = zarr.open_group(self.folder, mode="a")
        for name, block_shape, dtype in (
            ("features", self.block_shape, self.dtype),
            ("valid", self.block_shape[:1], np.dtype(np.uint8)),
        ):
            if name not in group:
                group.create_array(
                    name,
                    shape=(rows, *block_shape[1:]),
                    chunks=block_shape,
                    dtype=dtype,
                    compressors=None,
                    filters=None,
                    fill_value=0,
                )
                continue
            array = cast(zarr.Array, group[name])
            if array.shape[0] < rows:
                array.resize((rows, *block_shape[1:]))
