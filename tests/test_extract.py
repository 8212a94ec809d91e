"""Extraction: real images through a small ViT, interrupted, repeated, and with bad files."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from epalm.config import Recipe, load_recipe
from epalm.data import load_dataset
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs
from epalm.extract.encoder import Encoder, build, describe
from epalm.extract.lookup import open_features
from epalm.extract.loop import extract
from epalm.extract.workers import Task
from epalm.store.feature_set import FeatureSet, Layout
from epalm.store.marker import Row
from epalm.store.writer import ColumnWriter

CPU = torch.device("cpu")


def shards(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its path, but for the time that it took."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "extraction.json"
    }


def test_features_are_every_layers_class_token_after_the_final_norm(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    extract(toy_recipe, dataset)
    table, _ = open_features(toy_recipe, dataset)
    media = list(dataset.media)[5]
    found = table.fetch([media])
    assert found.shape == (1, 3, 24)
    assert found.dtype == torch.float16

    encoder = build(toy_recipe, CPU)
    pixels = encoder.preprocess(dataset.media[media].path.read_bytes(), None)[None]
    model, outputs = encoder.model, []
    hooks = [b.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in model.blocks]
    with torch.inference_mode():
        model.forward_features(pixels)
        expected = torch.stack([model.norm(o)[:, 0] for o in outputs], dim=1)[:, -3:]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)  # float16's step at 4


def test_final_norm_can_be_left_out(toy: Callable[..., Path]) -> None:
    recipes = [load_recipe(toy(), (f"encoder.final_norm={value}",)) for value in (True, False)]
    batch = torch.randn(2, 3, 32, 32)
    normed, raw = (build(r, CPU).encode(batch, range(6)) for r in recipes)
    assert normed.shape == raw.shape == (2, 6, 1, 24)
    norm = build(recipes[0], CPU).model.norm
    torch.testing.assert_close(norm(raw), normed, atol=1e-5, rtol=1e-5)
    assert describe(recipes[0]).fingerprint != describe(recipes[1]).fingerprint


def test_second_call_finds_everything(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    first = extract(toy_recipe, dataset)
    before = shards(first.features.folder)
    second = extract(toy_recipe, dataset)
    assert (first.encoded, first.found) == (12, 0)
    assert (second.encoded, second.found) == (0, 12)
    assert shards(first.features.folder) == before
    assert second.seconds["encode"] == 0


def test_equal_files_are_encoded_once(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    ids = list(dataset.media)
    dataset.media[ids[1]].path.write_bytes(dataset.media[ids[0]].path.read_bytes())
    report = extract(toy_recipe, dataset)
    assert report.encoded == 11
    table, _ = open_features(toy_recipe, dataset)
    one, two = table.fetch(ids[:2])
    assert torch.equal(one, two)


def test_interrupted_extraction_resumes_to_the_same_bytes(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_recipe(toy(), (f"store.root={tmp_path / 'whole'}",))
    extract(whole, load_dataset(whole))
    cut = load_recipe(toy(), (f"store.root={tmp_path / 'cut'}",))
    real, calls = Encoder.encode, []

    def interrupted(self: Encoder, batch: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch, layers)

    monkeypatch.setattr(Encoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(cut, load_dataset(cut))
    report = extract(cut, load_dataset(cut))
    assert (report.found, report.encoded) == (4, 8)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_batch_size_changes_values_by_noise_at_most(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    values = []
    for size in (1, 4):
        root = tmp_path / f"by{size}"
        recipe = load_recipe(toy(), (f"encoder.batch_size={size}", f"store.root={root}"))
        dataset = load_dataset(recipe)
        extract(recipe, dataset)
        values.append(open_features(recipe, dataset)[0].fetch(list(dataset.media)).numpy())
    np.testing.assert_allclose(*values, atol=4e-3, rtol=0)  # one float16 step at magnitude 4


def test_a_batch_that_is_too_large_for_the_memory(
    toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Encoder, "features", full)
    message = "encoder.batch_size: the memory of cpu is too small for 4 media at once; set a small"
    with pytest.raises(EpalmError, match=message):
        extract(toy_recipe, load_dataset(toy_recipe))


def test_changed_file_is_encoded_again(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    extract(toy_recipe, dataset)
    media = next(iter(dataset.media.values()))
    Image.new("RGB", (64, 64), "red").save(media.path)
    assert extract(toy_recipe, dataset).encoded == 1


def test_truncated_shard_is_encoded_again(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    report = extract(toy_recipe, dataset)
    before = open_features(toy_recipe, dataset)[0].fetch(list(dataset.media))
    chunk = report.features.folder / "cls-0-5" / "features" / "c.1.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(EpalmError, match="4 media of toy are not extracted"):
        open_features(toy_recipe, dataset)
    assert extract(toy_recipe, dataset).encoded == 4
    assert torch.equal(before, open_features(toy_recipe, dataset)[0].fetch(list(dataset.media)))


def test_equal_broken_files_are_all_explained(toy: Callable[..., Path]) -> None:
    recipe = load_recipe(toy(), ("data.bad_media=skip",))
    dataset = load_dataset(recipe)
    ids = list(dataset.media)
    for media in ids[:2]:
        dataset.media[media].path.write_bytes(b"")
    assert set(extract(recipe, dataset).failed) == set(ids[:2])
    assert set(open_features(recipe, dataset)[1].media) == set(ids[2:])
    assert extract(recipe, dataset).encoded == 0


def test_a_file_changed_after_extraction_is_noticed(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    extract(toy_recipe, dataset)
    Image.new("RGB", (64, 64), "red").save(next(iter(dataset.media.values())).path)
    with pytest.raises(EpalmError, match="or have changed since"):
        open_features(toy_recipe, dataset)


def test_a_flipped_byte_is_noticed(toy_recipe: Recipe) -> None:
    dataset = load_dataset(toy_recipe)
    folder = extract(toy_recipe, dataset).features.folder
    chunk = folder / "cls-0-5" / "features" / "c.0.0.0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    table, _ = open_features(toy_recipe, dataset)
    with pytest.raises(EpalmError, match="shard 0 does not have the checksum"):
        table.fetch(list(dataset.media))


def test_another_shard_size_leaves_the_set_as_it_is(toy: Callable[..., Path]) -> None:
    recipe = load_recipe(toy())
    dataset = load_dataset(recipe)
    some = dataset.without_media(list(dataset.media)[:6])
    extract(recipe, some)
    report = extract(load_recipe(toy(), ("store.shard_rows=100",)), dataset)
    assert (report.found, report.encoded) == (6, 6)
    assert len(open_features(recipe, dataset)[0].fetch(list(dataset.media))) == 12


def test_bad_media_stop_or_are_left_out(toy: Callable[..., Path]) -> None:
    recipe = load_recipe(toy())
    dataset = load_dataset(recipe)
    ids = list(dataset.media)
    dataset.media[ids[2]].path.unlink()
    dataset.media[ids[6]].path.write_bytes(b"not an image")
    broken = dataset.media[ids[7]].path
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(EpalmError) as error:
        extract(recipe, dataset)
    for word in ("3 media have no features", ids[2], ids[6], ids[7], "failures.jsonl", "bad_media"):
        assert word in str(error.value)

    skip = load_recipe(toy(), ("data.bad_media=skip",))
    report = extract(skip, dataset)
    assert (report.encoded, report.found, len(report.failed)) == (0, 9, 3)
    with pytest.raises(EpalmError, match="3 media have no features"):
        open_features(recipe, dataset)
    table, kept = open_features(skip, dataset)
    assert set(kept.media) == set(ids) - {ids[2], ids[6], ids[7]}
    assert {e.media for e in kept.examples} == set(kept.media)
    assert len(table.fetch(list(kept.media))) == 9
    reasons = {f["media"]: f["exception"] for f in report.features.failures()}
    assert reasons[ids[2]] == "FileNotFoundError"
    assert reasons[ids[6]] == "UnidentifiedImageError"


def test_features_travel_without_media(
    toy: Callable[..., Path], vit_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(toy())
    dataset = load_dataset(recipe)
    extract(recipe, dataset)
    for media in dataset.media.values():
        media.path.unlink()
    table, kept = open_features(recipe, dataset)
    assert kept == dataset
    vit_folder.rename(tmp_path / "away")
    try:
        with_arch = load_recipe(toy(), ("encoder.arch=vit_tiny_patch16_224",))
        with pytest.raises(EpalmError, match="no such file or folder"):
            open_features(recipe, dataset)  # the folder's config.json said the architecture
        with pytest.raises(EpalmError, match="no feature set fits"):
            open_features(with_arch, dataset)  # the full-sized ViT is another one
    finally:
        (tmp_path / "away").rename(vit_folder)


def test_features_of_a_known_architecture_need_no_weights(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(model.state_dict(), weights)
    overrides = (
        f"encoder.weights={weights}",
        "encoder.arch=vit_tiny_patch16_224",
        "encoder.image_size=32",
    )
    recipe = load_recipe(toy(), overrides)
    dataset = load_dataset(recipe)
    extract(recipe, dataset)
    weights.unlink()
    assert len(open_features(recipe, dataset)[0].fetch(list(dataset.media))) == 12
    elsewhere = load_recipe(toy(), (*overrides, f"encoder.weights={tmp_path / 'other'}"))
    with pytest.raises(EpalmError, match="no feature set fits"):
        open_features(elsewhere, dataset)


def test_encoder_errors(toy: Callable[..., Path], tmp_path: Path, vit_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    model = vit_folder / "model.safetensors"
    for overrides, word in (
        (("encoder.kind=clip",), "encoder.kind: 'clip' is not one of timm"),
        ((f"encoder.weights={empty}",), "does not say its architecture"),
        (("encoder.arch=resnet18",), "has no class token|cannot be built as a ViT"),
        (("encoder.arch=vit_smal_patch16_224",), "timm does not know it; near: .*vit_small"),
        ((f"encoder.weights={model}", "encoder.arch=vit_tiny_patch16_224"), "does not fit"),
    ):
        recipe = load_recipe(toy(), overrides)
        with pytest.raises(EpalmError, match=word):
            describe(recipe)
            build(recipe, CPU)


def test_orientation_and_palette_are_undone(toy_recipe: Recipe, tmp_path: Path) -> None:
    upright = Image.new("RGB", (64, 64), "blue")
    upright.paste("yellow", (0, 0, 64, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    upright.convert("P").save(tmp_path / "palette.png")
    upright.save(tmp_path / "plain.png")
    encoder = build(toy_recipe, CPU)
    plain, turned, palette = (
        encoder.preprocess((tmp_path / f"{name}.png").read_bytes(), None)
        for name in ("plain", "turned", "palette")
    )
    assert torch.equal(plain, turned)
    assert torch.equal(plain, palette)
    assert timm.__version__ and plain.shape == (3, 32, 32)


def test_a_shard_whose_owner_died_is_taken_over_even_with_foreign_media(
    toy_recipe: Recipe,
) -> None:
    """Another dataset's extraction shares one of our media, holds its shard, and dies."""
    dataset = load_dataset(toy_recipe)
    spec = describe(toy_recipe)
    features = FeatureSet.create(
        Path(toy_recipe.store.root), spec, Layout("zarr", 4, toy_recipe.encoder.weights)
    )
    (column,) = features.columns_for(column_specs(toy_recipe, spec)[0])
    ours = Task.of_media(next(iter(dataset.media.values()))).content_hash
    writer = ColumnWriter(column)
    assert writer.plan([Row(ours, 0), Row("f" * 64, 0)]) == {0: 2}
    claim = writer.claim(0)
    assert claim is not None
    death = threading.Timer(3, claim.stream.close)
    death.start()
    report = extract(toy_recipe, dataset)
    assert (report.encoded, report.found, report.failed) == (12, 0, {})
    assert not death.is_alive()
    assert not list((column.folder / "plans").iterdir())
