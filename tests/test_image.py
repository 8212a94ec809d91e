"""Image encoders: parity with the reference, encoders without a class token, augmented views.

Golden vectors as in test_golden.py: `enc_vit.npz` and `transforms.npz`.
"""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from epalm.config import Recipe, load_recipe
from epalm.data import load_dataset
from epalm.errors import EpalmError
from epalm.extract.encoder import build, describe
from epalm.extract.lookup import open_features
from epalm.extract.loop import extract
from epalm.extract.views import augmentation, view_seed

FOLDER = Path(os.environ.get("EPALM_GOLDEN") or Path(__file__).parent / "golden")
CPU = torch.device("cpu")

Toy = Callable[..., Path]


def saved(folder: Path, arch: str, **model_args: Any) -> Path:
    """A small random timm model in timm's own folder format."""
    torch.manual_seed(3)
    model = timm.create_model(arch, num_classes=0, **model_args)
    timm.models.save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return folder


def test_vit_equals_the_reference(toy: Toy, tmp_path: Path) -> None:
    with np.load(FOLDER / "enc_vit.npz") as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    folder = saved(tmp_path / "golden", "vit_tiny_patch16_224", **size)
    state = {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}
    save_file(state, folder / "model.safetensors")
    recipe = load_recipe(toy(encoder={"weights": str(folder)}))
    found = build(recipe, CPU).encode(golden["image"], range(4))
    # measured 2e-6 where states reach 4
    torch.testing.assert_close(found[:, :, 0], golden["cls"], atol=2e-5, rtol=1e-5)
    everything = load_recipe(
        toy(encoder={"weights": str(folder), "tokens": "all", "layers": [0, 1, 2, 3]})
    )
    found = build(everything, CPU).encode(golden["image"], range(4))
    torch.testing.assert_close(found, golden["hidden"], atol=2e-5, rtol=1e-5)


def test_reference_preprocessing_equals_the_reference(toy_recipe: Recipe, toy: Toy) -> None:
    with np.load(FOLDER / "transforms.npz") as arrays:
        buffer = io.BytesIO()
        Image.fromarray(arrays["image_u8"]).save(buffer, "png")
        expected = torch.from_numpy(arrays["image_out"])
    recipe = load_recipe(toy(encoder={"preprocess": "reference"}))
    found = build(recipe, CPU).preprocess(buffer.getvalue(), None)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    own = build(toy_recipe, CPU).preprocess(buffer.getvalue(), None)
    assert (own - expected).abs().max() > 0.1
    numbers = describe(recipe).preprocess
    assert (numbers["crop_mode"], numbers["exif"]) == ("squash", "ignored")


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("size", [32, [32, 32]])
def test_a_model_of_another_size_than_its_architecture(toy: Toy, tmp_path: Path, size: Any) -> None:
    """As timm saved it before 1.0.31: only the model's arguments say so."""
    folder = saved(tmp_path / "small", "vit_tiny_patch16_224", img_size=size, depth=1)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 224, 224]}}))
    spec = describe(load_recipe(toy(encoder={"weights": str(folder)})))
    assert spec.preprocess["input_size"] == [3, 32, 32] and spec.tokens == 1 + 4


@pytest.mark.parametrize(
    ("arch", "model_args", "layers", "tokens", "dim"),
    [
        ("vit_base_patch16_siglip_224", SMALL, 3, 16, 24),
        ("deit_tiny_distilled_patch16_224", SMALL, 3, 18, 24),
        ("vit_srelpos_small_patch16_224", SMALL, 3, 16, 24),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 4, 1, 32),
        ("hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1)}, 4, 49, 192),
        ("resnet18", {}, 5, 1, 512),
    ],
)
def test_means_over_patches(
    toy: Toy, tmp_path: Path, arch: str, model_args: dict[str, Any], layers: int, tokens: int,
    dim: int,
) -> None:  # fmt: skip
    folder = saved(tmp_path / arch, arch, **model_args)
    size = 224 if arch.startswith("hiera") else 32
    staged = not arch.startswith(("vit", "deit"))
    changes = {"weights": str(folder), "tokens": "mean", "image_size": size}
    recipe = load_recipe(toy(encoder={**changes, "final_norm": not staged}))
    spec = describe(recipe)
    assert (spec.layers, spec.tokens, spec.dim) == (layers, tokens, dim)
    encoder = build(recipe, CPU)
    batch = torch.randn(2, 3, size, size)
    found = encoder.encode(batch, range(layers))
    assert found.shape == (2, layers, 1, dim)
    with torch.inference_mode():
        last = encoder.model.forward_features(batch)
    if not staged:  # (B, tokens, D), after the final norm
        patches = last[:, encoder.model.num_prefix_tokens :]
        torch.testing.assert_close(found[:, -1, 0], patches.mean(dim=1), atol=1e-5, rtol=1e-5)
        assert (found[:, -1, 0] - last.mean(dim=1)).abs().max() > 1e-3 or tokens == 16
    else:
        first = encoder.model.forward_intermediates(
            batch, indices=[0], norm=False, output_fmt="NCHW", intermediates_only=True
        )[0].detach()
        width = first.shape[1]
        expected = first.mean(dim=(2, 3))
        torch.testing.assert_close(found[:, 0, 0, :width], expected, atol=1e-5, rtol=1e-5)
        assert width < dim
        assert not found[:, 0, 0, width:].any()
        assert (found[:, -1, 0, width:].abs().amax(dim=0) > 0).any()


