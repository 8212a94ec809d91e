"""The store: the contract every backend keeps, columns over it, and feature sets of columns."""

import errno
import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from epalm.errors import EpalmError
from epalm.store import feature_set
from epalm.store.atomic import claim, locked, read_json_lines, write_atomic
from epalm.store.backend import BACKENDS, ShardBackend, open_backend
from epalm.store.blocks import allow_many_files
from epalm.store.column import Column
from epalm.store.feature_set import (
    Catalogue,
    CatalogueEntry,
    FeatureSet,
    Layout,
    find,
    open_set,
)
from epalm.store.listing import table_of_sets
from epalm.store.marker import Failure, Marker, Row
from epalm.store.spec import ColumnSpec, FeatureSpec, read_spec
from epalm.store.writer import ColumnWriter

SPEC = FeatureSpec(
    modality="image",
    encoder="timm/vit_tiny_patch16_224",
    encoder_arguments={},
    encoder_parameters=5_000_000,
    weights="ab" * 32,
    layers=3,
    tokens=17,
    dim=5,
    final_norm=True,
    compute="float32",
    preprocess={"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5]},
    dtype="float16",
)
CLS = ColumnSpec("cls", 1, (0, 1, 2))


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 1, 5)).astype(np.float16)


def row(content_hash: str, view: int = 0) -> Row:
    return Row(content_hash, view)


class BackendContract:
    """What a backend must do; a subclass gives its `name`."""

    name: str

    @pytest.fixture
    def backend(self, tmp_path: Path) -> ShardBackend:
        opened = open_backend(self.name, tmp_path, (3, 1, 5), "float16", 4)
        opened.reserve(4)
        return opened

    def test_reads_back_what_was_written(self, backend: ShardBackend) -> None:
        first, second = rows(4), rows(2, seed=1)
        backend.draft(0, first, np.ones(4, bool)).publish()
        backend.draft(1, second, np.array([True, False])).publish()
        assert np.array_equal(backend.map(0, 4, "float16"), first)
        assert np.array_equal(backend.map(1, 2, "float16"), second)
        assert backend.shards() == {0, 1}

    def test_a_block_may_be_float32(self, backend: ShardBackend) -> None:
        wide = rows(3).astype(np.float32) * 1e6
        backend.draft(0, rows(3), np.ones(3, bool)).publish()
        backend.draft(0, wide, np.ones(3, bool)).publish()
        assert np.array_equal(backend.map(0, 3, "float32"), wide)
        assert backend.is_whole(0, 3, "float32")
        assert not backend.is_whole(0, 3, "float16")

    def test_mapped_shards_are_read_only_and_aligned(self, backend: ShardBackend) -> None:
        backend.draft(0, rows(4), np.ones(4, bool)).publish()
        block = backend.map(0, 4, "float16")
        with pytest.raises(ValueError, match="read-only"):
            block[0] = 0
        assert block.ctypes.data % 64 == 0

    def test_checksum_is_of_the_rows(self, backend: ShardBackend) -> None:
        sums = []
        for shard, seed in enumerate((0, 0, 1)):
            draft = backend.draft(shard, rows(4, seed), np.ones(4, bool))
            draft.publish()
            sums.append(draft.sha256)
        assert sums[0] == sums[1] != sums[2]

    def test_equal_rows_make_equal_files(self, tmp_path: Path) -> None:
        for folder in (tmp_path / "one", tmp_path / "two"):
            written = open_backend(self.name, folder, (3, 1, 5), "float16", 4)
            written.draft(0, rows(4), np.ones(4, bool)).publish()
        assert files(tmp_path / "one") == files(tmp_path / "two")

    def test_whole_only_when_whole(self, backend: ShardBackend, tmp_path: Path) -> None:
        assert not backend.is_whole(0, 4, "float16")
        backend.draft(0, rows(4), np.ones(4, bool)).publish()
        assert backend.is_whole(0, 4, "float16")
        largest = max(files(tmp_path), key=lambda p: (tmp_path / p).stat().st_size)
        if self.name == "zarr":
            largest = "features/c.0.0.0.0"
        with (tmp_path / largest).open("r+b") as file:
            file.truncate((tmp_path / largest).stat().st_size - 1)
        assert not backend.is_whole(0, 4, "float16")

    def test_a_draft_is_seen_by_nobody_and_leaves_nothing(
        self, backend: ShardBackend, tmp_path: Path
    ) -> None:
        before = files(tmp_path)
        draft = backend.draft(0, rows(4), np.ones(4, bool))
        assert backend.shards() == set()
        assert not backend.is_whole(0, 4, "float16")
        draft.discard()
        assert files(tmp_path) == before

    def test_what_other_readers_are_told_is_written_again(
        self, backend: ShardBackend, tmp_path: Path
    ) -> None:
        wide = rows(3).astype(np.float32) * 1e6
        backend.draft(0, rows(4), np.array([True, True, False, True])).publish()
        backend.draft(3, wide, np.ones(3, bool)).publish()
        written = files(tmp_path)
        backend.draft(0, rows(4), np.zeros(4, bool)).publish()
        for path in [*tmp_path.rglob("zarr.json"), *tmp_path.glob("valid/c.3")]:
            path.write_bytes(b"")
        some = np.array([True, True, False, True])
        backend.tell_anew(4, {0: ("float16", some), 3: ("float32", np.ones(3, bool))})
        assert files(tmp_path) == written

    def test_a_block_without_its_files_is_gone(self, backend: ShardBackend) -> None:
        backend.draft(0, rows(4), np.ones(4, bool)).publish()
        backend.draft(1, rows(4), np.ones(4, bool)).publish()
        for path in backend.files(0):
            path.unlink()
        assert not backend.files(7)
        assert backend.shards() == {1}
        assert not backend.is_whole(0, 4, "float16")


