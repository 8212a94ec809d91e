"""Zarr v3 shards: one uncompressed chunk per shard.

The column is a plain Zarr group that any reader opens: `features` (rows, layers, tokens, D) and
`valid` (rows,). A chunk of `features` is a file of C-order little-endian numbers, so we write it
with one atomic rename and read it by mapping it, and leave the metadata to zarr. A block that had
to be float32 stands at its place in the array `features_float32`; `valid` is 1 for a row in
`features`, 2 for one there, 0 for one in neither.
"""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np
import zarr
from numpy.typing import NDArray

from epalm.store.atomic import Draft, locked, naming_file, write_atomic
from epalm.store.backend import Told
from epalm.store.blocks import DraftBlock, draft_block


class ZarrBackend:
    """See `ShardBackend`."""

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: str, shard_rows: int):
        self.folder, self.dtype = folder, dtype
        self.block_shape = (shard_rows, *row_shape)

    def reserve(self, shards: int) -> None:
        rows = shards * self.block_shape[0]
        self._grow("features", self.dtype, rows)
        self._grow("valid", "uint8", rows)

    def draft(self, shard: int, rows: NDArray[np.generic], valid: NDArray[np.bool_]) -> DraftBlock:
        name = self._array(rows.dtype.name)
        if name != "features":
            with locked(self.folder / ".lock"):  # another process may be doing so as well
                self._grow(name, rows.dtype.name, (shard + 1) * self.block_shape[0])
        for old in self.files(shard):  # a block redone may have had another number format
            old.unlink()
        little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
        with ExitStack() as undone:
            # published last, as readers go by it; not flushed, as markers say the same
            mask = undone.enter_context(Draft(self._mask(shard), flush=False))
            mask.write(self._told(rows.dtype.name, valid))
            size = self._size(rows.dtype.name)
            sha256, files = draft_block(self._chunk(name, shard), b"", little, size)
            undone.pop_all()
        return DraftBlock(sha256, (*files, mask))

    def is_whole(self, shard: int, rows: int, dtype: str) -> bool:
        chunk = self._chunk(self._array(dtype), shard)
        return chunk.is_file() and chunk.stat().st_size == self._size(dtype)

    def map(self, shard: int, rows: int, dtype: str) -> NDArray[np.generic]:
        path = self._chunk(self._array(dtype), shard)
        stored = np.dtype(dtype).newbyteorder("<")
        return np.memmap(path, stored, mode="r", shape=(rows, *self.block_shape[1:]))

    def valid(self, shard: int, rows: int) -> NDArray[np.bool_]:
        group = zarr.open_group(self.folder, mode="r")
        first = shard * self.block_shape[0]
        features, valid = (cast(zarr.Array, group[name]) for name in ("features", "valid"))
        reaches = features.shape[0] >= first + rows
        return np.asarray(valid[first : first + rows]) > 0 if reaches else np.zeros(rows, bool)

    def tell_anew(self, shards: int, told: Told) -> None:
        arrays = {"features": self.dtype, "valid": "uint8", "features_float32": "float32"}
        with locked(self.folder / ".lock"):
            for name, dtype in arrays.items():
                if (self.folder / name).is_dir() or name != "features_float32":
                    (self.folder / name / "zarr.json").unlink(missing_ok=True)
                    self._grow(name, dtype, shards * self.block_shape[0])
        for shard, (dtype, valid) in told.items():
            write_atomic(self._mask(shard), self._told(dtype, valid))

    def files(self, shard: int) -> list[Path]:
        chunks = [self._chunk(name, shard) for name in ("features", "features_float32")]
        return [p for p in [self._mask(shard), *chunks] if p.is_file()]

    def shards(self) -> set[int]:
        names = ("features", "features_float32")
        chunks = (p for name in names for p in (self.folder / name).glob("c.*"))
        numbers = (path.name.split(".")[1] for path in chunks)
        return {int(number) for number in numbers if number.isdecimal()}

    def _array(self, dtype: str) -> str:
        return "features" if dtype == self.dtype else f"features_{dtype}"

    def _size(self, dtype: str) -> int:
        return math.prod(self.block_shape) * np.dtype(dtype).itemsize

    def _chunk(self, array: str, shard: int) -> Path:
        zeros = ".0" * (len(self.block_shape) - 1)
        return self.folder / array / f"c.{shard}{zeros}"

    def _mask(self, shard: int) -> Path:
        return self.folder / "valid" / f"c.{shard}"

    def _told(self, dtype: str, valid: NDArray[np.bool_]) -> bytes:
        """A block's mask as it is stored."""
        told = np.zeros(self.block_shape[0], np.uint8)
        told[: len(valid)] = valid * (1 if self._array(dtype) == "features" else 2)
        return told.tobytes()

    def _grow(self, name: str, dtype: str, rows: int) -> None:
        """Make an array at least so many rows long; rows not yet written read as not valid.

        Metadata that a power failure has left unreadable are made anew: all is known that they say.
        """
        path = self.folder / name / "zarr.json"
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
            grows = metadata["shape"][0] < rows
        except (FileNotFoundError, ValueError, TypeError, LookupError):
            path.unlink(missing_ok=True)
            self._create(name, dtype, rows)
            return
        if grows:
            metadata["shape"][0] = rows
            write_atomic(path, json.dumps(metadata, indent=2))

    def _create(self, name: str, dtype: str, rows: int) -> None:
        """Write an array's metadata, and its group's where these cannot be read."""
        group = self.folder / "zarr.json"
        if group.is_file() and not _is_group(group):
            group.unlink()
        shape = self.block_shape if name != "valid" else self.block_shape[:1]
        with naming_file(self.folder / name):
            zarr.open_group(self.folder, mode="a").create_array(
                name,
                shape=(rows, *shape[1:]),
                chunks=shape,
                # chunks side by side: a folder for each would cost as much as a flush
                chunk_key_encoding={"name": "default", "separator": "."},
                dtype=np.dtype(dtype).newbyteorder("<"),
                compressors=None,
                filters=None,
                fill_value=0,
            )
        for leftover in self.folder.glob("**/zarr.*.partial"):  # of a killed process
            leftover.unlink()


def _is_group(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["node_type"] == "group"
    except (ValueError, TypeError, LookupError):
        return False