@pytest.mark.parametrize(
    ("arch", "model_args", "widest"),
    [
        ("samvit_base_patch16", {**SMALL, "global_attn_indexes": ()}, 24),  # its neck has 256
        ("efficientnet_b0", {}, 320),  # its head has 1280
    ],
)
def test_stages_are_as_wide_as_the_widest(
    toy: Toy, tmp_path: Path, arch: str, model_args: dict[str, Any], widest: int
) -> None:
    """And not as what follows them: they were cut to a neck's width, or padded to a head's."""
    changes = {"weights": str(saved(tmp_path / arch, arch, **model_args)), "image_size": 32}
    recipe = load_recipe(toy(encoder={**changes, "tokens": "mean", "final_norm": False}))
    assert describe(recipe).dim == widest
    encoder, batch = build(recipe, CPU), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        stages = encoder.model.forward_intermediates(
            batch, norm=False, output_fmt="NCHW", intermediates_only=True
        )
    found = encoder.encode(batch, range(len(stages)))
    torch.testing.assert_close(found[:, -1, 0], stages[-1].mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)


def test_what_an_encoder_lacks_is_an_error(toy: Toy, tmp_path: Path) -> None:
    siglip = saved(tmp_path / "siglip", "vit_base_patch16_siglip_224", **SMALL)
    beit = saved(tmp_path / "beit", "beit_base_patch16_224", **SMALL)
    pooled = saved(tmp_path / "pooled", "vit_base_patch16_reg4_gap_256", **SMALL)
    convnext = saved(tmp_path / "c", "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    for encoder, words in (
        ({"weights": str(siglip)}, "has no class token; set it to mean"),
        ({"weights": str(convnext), "tokens": "mean"}, "no norm fits them all; set it to false"),
        ({"weights": str(beit)}, "has no norm of single tokens.*; set it to false"),
        ({"weights": str(pooled), "tokens": "mean"}, "no norm of single tokens"),
        ({"frames": 8}, "encoder.frames: has no meaning for image"),
        ({"views": {"count": 1, "time_mask": 1}}, "encoder.views.time_mask: has no meaning for im"),
    ):
        with pytest.raises(EpalmError, match=words):
            describe(load_recipe(toy(encoder=encoder)))
    with pytest.raises(EpalmError, match="encoder.layers: 9 wanted, .* has layers 0 to 5"):
        recipe = load_recipe(toy(encoder={"layers": [3, 9]}))
        extract(recipe, load_dataset(recipe))
    for encoder, words in (
        ({"layers": [3, 1]}, "layers must be ascending"),
        ({"tokens": "all"}, "all needs encoder.layers"),
        ({"views": {"count": 1, "crop_scale": [0.9, 0.5]}}, "the smaller one"),
    ):
        with pytest.raises(EpalmError, match=words):
            build(load_recipe(toy(encoder=encoder)), CPU)


def test_a_view_follows_from_seed_content_and_number(toy_recipe: Recipe, easy_vqa: Path) -> None:
    preprocess = build(toy_recipe, CPU).preprocess
    content = (easy_vqa / "train" / "images" / "3.png").read_bytes()
    seeds = [view_seed(*key) for key in ((0, "aa", 1), (0, "aa", 2), (1, "aa", 1), (0, "ab", 1))]
    assert len(set(seeds)) == 4
    assert view_seed(5, "aa", 0) is None
    views = [preprocess(content, seed) for seed in seeds]
    torch.manual_seed(1)  # whatever was drawn before
    copy = pickle.loads(pickle.dumps(preprocess))
    for seed, view in zip(seeds, views, strict=True):
        assert view.shape == (3, 32, 32)
        assert torch.equal(copy(content, seed), view)
    plain = preprocess(content, None)
    for one in range(4):
        assert not torch.equal(views[one], plain)
        assert all(not torch.equal(views[one], views[other]) for other in range(one))


def test_only_the_numbers_of_a_modality_are_in_its_augmentation(toy_recipe: Recipe) -> None:
    assert set(augmentation(toy_recipe, "audio")) == {"seed", "frequency_mask", "time_mask"}
    assert "crop_scale" in augmentation(toy_recipe, "video")
    assert "time_mask" not in augmentation(toy_recipe, "image")


def test_stored_views_do_not_depend_on_order_batch_workers_or_backend(
    toy: Toy, tmp_path: Path
) -> None:
    found = []
    for number, (backend, batch, workers, rows) in enumerate(
        [("zarr", 4, 1, 4), ("hdf5", 4, 2, 100), ("zarr", 3, 2, 5)]
    ):
        recipe = load_recipe(
            toy(
                encoder={"views": {"count": 2}, "batch_size": batch, "workers": workers},
                store={"root": str(tmp_path / str(number)), "backend": backend, "shard_rows": rows},
            )
        )
        dataset = load_dataset(recipe)
        if number:
            dataset.media.update(dict(reversed(dataset.media.items())))
        extract(recipe, dataset)
        table, _ = open_features(recipe, dataset)
        media = sorted({e.media for e in dataset.split("train")})
        views = [table.fetch(media, [view] * len(media)) for view in (0, 1, 2)]
        found.append(torch.stack(views).float())
    for other in found[1:]:
        # one float16 step at magnitude 4: the noise of batched arithmetic, rounded
        torch.testing.assert_close(found[0], other, atol=4e-3, rtol=0)
    assert (found[0][1] - found[0][2]).abs().amax(dim=(1, 2)).min() > 0.01
    assert (found[0][0] - found[0][1]).abs().amax(dim=(1, 2)).min() > 0.01