class TestZarr(BackendContract):
    name = "zarr"

    def test_any_zarr_reader_opens_it(self, backend: ShardBackend, tmp_path: Path) -> None:
        backend.draft(0, rows(4), np.ones(4, bool)).publish()
        backend.draft(2, rows(3, seed=2), np.array([True, False, True])).publish()
        backend.draft(3, rows(1).astype(np.float32), np.ones(1, bool)).publish()
        group = zarr.open_group(tmp_path, mode="r")
        assert np.array_equal(group["features"][:4], rows(4))
        assert np.array_equal(group["features"][8:11], rows(3, seed=2))
        assert group["features_float32"][12].dtype == np.float32
        assert group["valid"][:].tolist() == [1] * 4 + [0] * 4 + [1, 0, 1, 0] + [2, 0, 0, 0]


class TestHDF5(BackendContract):
    name = "hdf5"

    def test_any_hdf5_reader_opens_it(self, backend: ShardBackend, tmp_path: Path) -> None:
        backend.draft(2, rows(3, seed=2), np.array([True, False, True])).publish()
        with h5py.File(tmp_path / "shards" / "000002.h5") as file:
            assert np.array_equal(file["features"][:], rows(3, seed=2))
            assert file["valid"][:].tolist() == [1, 0, 1]
            assert file["features"].chunks is None


def test_every_backend_keeps_the_contract() -> None:
    assert {cls.name for cls in BackendContract.__subclasses__()} == set(BACKENDS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=sorted(BACKENDS))
def features(tmp_path: Path, request: pytest.FixtureRequest) -> FeatureSet:
    return FeatureSet.create(tmp_path, SPEC, Layout(request.param, 4, "here"))


@pytest.fixture
def column(features: FeatureSet) -> Column:
    (made,) = features.columns_for(CLS)
    return made


def write(
    column: Column, wanted: Sequence[Row], data: np.ndarray, failed: Sequence[str] = ()
) -> list[Marker]:
    """Plan, claim and write these rows."""
    writer, markers, done = ColumnWriter(column), [], 0
    for shard in writer.plan(wanted):
        claimed = writer.claim(shard)
        assert claimed is not None
        plan = claimed.plan
        reasons = {h: Failure(f"{h}.png", "bad", "E") for h in plan.hashes if h in failed}
        some = data[done : done + len(plan.hashes)].astype(np.float32)
        markers.append(writer.write(plan, some, reasons))
        claimed.stream.close()
        done += len(plan.hashes)
    return markers


def reopened(column: Column) -> Column:
    (same,) = [c for c in open_set(column.folder.parent).columns if c.folder == column.folder]
    return same


def test_rows_are_found_by_hash_and_view(column: Column) -> None:
    data = rows(6)
    write(column, [row(h) for h in "abcdef"], data, failed=["c"])
    for opened in (column, reopened(column)):
        assert len(opened) == 5
        assert row("c") not in opened
        assert row("a", view=1) not in opened
        assert opened.failures == {row("c"): Failure("c.png", "bad", "E")}
        found = opened.gather(opened.rows([row(h) for h in "fafd"]), slice(1, None))
        assert np.array_equal(found, data[[5, 0, 5, 3], 1:])
        with pytest.raises(KeyError):
            opened.rows([row("c")])


