"""The paper's pairings, run with a small random OPT of the same depth and norm placement."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from transformers import PreTrainedTokenizerFast

from epalm.config import load_recipe
from tests.conftest import tiny_opt

PAPER = Path(__file__).parents[1] / "recipes" / "paper"
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
    }
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    done = cli("run", PAPER / f"{name}.yaml", *sets)
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.output
    recipe = load_recipe(PAPER / f"{name}.yaml")
    assert recipe.lm.weights == f"hf:facebook/{name}"
