"""The store: the contract every backend keeps, and feature sets over it."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from epalm.errors import EpalmError
from epalm.store.atomic import read_json_lines, write_atomic
from epalm.store.backend import ShardBackend
from epalm.store.feature_set import CatalogueEntry, FeatureSet, Layout, find
from epalm.store.spec import FeatureSpec
from epalm.store.zarr_backend import ZarrBackend

SPEC = FeatureSpec(
    modality="image",
    encoder="timm/vit_tiny_patch16_224",
    encoder_arguments={},
    encoder_parameters=5_000_000,
    weights="ab" * 32,
    layers=3,
    tokens="cls",
    dim=5,
    final_norm=True,
    compute="float32",
    preprocess={"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5]},
    view=0,
    dtype="float16",
)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 1, 5)).astype(np.float16)


class BackendContract:
    """What a backend must do; subclass it and give `backend`."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> ShardBackend:
        raise NotImplementedError  # each backend's subclass gives its own

    def test_reads_back_what_was_written(self, backend: ShardBackend) -> None:
        first, second = rows(4), rows(2, seed=1)
        backend.write(0, first, np.ones(4, bool))
        backend.write(1, second, np.array([True, False]))
        assert np.array_equal(backend.map(0), first)
        assert np.array_equal(backend.map(1)[:2], second)
        assert not backend.map(1)[2:].any()

    def test_mapped_shards_are_read_only(self, backend: ShardBackend) -> None:
        backend.write(0, rows(4), np.ones(4, bool))
        with pytest.raises(ValueError, match="read-only"):
            backend.map(0)[0] = 0

    def test_checksum_is_of_the_values(self, backend: ShardBackend) -> None:
        sums = [
            backend.write(n, rows(4, seed), np.ones(4, bool)) for n, seed in enumerate((0, 0, 1))
        ]
        assert sums[0] == sums[1] != sums[2]

    def test_whole_only_when_whole(self, backend: ShardBackend, tmp_path: Path) -> None:
        assert not backend.is_whole(0)
        backend.write(0, rows(4), np.ones(4, bool))
        assert backend.is_whole(0)
        blocks = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"]
        largest = max(blocks, key=lambda p: p.stat().st_size)
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size - 1)
        assert not backend.is_whole(0)


