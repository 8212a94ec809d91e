"""The command line on a device that is not the CPU: what it computes there, and that it needs no
tensor of one device where it has that of another."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from torch.utils import backend_registration
from transformers import PreTrainedTokenizerFast

from epalm.tests.conftest import tiny_llama

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices in Python",
)

RUNS: dict[str, dict[str, Any]] = {
    "soft-prompt": {"decode.num_beams": 2, "decode.max_new_tokens": 2},
    "text-states": {
        "variant.prompt_length": 0,
        "variant.connection": "shared",
        "train.text_states": "always",
    },
    "adapters": {
        "variant.prompt_length": 0,
        "variant.deep_prompt": 2,
        "variant.attention_adapters": {"reduction": 8},
        "variant.feed_forward_adapters": {"reduction": 8, "placement": "scaled"},
        "train.accumulate": 2,
        "train.clip_norm": 0.5,
    },
    "official-mask": {"variant.mask": "reference", "train.loss": "all", "store.placement": "disk"},
    "trained-encoder": {"encoder.online": True, "encoder.train": True},
    "trained-lm": {"variant.train_lm": True},
    "llama": {"lm.weights": "llama"},
}
SWEEP = {"name": "sweep", "base": "toy.yaml", "axes": {"lr": {"a": {}, "b": {"train.lr": 1e-3}}}}


def elsewhere(commands: list[list[str]]) -> None:
    """Run them; all must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "epalm.tests.elsewhere"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for command, (code, output) in zip(commands, json.loads(done.stdout), strict=True):
        assert code == 0, (command, output, done.stderr)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_computes_what_the_cpu_does(
    toy: Callable[..., Path],
    cli: Callable[..., Result],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Training of each kind, generation, a sweep in one pass, export, a single answer."""
    recipe = toy(decode={"max_new_tokens": 1}, train={"steps": 2})
    for made in (tiny_llama(), tokenizer):
        made.save_pretrained(tmp_path / "llama")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    commands = []
    for name, changes in RUNS.items():
        if "lm.weights" in changes:
            changes = {"lm.weights": str(tmp_path / changes["lm.weights"])}
        options = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
        result = cli("run", recipe, *options, f"--set=name={name}-here")
        assert result.exit_code == 0, result.output
        commands.append(
            ["run", str(recipe), *options, f"--set=name={name}", "--set=device=elsewhere"]
        )
    run = str(tmp_path / "runs" / "soft-prompt")
    image = str(tmp_path / "images" / "1.png")
    commands += [
        ["sweep", str(tmp_path / "sweep.yaml"), "--together=2", "--set=device=elsewhere"],
        ["export", run, str(tmp_path / "export")],
        ["predict", run, "--image", image, "--ask", "what shape?", "--set=device=elsewhere"],
    ]
    elsewhere(commands)
    for name in RUNS:
        found, expected = (losses(tmp_path / "runs" / n) for n in (name, f"{name}-here"))
        assert len(found) == 2 and found == pytest.approx(expected, rel=1e-4), name


def test_it_refuses_tensors_of_two_devices() -> None:
    """Otherwise the test above could not fail."""
    program = """
import torch
from epalm.tests.elsewhere import register
kept = register()
there, here = torch.ones(2, device="elsewhere"), torch.ones(2)
assert (there + 1).sum().item() == 4 and (there.cpu() + here).tolist() == [2, 2]
assert torch.ones(3, 2)[there.long().cpu()].shape == (2, 2)
for wrong in (lambda: there + here, lambda: here.index_select(0, there.long()), there.numpy):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