def test_more_media_and_views_leave_what_is_there(column: Column) -> None:
    write(column, [row(h) for h in "abcde"], rows(5))
    before = files(column.folder / "markers")
    wanted = [row(h, view) for view in (0, 1, 2) for h in "abcdefg"]
    write(column, wanted, rows(20, seed=1))
    after = files(column.folder / "markers")
    assert before.items() <= after.items()
    assert len(column) == 21
    assert not ColumnWriter(column).plan(wanted)
    found = column.gather(column.rows([row("a"), row("f"), row("a", 2)]))
    assert np.array_equal(found[0], rows(5)[0])
    assert np.array_equal(found[1:], rows(20, seed=1)[[0, 9]])


def test_a_shard_is_of_one_view(column: Column) -> None:
    write(column, [row(h, view) for h in "abc" for view in (0, 1)], rows(6))
    assert [(m.view, m.hashes) for m in column.markers.values()] == [(0, [*"abc"]), (1, [*"abc"])]


def test_a_shard_without_marker_is_made_again_in_its_place(column: Column) -> None:
    write(column, [row(h) for h in "abcdefghi"], rows(9))
    before = files(column.folder)
    (column.folder / "markers" / "000001.json").unlink()
    column.refresh()
    assert row("e") not in column
    write(column, [row(h) for h in "abcdefghi"], rows(9)[4:8])
    assert files(column.folder) == before


def test_an_unfinished_plan_is_kept(column: Column) -> None:
    writer = ColumnWriter(column)
    planned = writer.plan([row(h) for h in "abcdef"])
    assert planned == {0: 4, 1: 2}
    assert writer.plan([row(h) for h in "fedcbazyx"]) == {0: 4, 1: 2, 2: 3}
    claimed = writer.claim(1)
    assert claimed is not None
    assert claimed.plan.hashes == ["e", "f"]
    claimed.stream.close()


def test_another_datasets_idle_plan_gives_up_the_rows_that_are_wanted(column: Column) -> None:
    writer = ColumnWriter(column)
    writer.plan([row(h) for h in "abcdef"])
    assert writer.plan([row("a"), row("b")]) == {0: 2}  # c and d cannot be encoded here
    assert writer.plan([row(h) for h in "abcdef"]) == {0: 2, 1: 2, 2: 2}


