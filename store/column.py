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
A shard is planned before it is encoded: whoever redoes it after an interruption finds the same
media in the same order, and so makes the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.atomic import claim, locked, write_atomic
from epalm.store.backend import ShardBackend, open_backend
from epalm.store.blocks import allow_many_files, checksum
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.window import Window


class Row(NamedTuple):
    """One view of the media with this content hash."""

    content_hash: str
    view: int


class Failure(NamedTuple):
    """Why a media has no features; `exception` is the kind of error."""

    media: str
    reason: str
    exception: str


@dataclass(frozen=True)
class Plan:
    """The rows of a shard, in order; all of one view."""

    shard: int
    view: int
    hashes: list[str]

    @property
    def rows(self) -> list[Row]:
        return [Row(h, self.view) for h in self.hashes]


@dataclass(frozen=True)
class Marker(Plan):
    """A shard that is there.

    Attributes:
        dtype: its number format.
        sha256: of its rows' bytes.
        failed: by content hash, why a row holds nothing.
    """

    dtype: str
    sha256: str
    failed: dict[str, Failure] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Marker | None":
        """The marker in a file; None when it is not as it was written."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            seal = tree.pop("seal")
            marker = cls(**{**tree, "failed": {h: Failure(*f) for h, f in tree["failed"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return marker if marker._seal() == seal else None

    def write(self, path: Path) -> None:
        write_atomic(path, json.dumps({**vars(self), "seal": self._seal()}))

    def _seal(self) -> str:
        """SHA-256 of what the marker says."""
        return hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()


class Column:
    """Open for reading; rows are found by content hash and view.

    Attributes:
        markers: of whole shards, by number.
        damaged: markers whose block is truncated or gone.
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
        self.failures: dict[Row, Failure] = {}
        self._row_of: dict[Row, int] = {}
        self._dtype = self.spec.dtype
        self._window: Window | None = None
        self._blocks: dict[int, NDArray[np.generic]] = {}
        for path in sorted((self.folder / "markers").glob("*.json")):
            marker = Marker.read(path)
            if marker is None:
                continue  # as if it were not there: its media are extracted again
            if self.backend.is_whole(marker.shard, len(marker.hashes), marker.dtype):
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
        expected = np.array([h not in marker.failed for h in marker.hashes])
        try:
            return np.array_equal(self.backend.valid(shard, len(expected)), expected)
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

    def _marker_path(self, shard: int) -> Path:
        return self.folder / "markers" / f"{shard:06}.json"

    def _plan_path(self, shard: int) -> Path:
        return self.folder / "plans" / f"{shard:06}.json"


class Claim(NamedTuple):
    """The exclusive right to make a shard; ends with `stream`, or with the process."""

    plan: Plan
    stream: BinaryIO


