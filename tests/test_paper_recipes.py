"""The paper's tables as recipes: its pairings are run, all others resolve and have its scores."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torchvision.transforms import v2
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from epalm.config import load_recipe
from epalm.model.augmented import AugmentedLM
from epalm.sweep import load_sweep
from tests.conftest import tiny_opt

AST, TIMESFORMER, VIT_L = (12, 768, 86.6), (12, 768, 121.3), (24, 1024, 303.3)
"""Layers, width, and millions of weights."""
ROOT = Path(__file__).parents[1]
PAPER = ROOT / "recipes" / "paper"
SWEEPS = ROOT / "recipes" / "sweeps"
SHAPES = {  # of the OPT each recipe names
    "opt-125m": {"num_hidden_layers": 12},
    "opt-350m": {
        "num_hidden_layers": 24,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "opt-1.3b": {"num_hidden_layers": 24},
    "opt-2.7b": {"num_hidden_layers": 32},
    "opt-6.7b": {"num_hidden_layers": 32},
}


def test_every_paper_recipe_is_run_here() -> None:
    """Those of the other datasets are run in test_data_end_to_end.py."""
    assert {p.stem for p in PAPER.glob("opt-*.yaml")} == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_two_steps_and_evaluation(
    name: str,
    cli: Callable[..., Result],
    toy: Callable[..., Path],
    tmp_path: Path,
    vit_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    toy()  # the data
    folder = tmp_path / "opt"
    tiny_opt(**SHAPES[name]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    overrides = {
        "data.kind": "jsonl",
        "data.path": tmp_path / "toy.jsonl",
        "data.media_root": tmp_path,
        "encoder.weights": vit_folder,
        "encoder.image_size": 32,
        "lm.weights": folder,
        "store.root": tmp_path / "features",
        "runs": tmp_path / "runs",
        "device": "cpu",
        "train.steps": 2,
        "train.batch_size": 8,
        "decode.max_new_tokens": 3,
        "evaluate.metrics": "null",  # the toy questions have one answer, not ten
    }
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    done = cli("run", PAPER / f"{name}.yaml", *sets)
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.output
    recipe = load_recipe(PAPER / f"{name}.yaml")
    assert recipe.lm.weights == f"hf:facebook/{name}"


def rows_of_the_page() -> list[tuple[list[str], list[str]]]:
    """Of each table row of docs/paper.md that names recipes: their names, and its scores."""
    page = (ROOT / "docs" / "paper.md").read_text()
    cells = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    rows = [(re.findall("`([a-z][^`]*)`", c[1]), re.findall(r"-?\d+\.\d+", " ".join(c[2:])))
            for c in cells]  # fmt: skip
    return [row for row in rows if row[0]]


def head_of(path: Path) -> str:
    return " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))


def test_the_page_and_the_heads_have_the_same_scores() -> None:
    """The first name of a row is what is trained; a sweep's head has the scores of all its rows."""
    rows = rows_of_the_page()
    assert len(rows) > 70
    for (name, *targets), scores in rows:
        assert scores, name
        for target in targets:
            assert (PAPER / f"{target}.yaml").is_file()
        sweep, colon, row = name.partition(": ")
        if colon:
            path = SWEEPS / f"{sweep}.yaml"
            assert [run.labels["row"] for run in load_sweep(path)].count(row) == 1
            assert re.search(rf"\b{row} (\([^)]*\) )?{scores[0]}[,. ]", head_of(path)), name
        else:
            found = re.findall(r"-?\d+\.\d+", head_of(PAPER / f"{name}.yaml"))
            assert {float(score) for score in scores} <= {float(score) for score in found}, name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_questions_are_scored_and_beams_weighed_as_the_papers_were(path: Path) -> None:
    """VQA v2 by the script that the official code has; see vqa2-base.yaml for the penalty."""
    sweep = path.parent == SWEEPS
    for recipe in [run.recipe for run in load_sweep(path)] if sweep else [load_recipe(path)]:
        if recipe.data.kind == "vqa2":
            assert recipe.evaluate.metrics == ("vqa_accuracy_2017", "vqa_accuracy")
        else:
            assert "vqa" not in " ".join(recipe.evaluate.metrics or ())
        asks = recipe.data.kind in ("vqa2", "gqa", "msrvtt-qa", "msvd-qa")
        beams = recipe.decode.num_beams > 1
        assert recipe.decode.length_penalty == (0.2 if asks and beams else 1)