class TestZarr(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> ShardBackend:
        return ZarrBackend(tmp_path, (3, 1, 5), "float16", 4)

    def test_any_zarr_reader_opens_it(self, backend: ShardBackend, tmp_path: Path) -> None:
        backend.write(0, rows(4), np.ones(4, bool))
        backend.write(2, rows(3, seed=2), np.array([True, False, True]))
        group = zarr.open_group(tmp_path, mode="r")
        assert np.array_equal(group["features"][:4], rows(4))
        assert np.array_equal(group["features"][8:11], rows(3, seed=2))
        assert group["valid"][:].tolist() == [1] * 4 + [0] * 4 + [1, 0, 1, 0]


@pytest.fixture
def features(tmp_path: Path) -> FeatureSet:
    return FeatureSet.create(tmp_path, SPEC, Layout("zarr", 4, "here"))


def test_appended_media_are_found_by_hash(features: FeatureSet, tmp_path: Path) -> None:
    data = rows(6)
    with features.writing() as writer:
        writer.append(list("abcd"), data[:4], np.array([True, True, False, True]))
        writer.append(list("ef"), data[4:], np.ones(2, bool))
    for opened in (features, find(tmp_path, SPEC, "here")):
        assert len(opened) == 5
        assert "c" not in opened
        found = opened.gather(opened.rows(["f", "a", "f", "d"]), slice(1, None))
        assert np.array_equal(found, data[[5, 0, 5, 3], 1:])
        with pytest.raises(KeyError):
            opened.rows(["c"])


def test_a_shard_without_marker_does_not_count(features: FeatureSet, tmp_path: Path) -> None:
    with features.writing() as writer:
        writer.append(["a"], rows(1), np.ones(1, bool))
    features.backend.write(1, rows(4), np.ones(4, bool))  # killed before its marker
    reopened = find(tmp_path, SPEC, "here")
    assert len(reopened) == 1
    with reopened.writing() as writer:
        writer.append(["b"], rows(1, seed=3), np.ones(1, bool))
    assert np.array_equal(reopened.gather(reopened.rows(["b"]), slice(None)), rows(1, seed=3))


def test_a_truncated_shard_is_dropped_and_its_number_not_reused(
    features: FeatureSet, tmp_path: Path
) -> None:
    with features.writing() as writer:
        writer.append(["a"], rows(1), np.ones(1, bool))
        writer.append(["b"], rows(1), np.ones(1, bool))
    (features.folder / "features" / "c" / "0" / "0" / "0" / "0").write_bytes(b"short")
    reopened = find(tmp_path, SPEC, "here")
    assert reopened.damaged == [0]
    assert "a" not in reopened
    assert "b" in reopened
    with reopened.writing() as writer:
        assert writer.drop_damaged() == 1
        writer.append(["a"], rows(1), np.ones(1, bool))
    assert sorted(p.name for p in (features.folder / "markers").iterdir()) == [
        "000001.json",
        "000002.json",
    ]


def test_values_beyond_float16_are_refused(features: FeatureSet) -> None:
    with features.writing() as writer, pytest.raises(EpalmError, match="store.dtype=float32"):
        writer.append(["a"], rows(1).astype(np.float32) * 1e6, np.ones(1, bool))
    assert len(features) == 0


def test_two_writers_exclude_each_other(features: FeatureSet, tmp_path: Path) -> None:
    other = find(tmp_path, SPEC, "here")
    with (
        features.writing(),
        pytest.raises(EpalmError, match="another extraction is writing"),
        other.writing(),
    ):
        pass


def test_catalogues_are_kept_apart_and_merged(features: FeatureSet) -> None:
    one, two = CatalogueEntry("aa", 10, 1), CatalogueEntry("bb", 20, 2)
    with features.writing() as writer:
        writer.catalogue("set/one", {"x.png": one})
        writer.catalogue("set/one", {"y.png": two})
        writer.catalogue("two", {"x.png": two})
    assert features.catalogue("set/one") == {"x.png": one, "y.png": two}
    assert features.catalogue("two") == {"x.png": two}
    assert features.catalogue("three") == {}


def test_fingerprint_follows_every_field() -> None:
    same = FeatureSpec.from_json(SPEC.canonical())
    assert same == SPEC
    assert same.fingerprint == SPEC.fingerprint
    tree = json.loads(SPEC.canonical())
    for key, value in tree.items():
        changed = tree | {key: {"other": 1} if isinstance(value, dict) else f"{value}x"}
        assert FeatureSpec.from_json(json.dumps(changed)).fingerprint != SPEC.fingerprint, key


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


def test_unreadable_sets_are_in_nobodys_way(features: FeatureSet, tmp_path: Path) -> None:
    other = tmp_path / "vit_of_another_version"
    other.mkdir()
    (other / "spec.json").write_text('{"version": 99}')
    assert find(tmp_path, SPEC, "here").folder == features.folder
    (features.folder / "layout.json").write_text("{")
    with pytest.raises(EpalmError, match="not a readable feature set"):
        find(tmp_path, SPEC, "here")


def test_a_log_cut_by_a_crash_loses_its_last_line_only(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
    assert read_json_lines(log) == [{"a": 1}, {"a": 2}]
    assert read_json_lines(tmp_path / "gone") == []


def test_a_writer_sees_what_another_wrote_before_it(features: FeatureSet, tmp_path: Path) -> None:
    late = find(tmp_path, SPEC, "here")
    with features.writing() as writer:
        writer.append(["a"], rows(1), np.ones(1, bool))
    with late.writing() as writer:
        assert "a" in late
        writer.append(["b"], rows(1, seed=1), np.ones(1, bool))
    assert len(find(tmp_path, SPEC, "here")) == 2


def test_atomic_write_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    with pytest.raises(TypeError):
        write_atomic(target, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
