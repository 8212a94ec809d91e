"""`cache …`: looking at feature sets, checking them, mending what is broken."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.extract.lookup import open_features
from epalm.store import conversion
from epalm.store.backend import BACKENDS
from epalm.store.feature_set import FeatureSet, find, open_set, specs
from epalm.store.marker import Row
from epalm.store.writer import ColumnWriter

Toy = Callable[..., Path]
Cli = Callable[..., Result]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("extraction.json", ".lock", ".plans.lock")
    }


def only_set(tmp_path: Path) -> FeatureSet:
    (folder,) = specs(tmp_path / "features")
    return open_set(folder)


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output


def break_shard(features: FeatureSet, shard: int) -> None:
    """Flip a byte of a shard's features."""
    path = max(features.columns[0].backend.files(shard), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_ls_and_info_say_what_is_there(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy(encoder={"views": {"count": 2}})
    assert "no feature sets" in ok(cli("cache", "ls", tmp_path))
    ok(cli("extract", recipe))
    table = ok(cli("cache", "ls", tmp_path / "features")).splitlines()
    assert table[0].split() == ["set", "modality", "backend", "column", "rows", "failed", "shards",
                                "size"]  # fmt: skip
    by_column = {line.split()[3]: line.split() for line in table[1:]}
    assert len(by_column) == 2
    assert by_column["cls-0-5"][4:7] == ["12", "0", "3"]
    (augmented,) = by_column.keys() - {"cls-0-5"}
    assert by_column[augmented][4:7] == ["16", "0", "4"]  # 2 views of 8 training images
    for given in (recipe, only_set(tmp_path).folder):
        page = ok(cli("cache", "info", given))
        for words in ("encoder layers: 0, 1, 2, 3, 4, 5", "view 1: 8, view 2: 8", "12 media",
                      "crop_scale", "'input_size': [3, 32, 32]"):  # fmt: skip
            assert words in page


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_verify_finds_and_repair_mends(cli: Cli, toy: Toy, tmp_path: Path, backend: str) -> None:
    recipe = toy(store={"backend": backend})
    ok(cli("extract", recipe))
    before = files(tmp_path / "features")
    assert "3 shards, all as they were written" in ok(cli("cache", "verify", recipe))
    features = only_set(tmp_path)
    break_shard(features, 0)
    truncated = max(features.columns[0].backend.files(2), key=lambda p: p.stat().st_size)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    refused(
        cli("cache", "verify", features.folder),
        "2 broken shards",
        "cls-0-5, shard 0: its bytes are not those that were written",
        "cls-0-5, shard 2: its file is truncated or gone",
    )
    output = ok(cli("cache", "repair", recipe))
    assert "2 broken shards" in output
    assert "extract: 8 media" in output
    assert files(tmp_path / "features") == before
    assert "0 broken shards" in ok(cli("cache", "repair", recipe))


def test_deep_verification_encodes_again(
    cli: Cli, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(encoder={"views": {"count": 1}})
    ok(cli("extract", recipe))
    output = ok(cli("cache", "verify", recipe, "--deep", "--sample", "5"))
    assert output.count("5 rows encoded again") == 2
    refused(cli("cache", "verify", only_set(tmp_path).folder, "--deep"), "needs the recipe")

    from epalm.extract.encoder import Encoder

    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *args: real(*args) * 1.05)
    refused(cli("cache", "verify", recipe, "--deep"), "other features than the encoder makes now")


def test_diff_names_fields_and_columns(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    one = shutil.copy(toy(), tmp_path / "one.yaml")
    ok(cli("extract", one))
    other = toy(encoder={"final_norm": False, "layers": [3, 4, 5], "preprocess": "reference"})
    output = ok(cli("cache", "diff", one, other))
    for words in ("final_norm: True in", "preprocess.crop_mode: 'center' in", "'squash' in",
                  "column cls-0-5: only in", "column cls-3-5: only in"):  # fmt: skip
        assert words in output
    assert ok(cli("cache", "diff", one, only_set(tmp_path).folder)) == "the same features\n"
    refused(cli("cache", "diff", one, tmp_path), "not a feature set")


def test_estimate_counts_and_measures(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy(encoder={"views": {"count": 3}})
    output = ok(cli("cache", "estimate", recipe, "--sample", "4"))
    assert "cls-0-5: 12 rows of 288 B" in output
    assert ": 24 rows of 288 B" in output  # 3 views of 8 training images
    assert "rows/s, measured here" in output
    assert not (tmp_path / "features").exists()
    ok(cli("extract", recipe))
    assert "nothing to do" in ok(cli("cache", "estimate", recipe))
    more = toy(encoder={"views": {"count": 4}})
    assert ": 8 rows of 288 B" in ok(cli("cache", "estimate", more))


def test_estimate_sees_layers_and_failures(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "images" / "0.png").write_bytes(b"broken")
    skip = {"data": {"bad_media": "skip"}}
    assert "12 rows" in ok(cli("cache", "estimate", toy(**skip), "--sample", "2"))
    ok(cli("extract", toy(**skip, encoder={"layers": [4, 5]})))
    assert "nothing to do" in ok(cli("cache", "estimate", toy(**skip, encoder={"layers": [4, 5]})))
    assert "cls-0-3: 12 rows of 192 B" in ok(cli("cache", "estimate", toy(**skip)))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_convert_there_and_back(cli: Cli, toy: Toy, tmp_path: Path, backend: str) -> None:
    recipe = toy(store={"backend": backend})
    ok(cli("extract", recipe))
    loaded = load_recipe(recipe)
    dataset = load_dataset(loaded)
    before, stored = files(tmp_path / "features"), open_features(loaded, dataset)[0]
    expected = stored.fetch(list(dataset.media))
    (other,) = set(BACKENDS) - {backend}
    assert other in ok(cli("cache", "convert", recipe, "--to", other))
    assert only_set(tmp_path).layout.backend == other
    assert torch.equal(open_features(loaded, dataset)[0].fetch(list(dataset.media)), expected)
    assert "nothing to do" in ok(cli("extract", recipe))
    assert f"is {other} already" in ok(cli("cache", "convert", recipe, "--to", other))
    ok(cli("cache", "convert", recipe, "--to", backend))
    after = files(tmp_path / "features")
    assert after == before
    refused(cli("cache", "convert", recipe, "--to", "lmdb"), "'lmdb' is not one of zarr, hdf5")
    break_shard(only_set(tmp_path), 1)
    refused(cli("cache", "convert", recipe, "--to", other), "shard 1 is broken")
    assert only_set(tmp_path).layout.backend == backend
    assert not list((tmp_path / "features").glob(".conv*"))


@pytest.mark.parametrize("place", ["copying", "first rename", "second rename", "removal"])
def test_an_interrupted_conversion_leaves_nothing_behind(
    cli: Cli, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    before, name = files(tmp_path / "features"), only_set(tmp_path).folder.name
    owner, function, argument = {
        "copying": (conversion, "_copy_shard", None),
        "first rename": (Path, "rename", name),
        "second rename": (Path, "rename", f".converting-{name}"),
        "removal": (shutil, "rmtree", f".converted-{name}"),
    }[place]
    real = getattr(owner, function)

    def interrupt(first: object, *rest: object, **named: object) -> object:
        path = Path(str(first))
        if argument is None or (path.name == argument and path.exists()):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return real(first, *rest, **named)

    monkeypatch.setattr(owner, function, interrupt)
    result = cli("cache", "convert", recipe, "--to", "hdf5")
    assert result.exit_code == 130, result.output
    assert not list((tmp_path / "features").glob(".conv*"))
    assert only_set(tmp_path).layout.backend == ("hdf5" if place == "removal" else "zarr")
    ok(cli("cache", "convert", recipe, "--to", "zarr"))
    assert files(tmp_path / "features") == before


def test_a_lock_taken_while_folders_change_places_loses_nothing(
    cli: Cli, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that makes the folder for it."""
    recipe = toy()
    ok(cli("extract", recipe))
    before, folder = files(tmp_path / "features"), only_set(tmp_path).folder
    real = Path.rename

    def rename_and_lock(self: Path, target: Path) -> Path:
        moved = real(self, target)
        if self == folder:
            folder.mkdir()
            (folder / ".lock").touch()
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_lock)
    refused(cli("cache", "convert", recipe, "--to", "hdf5"), "it is as it was")
    monkeypatch.undo()
    assert only_set(tmp_path).layout.backend == "zarr"
    assert files(tmp_path / "features") == before


def test_gc_deletes_what_a_killed_conversion_left(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    before, folder = files(tmp_path / "features"), only_set(tmp_path).folder
    for kind in ("converted", "converting"):
        shutil.copytree(folder, folder.with_name(f".{kind}-{folder.name}"))
    planned = ok(cli("cache", "gc", recipe, "--dry-run"))
    assert f"../.converted-{folder.name}/cls-0-5/markers/000000.json" in planned
    assert ok(cli("cache", "gc", recipe)).splitlines()[:-1] == planned.splitlines()[:-1]
    assert not list((tmp_path / "features").glob(".conv*"))
    assert files(tmp_path / "features") == before


def test_what_a_marker_cannot_say_is_not_converted(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    marker = only_set(tmp_path).columns[0].marker_path(1)
    marker.write_text("{")
    before = files(tmp_path / "features")
    refused(cli("cache", "convert", recipe, "--to", "hdf5"), str(marker), "`cache verify`")
    assert files(tmp_path / "features") == before


def test_gc_deletes_what_nothing_refers_to(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy(store={"shard_rows": 1})
    ok(cli("extract", recipe))
    features = only_set(tmp_path)
    assert "0 files" in ok(cli("cache", "gc", recipe))
    image = tmp_path / "images" / "3.png"
    Image.new("RGB", (64, 64), "red").save(image)
    (tmp_path / "images" / "5.png").unlink()
    ok(cli("extract", recipe, "--set", "data.bad_media=skip"))
    (features.columns[0].folder / "markers" / "000007.json").unlink()
    (features.folder / ".left.partial").write_text("half")
    planned = ok(cli("cache", "gc", recipe, "--dry-run"))
    removed = ok(cli("cache", "gc", recipe, "--dry-run", "--removed"))
    assert len(open_set(features.folder).columns[0]) == 12
    done = ok(cli("cache", "gc", recipe, "--removed"))
    assert "1 media are forgotten" in done
    assert "1 media would be forgotten" in removed
    for name in ("markers/000003.json", ".left.partial"):  # the old content of 3.png
        assert name in planned
        assert name in done
    assert "markers/000005.json" not in planned
    assert "markers/000005.json" in done
    assert "markers/000005.json" in removed
    left = open_set(features.folder).columns[0]
    assert len(left) == 10
    assert left.backend.shards() == left.markers.keys()


def test_gc_does_not_take_all_for_garbage(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    before = files(tmp_path / "features")
    for path in (tmp_path / "images").iterdir():
        path.rename(tmp_path / path.name)
    refused(cli("cache", "gc", recipe, "--removed"), "all 12 media files", "mounted?")
    catalogue = only_set(tmp_path).folder / "catalogue" / "toy.json"
    catalogue.rename(tmp_path / "away")
    refused(cli("cache", "gc", recipe), "has no catalogue")
    (tmp_path / "away").rename(catalogue)
    assert files(tmp_path / "features") == before


def test_two_datasets_of_one_name_are_told_apart(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(tmp_path / "images", other / "images")
    shutil.copy(tmp_path / "toy.jsonl", other)
    shutil.copy(other / "images" / "2.png", other / "images" / "1.png")
    moved = ("--set", f"data.path={other / 'toy.jsonl'}")
    before = files(tmp_path / "features")
    refused(
        cli("extract", recipe, *moved),
        f"data.name: 'toy' already stands for the media in {tmp_path}, where images/1.png is",
    )
    text = (other / "toy.jsonl").read_text()
    (other / "images").rename(other / "pictures")
    (other / "toy.jsonl").write_text(text.replace("images/", "pictures/"))
    refused(cli("extract", recipe, *moved), "none of which it has; give the dataset another name")
    assert files(tmp_path / "features") == before
    shutil.copy(tmp_path / "images" / "1.png", other / "pictures")
    assert "all 12 media are in" in ok(cli("extract", recipe, *moved, "--set", "data.name=other"))
    shutil.rmtree(tmp_path / "images")  # moved, not another dataset: the name stays
    (tmp_path / "toy.jsonl").unlink()
    (tmp_path / "other").rename(tmp_path / "moved")
    moved = ("--set", f"data.path={tmp_path / 'moved' / 'toy.jsonl'}")
    assert "all 12 media are in" in ok(cli("extract", recipe, *moved, "--set", "data.name=other"))


def test_repair_mends_what_the_recipe_keeps(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    whole = toy()
    ok(cli("extract", toy(data={"limits": {"train": 4}})))
    mean = toy(encoder={"tokens": "mean"})
    ok(cli("extract", mean))
    for column in only_set(tmp_path).columns:
        path = max(column.backend.files(0), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1])
    output = ok(cli("cache", "repair", toy()))
    assert "1 broken shards" in output
    assert "mean-0-5 has broken shards too" in output
    assert "extract: 4 media" in output  # not the four that were never extracted
    refused(cli("cache", "verify", whole), "1 broken shards", "mean-0-5, shard 0")


def test_what_other_readers_are_told_is_verified(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    column = only_set(tmp_path).columns[0].folder
    before = files(tmp_path / "features")
    (column / "valid" / "c.1").write_bytes(bytes(4))
    refused(cli("cache", "verify", recipe), "cls-0-5, shard 1: `valid` or metadata")
    metadata = column / "features" / "zarr.json"
    text = metadata.read_text()
    metadata.write_text("{")
    refused(cli("cache", "verify", recipe), "shard 0: `valid` or metadata")
    metadata.write_text(text)
    assert "1 broken shards" in ok(cli("cache", "repair", recipe))
    assert files(tmp_path / "features") == before


@pytest.mark.parametrize("damage", ["metadata", "mask", "column"])
def test_intact_features_are_not_given_up(cli: Cli, toy: Toy, tmp_path: Path, damage: str) -> None:
    """After a power failure, say; and the media need not be here."""
    recipe = toy()
    ok(cli("extract", recipe))
    before = files(tmp_path / "features")
    (tmp_path / "images").rename(tmp_path / "away")
    column = only_set(tmp_path).columns[0].folder
    if damage == "mask":
        (column / "valid" / "c.0").unlink()
    elif damage == "metadata":
        (column / "features" / "zarr.json").write_text("")
        (column / "valid" / "zarr.json").unlink()
    else:
        (column / "zarr.json").write_text("")
    refused(cli("cache", "verify", recipe), "`valid` or metadata is not as it was written")
    output = ok(cli("cache", "repair", recipe))
    assert "with intact features: `valid` and metadata are written anew" in output
    assert "extract:" not in output
    assert files(tmp_path / "features") == before
    ok(cli("cache", "verify", recipe))


def test_unreadable_metadata_are_not_in_the_way_of_an_extraction(
    cli: Cli, toy: Toy, tmp_path: Path
) -> None:
    ok(cli("extract", toy()))
    before = files(tmp_path / "features")
    for path in only_set(tmp_path).folder.rglob("zarr.json"):
        path.write_text("")
    only_set(tmp_path).columns[0].marker_path(1).unlink()
    assert "extract: 4 media" in ok(cli("extract", toy()))
    assert files(tmp_path / "features") == before


def test_a_broken_shard_stays_until_its_media_are_here(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    whole = files(tmp_path / "features")
    break_shard(only_set(tmp_path), 0)
    break_shard(only_set(tmp_path), 1)
    before = files(tmp_path / "features")
    image = tmp_path / "images" / "2.png"
    image.rename(tmp_path / "away.png")
    refused(
        cli("cache", "repair", recipe),
        "shard 0 stays as it is: 1 of its media are not here or not the recipe's, images/2.png",
        "bring the media back",
    )
    now = files(tmp_path / "features")
    shard = {name for name in whole if "c.0" in name or "000000" in name}
    assert len(shard) == 3
    assert {name: now[name] for name in shard} == {name: before[name] for name in shard}
    refused(cli("cache", "verify", recipe), "1 broken shards", "shard 0")
    (tmp_path / "away.png").rename(image)
    assert "extract: 4 media" in ok(cli("cache", "repair", recipe))
    ok(cli("cache", "verify", recipe))

    # what no dataset has any more holds nothing up
    break_shard(only_set(tmp_path), 0)
    shutil.copy(tmp_path / "images" / "3.png", image)
    assert "extract: 3 media" in ok(cli("cache", "repair", recipe))
    assert "nothing to do" in ok(cli("extract", recipe))


def two_sources(toy: Toy, tmp_path: Path, **encoder: object) -> Path:
    """A recipe whose source `also.second` has four other images, and maybe another encoder."""
    path = toy(encoder={"workers": 1})
    lines = (tmp_path / "toy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "second").mkdir()
    for number in range(4):
        place = tmp_path / "second" / f"{number}.png"
        Image.new("RGB", (40, 40), (60 * number, 90, 0)).save(place)
    text = "".join(line for line in lines if re.search(r"images/[0-3]\.png", line))
    (tmp_path / "second.jsonl").write_text(text.replace("images/", "second/"))
    tree = yaml.safe_load(path.read_text())
    data = {"kind": "jsonl", "path": str(tmp_path / "second.jsonl")}
    tree["also"] = {"second": {"data": data, "encoder": tree["encoder"] | encoder}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_source_is_looked_after(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = two_sources(toy, tmp_path, final_norm=False)
    counted = ok(cli("cache", "estimate", recipe, "--sample", "2"))
    assert "source main:\ncls-0-5: 12 rows" in counted
    assert "source second:\ncls-0-5: 4 rows" in counted
    ok(cli("extract", recipe))
    before = files(tmp_path / "features")
    (second,) = [s for s in map(open_set, specs(tmp_path / "features")) if not s.spec.final_norm]
    page = ok(cli("cache", "info", recipe))
    assert "dataset toy: 12 media" in page and "dataset second: 4 media" in page
    assert ok(cli("cache", "verify", recipe, "--deep", "--sample", "2")).count("2 rows") == 2
    break_shard(second, 0)
    refused(cli("cache", "verify", recipe), f"{second.folder}: 1 broken shards")
    assert "source second:\nextract: 4 media" not in ok(cli("extract", recipe))
    output = ok(cli("cache", "repair", recipe))
    assert f"{second.folder}: 1 broken shards" in output
    assert "extract: 4 media" in output
    assert files(tmp_path / "features") == before
    assert ok(cli("cache", "convert", recipe, "--to", "hdf5")).count(": hdf5") == 2
    for found in specs(tmp_path / "features"):
        (found / ".left.partial").write_text("half")
    assert ok(cli("cache", "gc", recipe)).count(".left.partial") == 2
    (tmp_path / "second.jsonl").unlink()
    refused(cli("cache", "estimate", recipe), "source second: data.path")


def test_sources_of_one_set_are_repaired_together(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = shutil.copy(two_sources(toy, tmp_path), tmp_path / "both.yaml")
    ok(cli("extract", recipe))
    before = files(tmp_path / "features")
    for shard in (1, 3):
        break_shard(only_set(tmp_path), shard)
    refused(cli("cache", "verify", recipe), "2 broken shards")
    output = ok(cli("cache", "repair", recipe))
    assert "source main and second:" in output
    assert output.count("extract: 4 media") == 2
    assert files(tmp_path / "features") == before
    # a recipe of one of them leaves the other's alone
    break_shard(only_set(tmp_path), 3)
    refused(cli("cache", "repair", toy()), "shard 3 stays as it is: 4 of its media", "second/0.png")
    refused(cli("cache", "verify", recipe), "1 broken shards")
    ok(cli("cache", "repair", recipe))
    assert files(tmp_path / "features") == before


def test_features_without_media_are_found(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    assert "all 12 media are in" in ok(cli("extract", recipe))


def test_media_that_go_away_meanwhile_are_not_called_broken(
    cli: Cli, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy()
    images, away = tmp_path / "images", tmp_path / "away"
    real = ColumnWriter.plan

    def plan_then_lose(self: ColumnWriter, rows: Sequence[Row]) -> dict[int, int]:
        found = real(self, rows)
        images.rename(away)
        return found

    monkeypatch.setattr(ColumnWriter, "plan", plan_then_lose)
    refused(cli("extract", recipe), "cannot be read any more", "run `extract` again")
    monkeypatch.undo()
    away.rename(images)
    assert "extract: 12 media" in ok(cli("extract", recipe))


def test_mistakes(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    refused(cli("cache", "ls", tmp_path / "nowhere"), "no such folder")
    refused(
        cli("cache", "info", tmp_path / "nowhere"), "neither a feature set's folder nor a recipe"
    )
    refused(cli("cache", "info", recipe), "no feature set here")
    ok(cli("extract", recipe))
    folder = only_set(tmp_path).folder
    assert folder.name in ok(cli("cache", "ls", folder))
    for command in ("verify", "estimate"):
        refused(cli("cache", command, recipe, "--sample", "0"), "0 is not in the range")
    refused(cli("cache", "verify", folder, "--set", "seed=1"), "is a feature set, not a recipe")
    (folder / "spec.json").write_text("")
    for root in (tmp_path / "features", folder):
        assert "`extract`" in ok(cli("cache", "ls", root))
    refused(cli("train", recipe), "run `extract` with this recipe")
    assert "nothing to do" in ok(cli("extract", recipe))
    ok(cli("cache", "verify", recipe))
    (folder / "layout.json").unlink()
    assert "unreadable: " in ok(cli("cache", "ls", tmp_path / "features"))


def test_removed_media_are_reported(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    data = tmp_path / "toy.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(line for line in lines if "images/7.png" not in line))
    assert "gone" not in ok(cli("extract", recipe))
    (tmp_path / "images" / "7.png").unlink()
    assert "1 media that were extracted before are gone, images/7.png" in ok(cli("extract", recipe))


def test_failed_media_are_tried_again_on_request(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy(data={"bad_media": "skip"})
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    assert "1 failed" in ok(cli("extract", recipe))
    assert "nothing to do" in ok(cli("extract", recipe))
    assert len(only_set(tmp_path).failures()) == 1
    output = ok(cli("extract", recipe, "--retry-failed"))
    assert "nothing to do" in output  # tried, and failed again
    for _ in range(2):  # and again, in the same place
        ok(cli("extract", recipe, "--retry-failed"))
        column = only_set(tmp_path).columns[0]
        assert sorted(len(m.hashes) for m in column.markers.values()) == [1, 4, 4, 4]
    assert "nothing to do" in ok(cli("extract", recipe))
    (image,) = {f["media"] for f in only_set(tmp_path).failures()}
    assert image == "images/1.png"


def test_more_layers_and_tokens_extend_the_set(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    ok(cli("extract", toy(encoder={"layers": [4, 5]})))
    before = files(tmp_path / "features")
    recipe = toy()
    assert "extract: 12 media" in ok(cli("extract", recipe))
    ok(cli("extract", toy(encoder={"tokens": "mean"})))
    ok(cli("extract", toy(encoder={"tokens": "all", "layers": [5]})))
    after = files(tmp_path / "features")
    unchanged = {name for name in before if "catalogue" not in name}
    assert {name: after[name] for name in unchanged} == {n: before[n] for n in unchanged}
    features = only_set(tmp_path)
    names = ["all-5-5", "cls-0-3", "cls-4-5", "mean-0-5"]
    assert [c.folder.name for c in features.columns] == names
    assert features.columns[0].row_shape == (1, 17, 24)

    loaded = load_recipe(toy())
    dataset = load_dataset(loaded)
    split = open_features(loaded, dataset)[0].fetch(list(dataset.media))
    whole = load_recipe(toy(store={"root": str(tmp_path / "whole")}))
    ok(cli("extract", toy(store={"root": str(tmp_path / "whole")})))
    joint = open_features(whole, dataset)[0].fetch(list(dataset.media))
    assert split.shape == joint.shape == (12, 3, 24)
    np.testing.assert_allclose(split, joint, atol=4e-3, rtol=0)  # one float16 step at magnitude 4


def test_two_processes_share_an_extraction(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    ok(cli("extract", toy(store={"shard_rows": 2, "root": str(tmp_path / "alone")})))
    command = [sys.executable, "-m", "epalm.pipeline", "extract"]
    shared = toy(store={"shard_rows": 2})
    some = [
        subprocess.Popen([*command, str(shared)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in some]
    assert [process.returncode for process in some] == [0, 0], outputs
    assert files(tmp_path / "features") == files(tmp_path / "alone")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_full_disk_loses_nothing(cli: Cli, toy: Toy, small_disk: Path, backend: str) -> None:
    store = {"root": str(small_disk / "features"), "shard_rows": 2, "backend": backend}
    recipe = toy(store=store, encoder={"tokens": "all", "layers": [0, 1, 2, 3, 4, 5]})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(165_000))
    refused(
        cli("extract", recipe), f"No space left on device: '{small_disk}", "what is written stays"
    )
    filler.unlink()
    loaded = load_recipe(recipe)
    (folder,) = specs(small_disk / "features")
    kept = len(open_set(folder).columns[0])
    assert 0 < kept < 12
    output = ok(cli("extract", recipe))
    assert f"extract: {12 - kept} media" in output
    assert f"{kept} were there" in output
    ok(cli("cache", "verify", recipe, "--deep"))
    assert not list(small_disk.rglob("*.partial"))
    assert loaded.store.backend == backend


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_full_disk_is_named_wherever_it_is_met(
    cli: Cli, toy: Toy, small_disk: Path, backend: str
) -> None:
    """With room for ever more of a set's first small files."""
    recipe = toy(store={"root": str(small_disk / "features"), "backend": backend})
    filler = small_disk / "filler"
    for pages in range(1, 48, 2):
        filler.write_bytes(bytes((64 - pages) << 12))
        result = cli("extract", recipe)
        if result.exit_code == 0:
            break
        refused(result, f"No space left on device: '{small_disk}")
        filler.unlink()
    assert result.exit_code == 0 and pages > 5


def test_a_read_only_store_is_read_and_not_written(
    cli: Cli, toy: Toy, small_disk: Path, tmp_path: Path
) -> None:
    recipe = toy(store={"root": str(small_disk / "features")})
    some = toy(store={"root": str(small_disk / "features")}, data={"limits": {"train": 4}})
    ok(cli("extract", some))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "nothing to do" in ok(cli("extract", some))
    loaded = load_recipe(some)
    table, dataset = open_features(loaded, load_dataset(loaded))
    assert len(table.fetch(list(dataset.media))) == 8
    recipe = toy(store={"root": str(small_disk / "features")})
    refused(cli("extract", recipe), "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    ok(cli("extract", recipe))
    assert find(small_disk / "features", table.spec, "")


def test_a_file_changed_behind_its_time_stamp_is_hashed_again(
    cli: Cli, toy: Toy, tmp_path: Path
) -> None:
    ok(cli("extract", toy()))
    image = tmp_path / "images" / "1.png"
    before, content = image.stat(), bytearray(image.read_bytes())
    content[-1] ^= 1  # of the last chunk's checksum, which decoders do not look at
    image.write_bytes(content)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    more = toy(encoder={"views": {"count": 1}})
    refused(cli("extract", more), "changed while it was extracted", "run `extract` again")
    ok(cli("extract", more))
    ok(cli("cache", "verify", more, "--deep"))


def test_verify_names_markers_that_were_changed(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    ok(cli("extract", recipe))
    column = only_set(tmp_path).columns[0]
    marker = column.marker_path(1)
    written = marker.read_text()
    marker.write_text(written.replace('"view": 0', '"view": 1'))
    refused(cli("cache", "verify", recipe), "cls-0-5, shard 1: its marker", "`extract`")
    assert "shard 1: its marker is not as it was written; run `extract`" in ok(
        cli("cache", "repair", recipe)
    )
    assert "extract: 4 media" in ok(cli("extract", recipe))
    assert marker.read_text() == written
    ok(cli("cache", "verify", recipe))
    marker.write_text("{")
    assert "markers/000001.json" in ok(cli("cache", "gc", recipe))
    assert not marker.exists()