class ColumnWriter:
    """Plans, claims and writes shards; any number of processes may do so at once."""

    def __init__(self, column: Column):
        self.column = column

    def plan(self, wanted: Sequence[Row]) -> dict[int, int]:
        """Shards that must be made, by this process or another, for these rows to be there.

        Rows that stand in an unfinished plan stay there, where this process could do it too or
        another is at it; for all others plans are written.

        Args:
            wanted: rows that the column shall have, in order.

        Returns:
            Number of rows by number of shard, ascending.
        """
        column = self.column
        if all(row in column for row in wanted):
            return {}  # a read-only store is not even locked
        with locked(column.folder / ".plans.lock"):
            # plans first: a shard that is made meanwhile is then in one of both
            plans = self._plans()
            self._check_backend()
            column.refresh()
            missing = dict.fromkeys(row for row in wanted if row not in column)
            pending: dict[int, int] = {}
            for number, rows in plans.items():
                path = column._plan_path(number)
                if not rows or number in column.markers:
                    _drop_if_idle(path)  # cut by a power failure, or killed before the clean-up
                    continue
                if not missing.keys() & rows:
                    continue
                if not missing.keys() >= set(rows) and _drop_if_idle(path):
                    continue  # its other media are not this dataset's: planned anew
                pending[number] = len(rows)
                for row in rows:
                    missing.pop(row, None)
            free = self._free_numbers()
            for view in sorted({row.view for row in missing}):
                hashes = [row.content_hash for row in missing if row.view == view]
                for begin in range(0, len(hashes), column.shard_rows):
                    number = next(free)
                    plan = Plan(number, view, hashes[begin : begin + column.shard_rows])
                    self._write_plan(plan)
                    pending[number] = len(plan.hashes)
            if pending:
                column.backend.reserve(max(pending) + 1)
        return dict(sorted(pending.items()))

    def claim(self, shard: int) -> Claim | None:
        """A planned shard, to be made by this process alone until the claim is closed.

        None when another process is making it, or has made it.
        """
        stream = claim(self.column._plan_path(shard))
        if stream is None:
            return None
        return Claim(Plan(**json.load(stream)), stream)

    def give_up(self, claim: Claim) -> None:
        """Strike a claimed plan; its rows are to be planned again."""
        self.column._plan_path(claim.plan.shard).unlink(missing_ok=True)
        claim.stream.close()

    def is_made(self, shard: int) -> bool:
        """The shard's marker is there."""
        return self.column._marker_path(shard).is_file()

    def is_lost(self, shard: int) -> bool:
        """The shard is neither made nor planned any more."""
        return not self.column._plan_path(shard).is_file() and not self.is_made(shard)

    def write(self, plan: Plan, rows: NDArray[np.float32], failed: dict[str, Failure]) -> Marker:
        """Write a claimed shard: block first, its marker last.

        Args:
            plan: a claimed one.
            rows: (n, layers, tokens, D) in the plan's order, finite where not failed.
            failed: by content hash, why a row holds nothing.

        Returns:
            The marker; its dtype is float32 where the column's cannot hold a value.
        """
        column = self.column
        dtype = column.spec.dtype if _fits(rows, column.spec.dtype) else "float32"
        valid = np.array([h not in failed for h in plan.hashes])
        sha256 = column.backend.write(plan.shard, rows.astype(dtype, copy=False), valid)
        marker = Marker(plan.shard, plan.view, plan.hashes, dtype, sha256, failed)
        marker.write(column._marker_path(plan.shard))
        column._plan_path(plan.shard).unlink(missing_ok=True)
        column._index(marker)
        return marker

    def plan_again(self, shards: Iterable[int]) -> None:
        """Give up broken shards, so that the same media are encoded into the same places again.

        A shard that another process has mended, or is mending, is left alone.
        """
        column = self.column
        with locked(column.folder / ".plans.lock"):
            column.refresh()
            known = {m.shard: m for m in [*column.markers.values(), *column.damaged]}
            for shard in shards:
                marker = known.get(shard)
                if marker is None or column._plan_path(shard).is_file():
                    continue
                whole = shard in column.markers
                if whole and column.is_intact(shard) and column.is_told_rightly(shard):
                    continue
                self._write_plan(Plan(shard, marker.view, marker.hashes))
                column._marker_path(shard).unlink()
            column.refresh()

    def _check_backend(self) -> None:
        """EpalmError when the set was converted since it was opened."""
        layout = json.loads((self.column.folder.parent / "layout.json").read_text(encoding="utf-8"))
        if layout["backend"] != self.column.backend_name:
            raise EpalmError(
                f"{self.column.folder.parent}: was converted to {layout['backend']} meanwhile; run "
                "the same command again"
            )

    def planned(self) -> set[Row]:
        """Rows that stand in plans."""
        return {row for rows in self._plans().values() for row in rows}

    def _plans(self) -> dict[int, list[Row]]:
        paths = sorted((self.column.folder / "plans").glob("[0-9]*.json"))
        return {int(path.stem): _read_plan(path) for path in paths}

    def _write_plan(self, plan: Plan) -> None:
        write_atomic(self.column._plan_path(plan.shard), json.dumps(vars(plan)))

    def _free_numbers(self) -> Iterator[int]:
        """Shard numbers that no marker and no plan has, ascending.

        The number of a lost marker is used again, so that the same media get the same place.
        """
        column = self.column
        taken = {*self._plans(), *column.markers, *(m.shard for m in column.damaged)}
        return (number for number in count() if number not in taken)


def _read_plan(path: Path) -> list[Row]:
    """The rows of a plan; none when the file is cut short."""
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8"))).rows
    except (ValueError, TypeError, FileNotFoundError):
        return []


def _drop_if_idle(path: Path) -> bool:
    """Remove a plan that nobody is working at; False when somebody is."""
    stream: BinaryIO | None = claim(path)
    if stream is None:
        return False
    with stream:
        path.unlink()
    return True


def _fits(rows: NDArray[np.float32], dtype: str) -> bool:
    if rows.dtype == dtype:
        return True
    limit = np.finfo(dtype).max
    return bool(rows.size == 0 or (rows.max() <= limit and rows.min() >= -limit))
