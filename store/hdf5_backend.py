"""HDF5 shards: one file per shard, `features` (n, layers, tokens, D) contiguous and `valid` (n,).

HDF5 lays the file out; the rows are written to and mapped from the place that it gave them, which
costs no copy and no call into its library per read.
"""

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.atomic import replacing
from epalm.store.blocks import write_rows

ALIGNMENT = 64
"""Bytes that a block's place in its file is a multiple of: mapped numbers are read fast only so."""


class HDF5Backend:
    """See `ShardBackend`."""

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int):
        self.folder, self.row_shape = folder / "shards", row_shape

    def write(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> str:
        little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
        with replacing(self._path(shard)) as partial:
            offset, size = _lay_out(partial, little.shape, little.dtype, valid)
            return write_rows(partial, offset, little, size)

    def is_whole(self, shard: int, rows: int, dtype: str) -> bool:
        path = self._path(shard)
        size = rows * int(np.prod(self.row_shape)) * np.dtype(dtype).itemsize
        try:
            with h5py.File(path) as file:  # refuses a truncated file
                return file["features"].id.get_storage_size() == size
        except (OSError, KeyError):
            return False

    def map(self, shard: int, rows: int, dtype: str) -> NDArray[np.generic]:
        path = self._path(shard)
        with h5py.File(path) as file:
            offset = file["features"].id.get_offset()
        if offset is None:
            raise EpalmError(f"{path}: its features are not contiguous; extract it again")
        stored = np.dtype(dtype).newbyteorder("<")
        return np.memmap(path, stored, mode="r", offset=offset, shape=(rows, *self.row_shape))

    def files(self, shard: int) -> list[Path]:
        return [path for path in [self._path(shard)] if path.is_file()]

    def shards(self) -> set[int]:
        return {int(path.stem) for path in self.folder.glob("[0-9]*.h5")}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.h5"


def _lay_out(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic], valid: NDArray[np.bool_]
) -> tuple[int, int]:
    """A new HDF5 file whose features are still to be written: their offset, and the file's size."""
    space = h5py.h5s.create_simple(shape)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # we write every byte ourselves
    plan.set_obj_track_times(False)  # equal rows give equal files
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
        file.create_dataset("valid", data=valid.astype(np.uint8))
        kind = h5py.h5t.py_create(dtype)
        dataset = h5py.h5d.create(file.id, b"features", kind, space, plan)
        offset = dataset.get_offset()
        dataset.close()
    return offset, path.stat().st_size