def test_a_claimed_shard_is_left_to_its_owner(column: Column) -> None:
    writer, other = ColumnWriter(column), ColumnWriter(reopened(column))
    wanted = [row(h) for h in "abcdef"]
    writer.plan(wanted)
    claimed = writer.claim(0)
    assert claimed is not None
    assert other.claim(0) is None
    assert other.plan([row("a"), row("b")]) == {0: 4}  # not taken apart
    assert other.plan(wanted) == {0: 4, 1: 2}
    writer.write(claimed.plan, rows(4).astype(np.float32), {})
    assert other.claim(0) is None
    assert other.is_made(0)
    assert not other.is_lost(0)
    claimed.stream.close()
    assert other.plan(wanted) == {1: 2}


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_the_claim_of_a_killed_process_is_free(column: Column) -> None:
    writer = ColumnWriter(column)
    writer.plan([row("a")])
    holder = python(
        "import sys, time; from pathlib import Path; from epalm.store.atomic import claim\n"
        "held = claim(Path(sys.argv[1])); print(bool(held), flush=True); time.sleep(60)",
        column.folder / "plans" / "000000.json",
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert writer.claim(0) is None
        holder.kill()
        holder.wait()
    claimed = writer.claim(0)
    assert claimed is not None
    claimed.stream.close()


def test_a_plan_that_outlived_its_marker_is_cleared_away(column: Column) -> None:
    write(column, [row("a")], rows(1))
    plan = column.folder / "plans" / "000000.json"
    write_atomic(plan, json.dumps({"shard": 0, "view": 0, "hashes": ["a"]}))
    assert ColumnWriter(column).plan([row("a"), row("b")]) == {1: 1}
    assert not plan.exists()


@pytest.mark.parametrize(
    "change", [{"hashes": "ab"}, {"hashes": [["a"]]}, {"view": "0"}, {"shard": 1}, {"more": 1}]
)
def test_a_plan_that_was_changed_is_made_anew(column: Column, change: dict) -> None:
    writer = ColumnWriter(column)
    writer.plan([row("a"), row("b")])
    plan = column.folder / "plans" / "000000.json"
    written = plan.read_text()
    plan.write_text(json.dumps(json.loads(written) | change))
    assert writer.plan([row("a"), row("b")]) == {0: 2}
    assert plan.read_text() == written


def test_other_files_of_somebody_are_in_nobodys_way(column: Column) -> None:
    write(column, [row("a")], rows(1))
    for path in [p for p in column.folder.rglob("*0*") if p.is_file()]:
        path.with_stem(f"{path.stem} (copy)").write_bytes(path.read_bytes())
    (column.folder / "plans" / "000000 (copy).json").write_text("{}")
    again = reopened(column)
    assert ColumnWriter(again).plan([row("a"), row("b")]) == {1: 1}
    assert again.backend.shards() == {0}


def test_a_truncated_shard_is_made_again_in_its_place(column: Column) -> None:
    write(column, [row(h) for h in "abcdef"], rows(6))
    before = files(column.folder)
    largest = {"zarr": "features/c.0.0.0.0", "hdf5": "shards/000000.h5"}
    name = next(path for path in largest.values() if (column.folder / path).is_file())
    (column.folder / name).write_bytes(b"short")
    broken = reopened(column)
    assert [m.shard for m in broken.damaged] == [0]
    assert row("a") not in broken
    assert row("e") in broken
    ColumnWriter(broken).plan_again([0])
    write(broken, [row(h) for h in "abcdef"], rows(6))
    assert files(column.folder) == before


def test_what_another_process_mended_is_left_alone(column: Column) -> None:
    write(column, [row(h) for h in "abcdef"], rows(6))
    before = files(column.folder)
    ColumnWriter(column).plan_again([0, 1, 7])
    assert files(column.folder) == before
    break_block(column)
    late = reopened(column)
    ColumnWriter(reopened(column)).plan_again([0])
    writer = ColumnWriter(column)
    claimed = writer.claim(0)
    assert claimed is not None
    ColumnWriter(late).plan_again([0])  # its marker is gone and its plan is claimed
    assert ColumnWriter(late).claim(0) is None
    writer.write(claimed.plan, rows(6)[:4].astype(np.float32), {})
    claimed.stream.close()
    ColumnWriter(late).plan_again([0])
    assert files(column.folder) == before


def break_block(column: Column) -> None:
    """Flip a byte of shard 0's features."""
    path = max(column.backend.files(0), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_shard_made_while_planning_is_not_planned_again(
    column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes at the worst moments: while plans or markers are being read."""
    other = ColumnWriter(reopened(column))
    other.plan([row(h) for h in "abcd"])
    claimed = other.claim(0)
    assert claimed is not None

    real = Column.refresh

    def finish_first(self: Column) -> None:
        monkeypatch.setattr(Column, "refresh", real)
        other.write(claimed.plan, rows(4).astype(np.float32), {})
        claimed.stream.close()
        real(self)

    monkeypatch.setattr(Column, "refresh", finish_first)
    assert ColumnWriter(column).plan([row(h) for h in "abcdwxyz"]) == {1: 4}
    assert row("a") in column


def test_a_marker_that_was_changed_counts_as_lost(column: Column) -> None:
    write(column, [row(h) for h in "abcdef"], rows(6))
    before = files(column.folder)
    path = column.folder / "markers" / "000000.json"
    for text in ("{", "[]", path.read_text().replace('"a", "b"', '"b", "a"')):
        path.write_text(text)
        broken = reopened(column)
        assert row("a") not in broken
        assert row("e") in broken
        write(broken, [row(h) for h in "abcdef"], rows(6)[:4])
        assert files(column.folder) == before


def test_a_conversion_is_noticed_by_who_waits_to_plan(column: Column) -> None:
    layout = column.folder.parent / "layout.json"
    layout.write_text(layout.read_text().replace("zarr", "x").replace("hdf5", "x"))
    with pytest.raises(EpalmError, match="was converted to x meanwhile"):
        ColumnWriter(column).plan([row("a")])


def test_a_misaligned_block_is_read_rightly(tmp_path: Path) -> None:
    """Another program may have put an odd number of bytes before the features."""
    features = FeatureSet.create(tmp_path, SPEC, Layout("hdf5", 4, "here"))
    (column,) = features.columns_for(CLS)
    write(column, [row(h) for h in "abcdef"], rows(6))
    path = column.folder / "shards" / "000000.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("odd", data=np.zeros(3, np.uint8))
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        data = rows(6)[:4]
        space = h5py.h5s.create_simple(data.shape)
        kind = h5py.h5t.py_create(data.dtype)
        dataset = h5py.h5d.create(file.id, b"features", kind, space, plan)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, data)
        assert dataset.get_offset() % 2 == 1
    broken = reopened(column)
    found = broken.gather(broken.rows([row(h) for h in "fdba"]))
    assert np.array_equal(found, rows(6)[[5, 3, 1, 0]])


def test_layers_side_by_side_only(column: Column) -> None:
    write(column, [row("a")], rows(1))
    with pytest.raises(ValueError, match="side by side"):
        column.gather(column.rows([row("a")]), slice(0, 3, 2))


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))\n"
        "from epalm.store.feature_set import open_set\n"
        "from epalm.store.marker import Row\n"
        "column = open_set(Path(sys.argv[1])).columns[0]\n"
        "print(column.gather(column.rows([Row(str(i), 0) for i in range(100)])).shape)\n"
    )
    features = FeatureSet.create(tmp_path, SPEC, Layout("zarr", 1, "here"))
    (column,) = features.columns_for(CLS)
    write(column, [row(str(i)) for i in range(100)], rows(100))
    with python(code, features.folder) as process:
        assert process.communicate()[0] == "(100, 3, 1, 5)\n"


def test_unreadable_zarr_metadata_are_made_anew(tmp_path: Path) -> None:
    backend = open_backend("zarr", tmp_path, (3, 1, 5), "float16", 4)
    backend.reserve(2)
    backend.draft(1, rows(4), np.ones(4, bool)).publish()
    written = files(tmp_path)
    for text in ("", "{", "[]", "{}", '{"shape": []}', '{"shape": ["4"]}'):
        for path in tmp_path.rglob("zarr.json"):
            path.write_text(text)
        backend.reserve(2)
        assert files(tmp_path) == written


def test_nothing_is_given_up_that_could_not_be_written_again(
    column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(column, [row(h) for h in "abcdef"], rows(6))
    break_block(column)
    before = files(column.folder)
    monkeypatch.setattr(column.backend, "reserve", lambda shards: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ColumnWriter(column).plan_again([0])
    assert files(column.folder) == before


def test_rows_that_failed_are_tried_again_in_their_place(column: Column) -> None:
    wanted = [row(h) for h in "abcdef"]
    write(column, wanted, rows(6), failed="bef")
    again = [row(h) for h in "bef"]
    # b stands beside others that did not fail; e and f stand alone
    assert ColumnWriter(column).plan(again) == {1: 2, 2: 1}
    write(column, again, rows(3), failed="bef")
    assert column.failures.keys() == set(again)
    write(column, again, rows(3, seed=1), failed="b")
    column.refresh()
    assert [m.hashes for m in column.markers.values()] == [[*"abcd"], [*"ef"], ["b"]]
    assert np.array_equal(column.gather(column.rows([row("f")])), rows(3, seed=1)[1:2])
    assert ColumnWriter(column).plan([row("b"), row("z")]) == {2: 1, 3: 1}


@pytest.mark.parametrize("refuses", [ValueError, OSError])
def test_a_system_that_refuses_many_open_files_is_asked_for_fewer(
    monkeypatch: pytest.MonkeyPatch, refuses: type[Exception]
) -> None:
    """macOS names no limit and refuses more than kern.maxfilesperproc."""
    limit = [(256, resource.RLIM_INFINITY)]

    def set_limit(kind: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > 61_440:
            raise refuses
        limit.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: limit[-1])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    allow_many_files()
    assert limit[-1] == (10_240, resource.RLIM_INFINITY)
    allow_many_files()
    assert len(limit) == 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("fcntl.flock", refuse)
    path = tmp_path / "some.lock"
    with pytest.raises(EpalmError, match=f"{path}: its file system has no locks.*store.root"):
        locked(path).__enter__()
    with pytest.raises(EpalmError, match="no locks"):
        claim(path)


def test_a_half_written_block_is_not_valid_to_zarr_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend("zarr", tmp_path, (3, 1, 5), "float16", 4)
    backend.reserve(1)
    monkeypatch.setattr("epalm.store.zarr_backend.draft_block", lambda *_: 1 / 0)
    before = files(tmp_path)
    with pytest.raises(ZeroDivisionError):
        backend.draft(0, rows(4), np.ones(4, bool))
    assert files(tmp_path) == before
    assert not zarr.open_group(tmp_path, mode="r")["valid"][:].any()


def test_a_forked_process_can_write(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np; from pathlib import Path\n"
        "from epalm.store.backend import open_backend\n"
        "backend = open_backend('hdf5', Path(sys.argv[1]), (1, 1, 2), 'float16', 4)\n"
        "def put(n):\n"
        "    rows = np.ones((4, 1, 1, 2), np.float16)\n"
        "    backend.draft(n, rows, np.ones(4, bool)).publish()\n"
        "put(0)\n"
        "child = os.fork()\n"
        "if child == 0: put(1); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    with python(code, tmp_path) as process:
        assert process.communicate(timeout=60)[0] == "0\n"


def test_values_beyond_float16_make_a_float32_shard(column: Column) -> None:
    data = rows(6).astype(np.float32)
    data[5] *= 1e6
    markers = write(column, [row(h) for h in "abcdef"], data)
    assert [m.dtype for m in markers] == ["float16", "float32"]
    for opened in (column, reopened(column)):
        found = opened.gather(opened.rows([row(h) for h in "abcdef"]))
        assert found.dtype == np.float32
        assert np.array_equal(found[4:], data[4:])
        assert np.array_equal(found[:4], data[:4].astype(np.float16))


def test_a_flipped_byte_is_noticed_when_the_shard_is_used(column: Column) -> None:
    write(column, [row(h) for h in "abcdef"], rows(6))
    (path,) = [
        p
        for p in column.folder.rglob("*")
        if str(p.relative_to(column.folder)) in ("features/c.0.0.0.0", "shards/000000.h5")
    ]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    broken = reopened(column)
    assert not broken.is_intact(0)
    assert broken.is_intact(1)
    assert np.array_equal(broken.gather(broken.rows([row("e")])), rows(6)[4:5])
    with pytest.raises(EpalmError, match="shard 0 does not have the checksum"):
        broken.gather(broken.rows([row("a")]))


def test_more_layers_are_another_column(features: FeatureSet) -> None:
    upper = replace(CLS, layers=(2,))
    (first,) = features.columns_for(upper)
    assert first.folder.name == "cls-2-2"
    assert features.covering(CLS)[1] == (0, 1)
    both = features.columns_for(CLS)
    assert [c.folder.name for c in both] == ["cls-0-1", "cls-2-2"]
    assert features.covering(CLS)[1] == ()
    assert [c.folder.name for c in features.columns_for(upper)] == ["cls-2-2"]
    assert len(open_set(features.folder).columns) == 2


def test_other_tokens_and_augmentations_are_other_columns(features: FeatureSet) -> None:
    specs = [
        CLS,
        replace(CLS, tokens="mean"),
        replace(CLS, tokens="all", token_count=17, layers=(0, 2)),
        replace(CLS, augmentation={"seed": 0}),
        replace(CLS, augmentation={"seed": 1}),
    ]
    names = {features.columns_for(spec)[0].folder.name for spec in specs}
    assert len(names) == 5
    for spec in specs:
        (found,) = features.covering(spec)[0]
        assert found.column == spec
        assert ColumnSpec.from_json(spec.canonical()) == spec


def test_catalogues_are_kept_apart_and_merged(features: FeatureSet) -> None:
    one, two = CatalogueEntry("aa", 10, 1), CatalogueEntry("bb", 20, 2)
    bad = Failure("z.png", "cannot be read", "OSError")
    features.add_to_catalogue("set/one", Catalogue("/data", {"x.png": one}, {"z.png": bad}))
    features.add_to_catalogue("set/one", Catalogue("/data", {"y.png": two}))
    features.add_to_catalogue("two", Catalogue("", {"x.png": two}))
    known = features.catalogue("set/one")
    assert known == Catalogue("/data", {"x.png": one, "y.png": two}, {"z.png": bad})
    features.add_to_catalogue("set/one", Catalogue("/data", {"z.png": one}))
    assert not features.catalogue("set/one").unreadable
    assert features.catalogue("two").media == {"x.png": two}
    assert features.catalogue("three") == Catalogue()


def test_locks_exclude_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from epalm.store.atomic import locked, write_atomic\n"
        "target = Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with locked(target.with_suffix('.lock')):\n"
        "        write_atomic(target, str(int(target.read_text()) + 1))\n"
    )
    target = tmp_path / "number"
    target.write_text("0")
    for process in [python(code, target) for _ in range(2)]:
        with process:
            assert process.wait() == 0
    assert target.read_text() == "100"


def test_fingerprint_follows_every_field() -> None:
    same = FeatureSpec.from_json(SPEC.canonical())
    assert same == SPEC
    assert same.fingerprint == SPEC.fingerprint
    tree = json.loads(SPEC.canonical())
    other = {dict: {"other": 1}, bool: False, int: 99, str: "x"}
    for key, value in tree.items():
        changed = tree | {key: other[type(value)]}
        assert FeatureSpec.from_json(json.dumps(changed)).fingerprint != SPEC.fingerprint, key


def test_a_spec_with_other_kinds_of_values_is_not_read() -> None:
    tree = json.loads(SPEC.canonical())
    for key, value in tree.items():
        for wrong in (None, [], "5" if isinstance(value, int) else 5, {"sources": value}):
            if not isinstance(wrong, type(value)):
                with pytest.raises(ValueError, match=key):
                    read_spec(json.dumps(tree | {key: wrong}))


def test_mismatch_names_the_differing_fields(features: FeatureSet, tmp_path: Path) -> None:
    tree = json.loads(SPEC.canonical())
    tree["preprocess"]["mean"] = [0.4, 0.4, 0.4]
    with pytest.raises(EpalmError) as error:
        find(tmp_path, FeatureSpec.from_json(json.dumps(tree)), "here")
    assert "preprocess.mean: [0.5, 0.5, 0.5] there, [0.4, 0.4, 0.4] wanted" in str(error.value)
    with pytest.raises(EpalmError, match="no feature set here"):
        find(tmp_path / "empty", SPEC, "here")


def test_without_the_weights_a_set_is_found_if_it_is_the_only_one(
    features: FeatureSet, tmp_path: Path
) -> None:
    tree = json.loads(SPEC.canonical())
    anyone = FeatureSpec.from_json(json.dumps(tree | {"weights": ""}))
    assert find(tmp_path, anyone, "here").spec == SPEC
    FeatureSet.create(
        tmp_path,
        FeatureSpec.from_json(json.dumps(tree | {"weights": "cd"})),
        Layout("zarr", 4, "here"),
    )
    with pytest.raises(EpalmError, match="differ only in the encoder's weights"):
        find(tmp_path, anyone, "here")


def test_without_the_weights_their_address_must_be_the_same(
    features: FeatureSet, tmp_path: Path
) -> None:
    tree = json.loads(SPEC.canonical()) | {"weights": ""}
    with pytest.raises(EpalmError, match="no feature set fits"):
        find(tmp_path, FeatureSpec.from_json(json.dumps(tree)), "there")


def test_a_wrong_backend_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match="'foo' is not one of zarr, hdf5"):
        FeatureSet.create(tmp_path, SPEC, Layout("foo", 4, "here"))
    assert not list(tmp_path.iterdir())


def test_a_set_is_brought_back_from_an_interrupted_conversion(
    features: FeatureSet, tmp_path: Path
) -> None:
    name = features.folder.name
    features.folder.rename(tmp_path / f".converted-{name}")
    assert find(tmp_path, SPEC, "here").folder == features.folder
    features.folder.rename(tmp_path / f".converted-{name}")
    assert FeatureSet.create(tmp_path, SPEC, features.layout).layout == features.layout


def test_a_set_is_brought_back_from_under_a_lock(features: FeatureSet, tmp_path: Path) -> None:
    """Another process may ask for a lock of the set while conversion moves folders."""
    folder, moved = features.folder, tmp_path / f".converted-{features.folder.name}"
    folder.rename(moved)
    with pytest.raises(EpalmError, match="was moved or deleted meanwhile"):
        features.add_to_catalogue("one", Catalogue("/data"))
    assert not folder.exists()
    folder.mkdir()
    (folder / ".lock").touch()
    assert find(tmp_path, SPEC, "here").layout == features.layout
    assert not moved.exists()
    folder.rename(moved)
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(EpalmError, match=f"the set in {moved}: move away what is in the former"):
        open_set(folder)


def test_a_set_made_while_conversion_moves_it_is_the_old_one(
    features: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is moved away just after another process has looked for it."""
    features.write_catalogue("one", Catalogue("/data"))
    real = feature_set.finish_conversion

    def look_then_lose(folder: Path) -> None:
        monkeypatch.setattr(feature_set, "finish_conversion", real)
        real(folder)
        folder.rename(folder.with_name(f".converted-{folder.name}"))

    monkeypatch.setattr(feature_set, "finish_conversion", look_then_lose)
    again = FeatureSet.create(tmp_path, SPEC, Layout("zarr", 99, "there"))
    assert (again.layout, again.datasets()) == (features.layout, ["one"])


@pytest.mark.parametrize("content", ["", "{", None])
def test_a_damaged_spec_is_written_again(
    features: FeatureSet, tmp_path: Path, content: str | None
) -> None:
    path = features.folder / "spec.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(EpalmError, match="no readable spec.json; `extract`.* writes it again"):
        open_set(features.folder)
    assert f"unreadable: {features.folder}: not a feature set" in table_of_sets(tmp_path)
    again = FeatureSet.create(tmp_path, SPEC, Layout("zarr", 99, "there"))
    assert (again.spec, again.layout) == (SPEC, features.layout)


def test_the_set_that_one_is_in(features: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(features.folder)
    assert open_set(Path()).spec == SPEC


def test_what_is_no_set_is_not_to_be_deleted(features: FeatureSet, tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match=f"the sets in it are {features.folder.name}"):
        open_set(tmp_path)
    for change in ({"shard_rows": 0}, {"shard_rows": "4"}, {"backend": "foo"}):
        layout = json.dumps({"backend": "zarr", "shard_rows": 4, "weights_address": "x"} | change)
        (features.folder / "layout.json").write_text(layout)
        with pytest.raises(EpalmError, match="layout.json: not readable .* write it anew"):
            open_set(features.folder)


def test_damaged_small_files(features: FeatureSet) -> None:
    features.write_catalogue("one", Catalogue("/data", {"x": CatalogueEntry("aa", 1, 1)}))
    (path,) = (features.folder / "catalogue").iterdir()
    entry = {"root": "", "media": {"x": ["aa", 1, 1]}, "unreadable": {"y": ["y", "bad", "E"]}}
    changed = [
        entry | change
        for change in (
            {"root": None}, {"media": []}, {"media": {"x": [["aa"], 1, 1]}},
            {"media": {"x": ["aa", 1]}}, {"unreadable": {"y": ["y", "bad", None]}},
        )
    ]  # fmt: skip
    for text in ("{", "[]", '{"root": ""}', *map(json.dumps, changed)):
        path.write_text(text)
        with pytest.raises(EpalmError, match="not a readable catalogue"):
            features.catalogue("one")
    (features.folder / "extraction.json").write_text("{")
    assert features.last_extraction() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": []}, "layers"),
        ({"layers": "x"}, "layers"),
        ({"layers": [[0]]}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"layers": [0, 1]}, "describes cls-0-1"),
        ({"tokens": 1}, "tokens"),
        ({"token_count": "1"}, "token_count"),
        ({"augmentation": []}, "augmentation"),
        ({"more": 1}, "more"),
    ],
)
def test_a_changed_column_spec(column: Column, change: dict, words: str) -> None:
    path = column.folder / "column.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EpalmError, match=f"its column.json is not readable .*{words}"):
        open_set(column.folder.parent)


def test_a_changed_column_is_not_replaced(column: Column) -> None:
    path = column.folder / "column.json"
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written) | {"token_count": 5}))
    with pytest.raises(EpalmError, match=f"{path}: was changed; make it {re.escape(written)}"):
        open_set(column.folder.parent).columns_for(CLS)