@pytest.mark.parametrize("name", ["msvd-qa", "msrvtt-qa", "msrvtt", "table13-vit"])
def test_videos_are_augmented_as_in_the_official_code(name: str) -> None:
    """By torchvision's RandAugment as it comes (convention 21)."""
    views, theirs = load_recipe(PAPER / f"{name}.yaml").encoder.views, v2.RandAugment()
    ours = views.randaugment_ops, views.randaugment_magnitude
    assert ours == (theirs.num_ops, theirs.magnitude)
    assert (views.crop_scale, views.flip) == ((0.5, 1.0), v2.RandomHorizontalFlip().p)


@pytest.mark.parametrize(
    ("name", "encoder", "percent"),
    [
        ("audiocaps", AST, 0.90), ("audiocaps-pt", AST, 0.55), ("table15-adapters", AST, 3.76),
        ("table15-adapters-top", AST, 3.76), ("table15-deep-prompt", AST, 0.93),
        ("msvd-qa", TIMESFORMER, 0.89), ("msvd-qa-pt", TIMESFORMER, 0.54),
        ("msrvtt-qa-frozenbilm", TIMESFORMER, 3.72), ("vqa2-pt-l", VIT_L, 0.06),
    ],
)  # fmt: skip
def test_trained_share_is_the_papers(
    name: str, encoder: tuple[int, int, float], percent: float
) -> None:
    """Tables 3, 4 and 15 print it, and it tells what a row trains where the text does not."""
    recipe = load_recipe(PAPER / f"{name}.yaml")
    width = {"hf:facebook/opt-2.7b": 2560, "hf:facebook/opt-6.7b": 4096}[recipe.lm.weights]
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    config = OPTConfig(num_hidden_layers=32, num_attention_heads=32, **sizes)
    layers, dim, millions = encoder
    with torch.device("meta"):
        model = AugmentedLM.from_config(OPTForCausalLM(config), recipe.variant, layers, dim)
    trained = sum(p.numel() for p in model.trained.parameters())
    total = sum(p.numel() for p in model.lm.parameters()) + trained + millions * 1e6
    assert round(100 * trained / total, 2) == percent


def test_steps_are_those_of_whole_batches() -> None:
    """As each comment says them, and as an epoch here leaves out what fills no batch."""
    pattern = r"steps: (\d+) +# (\d+) epochs of ([\d,]+) \w+ in batches of (\d+)"
    found = [
        (path, *(int(number.replace(",", "")) for number in numbers))
        for path in sorted((ROOT / "recipes").glob("*/*.yaml"))
        for numbers in re.findall(pattern, path.read_text())
    ]
    assert len(found) > 15
    for path, steps, epochs, examples, batch in found:
        assert steps == epochs * (examples // batch), path


def test_every_recipe_is_on_the_page() -> None:
    page = (ROOT / "docs" / "paper.md").read_text()
    named = set(re.findall("`([a-z0-9][^`: ]*)`", page))
    assert {path.stem for path in PAPER.glob("*.yaml")} - {"vqa2-base"} <= named


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_heads_of_sweeps(path: Path) -> None:
    head = head_of(path)
    assert f"python pipeline.py sweep recipes/sweeps/{path.name}" in head
    if path.stem.startswith(("table", "few")):
        for words in ("Paper, row by row", "Features: ", "Not run here. Estimate"):
            assert words in head
