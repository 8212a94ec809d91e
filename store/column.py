"""A column of a feature set on disk: shards of rows, and the markers that make them count.

    COLUMN/
        column.json               what it keeps (ColumnSpec)
        markers/000000.json       which media stand in shard 0, which of them failed and why, its
                                  number format and checksum; written last
        plans/000001.json         the media that shard 1 will hold; locked by who is encoding them,
                                  gone once the marker is there
        …                         the backend's files

A row is one view of one media, filed by content hash, so that equal files are encoded once. A
shard counts only when its marker is there; the index is rebuilt from the markers at every opening.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.backend import ShardBackend, open_backend
from epalm.store.blocks import allow_many_files, checksum
from epalm.store.marker import Failure, Marker, Row
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.window import Window


class Column:
    """Open for reading; rows are found by content hash and view.

    Attributes:
        markers: of whole shards, by number.
        damaged: markers whose block is truncated or gone.
        unreadable: shards whose marker is not as it was written; their rows count as missing.
        failures: rows without features, and why.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, column: ColumnSpec, backend: str,
                 shard_rows: int):  # fmt: skip
        self.folder, self.spec, self.column, self.shard_rows = folder, spec, column, shard_rows
        self.backend_name = backend
        self.row_shape = (len(column.layers), column.token_count, spec.dim)
        self.backend: ShardBackend = open_backend(
            backend, folder, self.row_shape, spec.dtype, shard_rows
        )
        self.refresh()

    def refresh(self) -> None:
        """Read the markers again; another process may have added some."""
        self.markers: dict[int, Marker] = {}
        self.damaged: list[Marker] = []
        self.unreadable: list[int] = []
        self.failures: dict[Row, Failure] = {}
        self._row_of: dict[Row, int] = {}
        self._dtype = self.spec.dtype
        self._window: Window | None = None
        self._blocks: dict[int, NDArray[np.generic]] = {}
        for path in sorted((self.folder / "markers").glob("*.json")):
            marker = Marker.read(path)
            if marker is None:
                if path.stem.isdecimal():  # else somebody's own file
                    self.unreadable.append(int(path.stem))
            elif self.backend.is_whole(marker.shard, len(marker.hashes), marker.dtype):
                self._index(marker)
            else:
                self.damaged.append(marker)

    def __contains__(self, row: Row) -> bool:
        return row in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self, wanted: Sequence[Row]) -> NDArray[np.int64]:
        """Row numbers (n,); KeyError when one is not there."""
        found = map(self._row_of.__getitem__, wanted)
        return np.fromiter(found, np.int64, len(wanted))

    def dtype(self) -> str:
        """The number format that holds every row: the spec's, or float32 where one had to be."""
        return self._dtype

    def gather(
        self,
        rows: NDArray[np.int64],
        layers: slice = slice(None),
        out: NDArray[np.generic] | None = None,
    ) -> NDArray[np.generic]:
        """Features of these rows and positions among the column's layers, copied.

        Args:
            rows: (n,) from `rows`.
            layers: a slice of `column.layers`, with step 1.
            out: where to put them; default: a new array.

        Returns:
            (n, layers, tokens, D).

        Raises:
            EpalmError: a shard whose bytes are not those that were written.
        """
        if out is None and len(rows) and self._dtype == self.spec.dtype:
            if self._window is None:
                shards = max(self.markers) + 1
                self._window = Window(
                    self.row_shape, self._dtype, self.shard_rows, shards, self._opened
                )
            return self._window.take(rows, layers)
        if out is None:
            kept = len(self.column.layers[layers])
            out = np.empty((len(rows), kept, *self.row_shape[1:]), self._dtype)
        # neighbouring rows of a shard are copied at once
        apart = (np.diff(rows) != 1) | (rows[1:] % self.shard_rows == 0)
        ends = [*(np.flatnonzero(apart) + 1).tolist(), len(rows)] if len(rows) else []
        for begin, end in pairwise([0, *ends]):
            shard, offset = divmod(int(rows[begin]), self.shard_rows)
            block = self._opened(shard)
            out[begin:end] = block[offset : offset + end - begin, layers]
        return out

    def known(self) -> dict[int, Marker]:
        """Markers of all shards, whole or damaged, that have a readable one."""
        return {marker.shard: marker for marker in [*self.markers.values(), *self.damaged]}

    def block(self, shard: int) -> NDArray[np.generic]:
        """A shard's rows, mapped, not checked: (n, layers, tokens, D)."""
        marker = self.markers[shard]
        return self.backend.map(shard, len(marker.hashes), marker.dtype)

    def is_intact(self, shard: int) -> bool:
        """The shard's bytes have the checksum they were written with."""
        return checksum(self.block(shard)) == self.markers[shard].sha256

    def is_told_rightly(self, shard: int) -> bool:
        """Other readers are told the same of the shard as its marker says."""
        marker = self.markers[shard]
        try:
            return np.array_equal(self.backend.valid(shard, len(marker.hashes)), marker.valid)
        except Exception:  # whatever the backend's library makes of damaged metadata
            return False

    def _opened(self, shard: int) -> NDArray[np.generic]:
        """A shard's rows; the checksum is compared when it is first used."""
        if shard not in self._blocks:
            block = self.block(shard)
            if checksum(block) != self.markers[shard].sha256:
                raise EpalmError(
                    f"{self.folder}: shard {shard} does not have the checksum it was written with; "
                    "run `cache repair` with this recipe"
                )
            allow_many_files()
            # a plain array is read faster than a memmap; a foreign writer's may be misaligned
            self._blocks[shard] = np.require(np.asarray(block), requirements=["C", "A"])
        return self._blocks[shard]

    def _index(self, marker: Marker) -> None:
        self.markers[marker.shard] = marker
        self._window = None  # it has no place for a new shard
        if marker.dtype != self.spec.dtype:
            self._dtype = marker.dtype
        for offset, row in enumerate(marker.rows):
            failure = marker.failed.get(row.content_hash)
            if failure is None:
                self._row_of[row] = marker.shard * self.shard_rows + offset
                self.failures.pop(row, None)
            elif row not in self._row_of:
                self.failures[row] = failure

    def marker_path(self, shard: int) -> Path:
        return self.folder / "markers" / f"{shard:06}.json"

    def _plan_path(self, shard: int) -> Path:
        return self.folder / "plans" / f"{shard:06}.json"
