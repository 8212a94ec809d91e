"""The recipes of variants and baselines, run with small random models of the same depth."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from epalm.config import load_recipe
from tests.conftest import tiny_llama, tiny_opt

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "variants").glob("*.yaml"))
# parts that are trained and saved
PARTS = {
    "lin": {"connection"},
    "limber": {"connection"},
    "ada": {"connection", "adapters"},
    "magma": {"connection", "adapters"},
    "magma-all": {"connection", "adapters"},
    "frozenbilm": {"connection", "adapters"},
    "deep-prompt": {"connection", "deep_prompt"},
    "train-lm": {"connection", "soft_prompt", "lm"},
    "finetune-encoder": {"connection", "soft_prompt", "encoder"},
    "full-finetune": {"connection", "soft_prompt", "lm", "encoder"},
}
WITH_PROMPT = {"connection", "soft_prompt"}


@pytest.fixture(scope="module")
def deep_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT of twelve layers, as ViT-B has."""
    folder = tmp_path_factory.mktemp("deep-vit")
    torch.manual_seed(3)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(model, folder, model_args=size, safe_serialization=True)
    return folder


def save_lm(weights: str, folder: Path) -> None:
    """A small random LM of the depth and norm placement of the one that a recipe names."""
    if "llama" in weights:
        config = tiny_llama().config
        config.num_hidden_layers = 32
        lm = LlamaForCausalLM(config)
    elif "350m" in weights:
        lm = tiny_opt(num_hidden_layers=24, do_layer_norm_before=False, word_embed_proj_dim=32)
    else:
        lm = tiny_opt(num_hidden_layers=32)
    lm.save_pretrained(folder)


def test_no_recipe_is_forgotten() -> None:
    named = {p.stem for p in RECIPES}
    assert named >= {"lin", "pt", "epalm", "ada", "promptfuse", "limber", "magma", "magma-all",
                     "frozenbilm", "train-lm", "finetune-encoder", "full-finetune", "deep-prompt",
                     "epalm-2024"}  # fmt: skip
    for path in RECIPES:
        head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert any(f"run recipes/variants/{path.name}" in line for line in head), path
        assert any("Features: " in line for line in head), path
        assert any("score" in line for line in head), path
        assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_two_steps_and_evaluation(
    path: Path,
    cli: Callable[..., Result],
    toy: Callable[..., Path],
    tmp_path: Path,
    deep_vit: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    toy()  # the data
    folder = tmp_path / "lm"
    save_lm(load_recipe(path).lm.weights, folder)
    tokenizer.save_pretrained(folder)
    overrides = {
        "data.kind": "jsonl",
        "data.path": tmp_path / "toy.jsonl",
        "data.media_root": tmp_path,
        "encoder.kind": "timm",
        "encoder.weights": deep_vit,
        "encoder.image_size": 32,
        "encoder.frames": "null",
        "lm.weights": folder,
        "store.root": tmp_path / "features",
        "runs": tmp_path / "runs",
        "device": "cpu",
        "train.steps": 2,
        "train.batch_size": 8,
        "decode.max_new_tokens": 3,
        "decode.batch_size": 4,
        "evaluate.metrics": "null",  # the toy questions have one answer, not ten
    }
    data = {key: value for key, value in overrides.items() if key.startswith(("data", "encoder"))}
    for name in load_recipe(path).also:
        overrides |= {f"also.{name}.{key}": value for key, value in data.items()}
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    done = cli("run", path, *sets)
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.output
    run = tmp_path / "runs" / path.stem
    with safe_open(run / "checkpoints" / "best.safetensors", "pt") as file:
        parts = {key.split(".")[1] for key in file.keys()}  # noqa: SIM118
    assert parts == PARTS.get(path.stem, WITH_PROMPT)
    if path.stem in ("ada", "magma-all", "train-lm", "full-finetune"):
        image = tmp_path / "images" / "10.png"
        asked = cli("predict", run, "--image", image, "--ask", "what color is the shape?")
        assert asked.exit_code == 0, asked.output
