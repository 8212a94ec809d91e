"""Writing a column: shards are planned, claimed, written beside their places, and published.

A shard is planned before it is encoded: whoever redoes it after an interruption finds the same
media in the same order, and so makes the same bytes.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.atomic import Draft, claim, locked, write_atomic, wrong_field
from epalm.store.blocks import DraftBlock
from epalm.store.column import Column
from epalm.store.marker import Failure, Marker, Plan, Row


class Claim(NamedTuple):
    """The exclusive right to make a shard; ends with `stream`, or with the process."""

    plan: Plan
    stream: BinaryIO


class DraftShard(NamedTuple):
    """A shard written beside its place, which nobody sees: its block, and its marker's file."""

    marker: Marker
    block: DraftBlock
    file: Draft

    def discard(self) -> None:
        """Delete what was not published."""
        self.block.discard()
        self.file.discard()


class ColumnWriter:
    """Plans, claims and writes shards; any number of processes may do so at once."""

    def __init__(self, column: Column):
        self.column = column

    def plan(self, wanted: Sequence[Row]) -> dict[int, int]:
        """Shards that must be made, by this process or another, for these rows to be there.

        Rows that stand in an unfinished plan stay there, where this process could do it too or
        another is at it, and so do those of a shard whose rows have all failed; for all others
        plans are written.

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
            for marker in column.markers.values():
                if not marker.failed or marker.shard in plans:
                    continue
                tried = marker.failed.keys() == set(marker.hashes)  # nothing else stands there
                if tried and missing.keys() >= set(marker.rows):
                    self._plan_in_place(marker)
                    pending[marker.shard] = len(marker.hashes)
                    for row in marker.rows:
                        del missing[row]
            free = self._free_numbers()
            for view in sorted({row.view for row in missing}):
                hashes = [row.content_hash for row in missing if row.view == view]
                for begin in range(0, len(hashes), column.shard_rows):
                    number = next(free)
                    plan = Plan(number, view, hashes[begin : begin + column.shard_rows])
                    self._write_plan(plan)
                    pending[number] = len(plan.hashes)
            if pending:
                column.backend.reserve(max([*pending, *column.markers]) + 1)
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
        return self.column.marker_path(shard).is_file()

    def is_lost(self, shard: int) -> bool:
        """The shard is neither made nor planned any more."""
        return not self.column._plan_path(shard).is_file() and not self.is_made(shard)

    def write(self, plan: Plan, rows: NDArray[np.float32], failed: dict[str, Failure]) -> Marker:
        """Write a claimed shard and publish it: block first, its marker last.

        Args:
            plan: a claimed one.
            rows: (n, layers, tokens, D) in the plan's order, finite where not failed.
            failed: by content hash, why a row holds nothing.

        Returns:
            The marker; its dtype is float32 where the column's cannot hold a value.
        """
        shard = self.draft(plan, rows, failed)
        self.publish([shard])
        self.column._index(shard.marker)
        return shard.marker

    def draft(
        self, plan: Plan, rows: NDArray[np.float32], failed: dict[str, Failure]
    ) -> DraftShard:
        """The first half of `write`: bytes beside their place, on their way to the disk."""
        column = self.column
        dtype = column.spec.dtype if _fits(rows, column.spec.dtype) else "float32"
        valid = np.array([h not in failed for h in plan.hashes])
        block = column.backend.draft(plan.shard, rows.astype(dtype, copy=False), valid)
        marker = Marker(plan.shard, plan.view, plan.hashes, dtype, block.sha256, failed)
        with ExitStack() as undone:
            undone.callback(block.discard)
            file = undone.enter_context(Draft(column.marker_path(plan.shard)))
            file.write(marker.text().encode())
            undone.pop_all()
        return DraftShard(marker, block, file)

    def publish(self, shards: Sequence[DraftShard]) -> None:
        """The second half of `write`, for several: all blocks flushed, then their markers.

        A flush makes the file system put down what it has of all files, so that for each further
        one little is left to do. The column does not know of them before `Column.refresh`.
        """
        with ExitStack() as leaving:
            for shard in shards:
                leaving.callback(shard.discard)  # nothing, once it is published
            for shard in shards:
                shard.block.publish()
            for shard in shards:
                shard.file.publish()
                self.column._plan_path(shard.marker.shard).unlink(missing_ok=True)

    def plan_again(self, shards: Iterable[int]) -> None:
        """Give up broken shards, so that the same media are encoded into the same places again.

        Of those whose features are intact, what other readers are told is written again instead. A
        shard that another process has mended, or is mending, is left alone.
        """
        column = self.column
        with locked(column.folder / ".plans.lock"):
            column.refresh()
            known = column.known()
            broken: list[Marker] = []
            untold: list[Marker] = []
            for shard in shards:
                marker = known.get(shard)
                if marker is None or column._plan_path(shard).is_file():
                    continue
                if shard not in column.markers or not column.is_intact(shard):
                    broken.append(marker)
                elif not column.is_told_rightly(shard):
                    untold.append(marker)
            reach = max(self._taken(), default=-1) + 1
            if untold:
                column.backend.tell_anew(reach, {m.shard: (m.dtype, m.valid) for m in untold})
            if broken:
                column.backend.reserve(reach)  # nothing is given up that could not be made again
            for marker in broken:
                self._plan_in_place(marker)
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
        return {int(path.stem): _read_plan(path) for path in paths if path.stem.isdecimal()}

    def _write_plan(self, plan: Plan) -> None:
        write_atomic(self.column._plan_path(plan.shard), json.dumps(vars(plan)))

    def _plan_in_place(self, marker: Marker) -> None:
        """Have a shard made again from the same media; until it is, its rows are not there."""
        self._write_plan(Plan(marker.shard, marker.view, marker.hashes))
        self.column.marker_path(marker.shard).unlink()

    def _taken(self) -> set[int]:
        """Shard numbers that a marker or a plan has."""
        return {*self._plans(), *self.column.known()}

    def _free_numbers(self) -> Iterator[int]:
        """Shard numbers that are not taken, ascending.

        The number of a lost marker is used again, so that the same media get the same place.
        """
        taken = self._taken()
        return (number for number in count() if number not in taken)


def _read_plan(path: Path) -> list[Row]:
    """The rows of a plan; none when the file is cut short or was changed."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return []
    kinds = {"shard": int, "view": int, "hashes": list}
    if wrong_field(tree, kinds) or tree.keys() != kinds.keys() or tree["shard"] != int(path.stem):
        return []
    return Plan(**tree).rows if all(isinstance(h, str) for h in tree["hashes"]) else []


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