def test_names_of_datasets_do_not_clash(features: FeatureSet) -> None:
    for number, name in enumerate(("a/b", "a_b", "a b", "a%2Fb")):
        features.write_catalogue(name, Catalogue(str(number)))
    assert {n: features.catalogue(n).root for n in features.datasets()} == {
        "a/b": "0", "a_b": "1", "a b": "2", "a%2Fb": "3"
    }  # fmt: skip


def test_unreadable_sets_are_in_nobodys_way(features: FeatureSet, tmp_path: Path) -> None:
    other = tmp_path / "vit_of_another_version"
    other.mkdir()
    (other / "spec.json").write_text('{"version": 99}')
    assert find(tmp_path, SPEC, "here").folder == features.folder
    (features.folder / "layout.json").write_text("{")
    with pytest.raises(EpalmError, match="layout.json: not readable"):
        find(tmp_path, SPEC, "here")


def test_a_log_cut_by_a_crash_loses_its_last_line_only(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
    assert read_json_lines(log) == [{"a": 1}, {"a": 2}]
    assert read_json_lines(tmp_path / "gone") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"b": 1.5}', "has no field 'a'"),
        (b'{"a": "1"}', "a cannot be '1'"),
        (b'{"a": true}', "a cannot be True"),
        (b'{"a": 1, "b": {}}', "b cannot be {}"),
    ],
)
def test_a_log_that_was_changed_is_refused(tmp_path: Path, line: bytes, words: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"a": 1, "b": 2.5}\n\n' + line + b'\n{"a": 2')
    with pytest.raises(EpalmError, match=f"log.jsonl, line 3: {words}.*; mend the line or delete"):
        read_json_lines(log, {"a": int}, {"b": (int, float)})


def test_only_a_log_may_be_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a"')
    with pytest.raises(EpalmError, match="line 2: not valid JSON"):
        read_json_lines(log, whole=True)


def test_atomic_write_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    with pytest.raises(TypeError):
        write_atomic(target, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
