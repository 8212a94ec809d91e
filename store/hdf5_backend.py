"""HDF5 shards: one file each, `valid` (n,) and contiguous `features` (n, layers, tokens, D).

HDF5 lays out a file of each size once; every other shard of that size is the same file with other
numbers in it. Rows are mapped from the place that HDF5 names. Neither costs a copy, nor a call into
the library per shard or read.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.backend import Told
from epalm.store.blocks import DraftBlock, draft_block

ALIGNMENT = 4096
"""Bytes that a block's place in its file is a multiple of: mapped numbers are read fast only so."""


class HDF5Backend:
    """See `ShardBackend`."""

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int):
        self.folder, self.row_shape = folder / "shards", row_shape

    def reserve(self, shards: int) -> None:
        pass  # each block is a file of its own

    def draft(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> DraftBlock:
        little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
        form = _form(little.shape, little.dtype)
        head = bytearray(form.head)
        head[form.valid : form.valid + len(valid)] = valid.astype(np.uint8).tobytes()
        return draft_block(self._path(shard), head, little, len(head) + little.nbytes)

    def is_whole(self, shard: int, rows: int, dtype: str) -> bool:
        path = self._path(shard)
        size = rows * int(np.prod(self.row_shape)) * np.dtype(dtype).itemsize
        if not path.is_file():
            return False
        path.open("rb").close()  # what keeps us from reading it does not make it damaged
        try:
            with h5py.File(path, locking=False) as file:  # refuses a truncated file
                return file["features"].id.get_storage_size() == size
        except (OSError, KeyError):
            return False

    def map(self, shard: int, rows: int, dtype: str) -> NDArray[np.generic]:
        path = self._path(shard)
        with h5py.File(path, locking=False) as file:
            offset = file["features"].id.get_offset()
        if offset is None:
            raise EpalmError(f"{path}: its features are not contiguous; extract it again")
        stored = np.dtype(dtype).newbyteorder("<")
        size = rows * int(np.prod(self.row_shape)) * stored.itemsize
        whole = np.memmap(path, np.uint8, mode="r")  # from its start, where huge pages begin
        return whole[offset : offset + size].view(stored).reshape(rows, *self.row_shape)

    def valid(self, shard: int, rows: int) -> NDArray[np.bool_]:
        with h5py.File(self._path(shard), locking=False) as file:
            return file["valid"][:rows] > 0

    def tell_anew(self, shards: int, told: Told) -> None:
        for shard, (dtype, valid) in told.items():
            self.draft(shard, self.map(shard, len(valid), dtype), valid).publish()

    def files(self, shard: int) -> list[Path]:
        return [path for path in [self._path(shard)] if path.is_file()]

    def shards(self) -> set[int]:
        return {int(p.stem) for p in self.folder.glob("[0-9]*.h5") if p.stem.isdecimal()}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.h5"


class _Form(NamedTuple):
    """A file before its numbers.

    Attributes:
        head: all bytes before the features, which end the file.
        valid: offset of `valid` in it.
    """

    head: bytes
    valid: int


@cache
def _form(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> _Form:
    """What HDF5 makes of a shard of this shape, laid out in memory."""
    size = int(np.prod(shape)) * dtype.itemsize
    with h5py.File(
        f"form of {shape} {dtype}",
        "w",
        driver="core",
        backing_store=False,
        alignment_threshold=ALIGNMENT if size >= ALIGNMENT else 1,  # not HDF5's own small pieces
        alignment_interval=ALIGNMENT,
    ) as file:
        valid = _contiguous(file, b"valid", shape[:1], np.dtype(np.uint8))
        features = _contiguous(file, b"features", shape, dtype)
        file.flush()
        image = file.id.get_file_image()
    if features + size != len(image):
        raise EpalmError("this version of HDF5 does not put the last dataset last; use zarr")
    return _Form(image[:features], valid)


def _contiguous(
    file: h5py.File, name: bytes, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> int:
    """Make a dataset with room for its numbers; where they are to stand."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # we write every byte ourselves
    plan.set_obj_track_times(False)  # equal rows give equal files
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file.id, name, h5py.h5t.py_create(dtype), space, plan)
    return dataset.get_offset()
