"""Publishing shards beside the writing of the next: order on disk, errors, claims."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from epalm.store.atomic import Draft
from epalm.store.backend import BACKENDS
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet, Layout
from epalm.store.marker import Failure, Marker, Row
from epalm.store.publisher import MOST_WAITING, Publisher
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.writer import Claim, ColumnWriter

SPEC = FeatureSpec("image", "toy", {}, 0, "", 2, 1, 3, True, "float32", {}, "float16")
SHARDS, SHARD_ROWS = 3 * MOST_WAITING, 2
WANTED = [Row(f"{n:03}", 0) for n in range(SHARDS * SHARD_ROWS - 1)]
FAILED = {"003": Failure("3.png", "bad", "E")}

Make = Callable[[str], Column]


@pytest.fixture(params=sorted(BACKENDS))
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """A new column, by the name of its store."""

    def made(name: str) -> Column:
        features = FeatureSet.create(tmp_path / name, SPEC, Layout(request.param, SHARD_ROWS, ""))
        (column,) = features.columns_for(ColumnSpec("cls", 1, (0, 1)))
        return column

    return made


def claimed(writer: ColumnWriter) -> list[Claim]:
    """All that is to be made."""
    wanted = [row for row in WANTED if row not in writer.column.failures]
    found = [writer.claim(shard) for shard in writer.plan(wanted)]
    return [claim for claim in found if claim is not None]


def rows(claim: Claim) -> np.ndarray:
    count = len(claim.plan.hashes)
    numbers = np.random.default_rng(claim.plan.shard).normal(size=(count, 2, 1, 3))
    return numbers.astype(np.float32)


def failed(claim: Claim) -> dict[str, Failure]:
    return {h: why for h, why in FAILED.items() if h in claim.plan.hashes}


def publish(claims: list[Claim], writer: ColumnWriter) -> list[Marker]:
    with Publisher(writer) as publisher:
        return [publisher.write(claim, rows(claim), failed(claim)) for claim in claims]


def files(column: Column) -> dict[str, bytes]:
    found = [p for p in column.folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(column.folder)): p.read_bytes() for p in found}


def test_files_are_those_of_shards_written_one_by_one(make: Make) -> None:
    alone, beside = make("alone"), make("beside")
    writer = ColumnWriter(alone)
    for claim in claimed(writer):
        with claim.stream:
            writer.write(claim.plan, rows(claim), failed(claim))
    markers = publish(claimed(ColumnWriter(beside)), ColumnWriter(beside))
    assert files(beside) == files(alone)
    beside.refresh()
    assert [*beside.markers.values()] == markers
    assert len(beside) == len(WANTED) - len(FAILED)
    assert not list((beside.folder / "plans").iterdir())


def test_a_marker_is_in_place_only_after_its_block_is_on_disk(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []
    flush, place = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        flush(descriptor)
        inode = os.fstat(descriptor).st_ino
        partial = next(p for p in column.folder.rglob(".*.partial") if p.stat().st_ino == inode)
        done.append(("flushed", partial))

    def placed(self: Path, target: Path) -> Path:
        done.append(("placed", target))
        return place(self, target)

    column = make("one")
    writer = ColumnWriter(column)
    claims = claimed(writer)
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", placed)
    publish(claims, writer)
    for shard in range(SHARDS):
        marker = column.marker_path(shard)
        in_place = done.index(("placed", marker))
        assert done.index(("flushed", partial_of(marker))) < in_place
        *told, features = column.backend.files(shard)
        assert all(done.index(("placed", path)) < in_place for path in told)
        assert done.index(("flushed", partial_of(features))) < done.index(("placed", features))
        assert done.index(("placed", features)) < in_place


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def test_claims_last_until_the_marker_is_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    column = make("one")
    writer, other = ColumnWriter(column), ColumnWriter(column)
    held = []
    real = Draft.publish

    def looked_at(self: Draft) -> None:
        if "markers" in self.path.parts:
            held.append(other.claim(int(self.path.stem)) is None)
        real(self)

    monkeypatch.setattr(Draft, "publish", looked_at)
    claims = claimed(writer)
    publish(claims, writer)
    assert held == [True] * SHARDS
    assert all(claim.stream.closed for claim in claims)


def test_an_error_of_the_thread_is_raised_and_the_rest_can_be_made(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one flush, of a block or of a marker."""
    whole = make("whole")
    publish(claimed(ColumnWriter(whole)), ColumnWriter(whole))
    flush = os.fsync
    for number, place in enumerate(("features", "markers")):
        column = make(str(number))
        writer = ColumnWriter(column)
        claims = claimed(writer)
        file = column.marker_path(5)
        if place == "features":
            file = next(
                (whole.folder / name)
                for name in files(whole)
                if name in ("features/c.5.0.0.0", "shards/000005.h5")
            )
        name = partial_of(file).name

        def full(descriptor: int, column: Column = column, name: str = name) -> None:
            inode = os.fstat(descriptor).st_ino
            if any(p.name == name and p.stat().st_ino == inode for p in
                   column.folder.rglob(".*.partial")):  # fmt: skip
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device"):
                publish(claims, writer)
        for claim in claims:
            claim.stream.close()
        assert not list(column.folder.rglob(".*.partial"))
        column.refresh()
        assert 0 < len(column) < len(WANTED)
        publish(claimed(writer), writer)
        assert files(column) == files(whole)


def test_what_was_written_before_an_error_of_the_caller_is_published(make: Make) -> None:
    column = make("one")
    writer = ColumnWriter(column)
    claims = claimed(writer)
    with pytest.raises(KeyboardInterrupt), Publisher(writer) as publisher:
        for claim in claims[:5]:
            publisher.write(claim, rows(claim), {})
        raise KeyboardInterrupt
    for claim in claims:
        claim.stream.close()
    column.refresh()
    assert sorted(column.markers) == [0, 1, 2, 3, 4]
