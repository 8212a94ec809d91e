"""Training in two real processes (CPU, gloo), against the same recipe in one process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from epalm.config import load_recipe
from epalm.errors import EpalmError
from epalm.model.connection import Connection
from epalm.train.step import pieces_of_batch
from tests import launcher

Cli = Callable[..., Result]
Toy = Callable[..., Path]

# largest difference found after these steps: 2e-7, from adding gradients in another order; AdamW
# makes more of it where a gradient is nearly zero
TOLERANCE = 1e-5


class Launched(NamedTuple):
    """What a job's processes ended with."""

    codes: list[int]
    output: list[str]


@pytest.fixture
def recipe(toy: Toy, cli: Cli) -> Path:
    """Extracted, with batches for decoding that two processes must share."""
    path = toy(decode={"max_new_tokens": 3, "batch_size": 4}, train={"val_every": 3})
    assert cli("extract", path).exit_code == 0
    return path


@pytest.fixture
def sweep(recipe: Path) -> Path:
    """Of one run, with text states."""
    path = recipe.with_name("sweep.yaml")
    path.write_text(
        "name: swept\nbase: toy.yaml\nset: {variant.prompt_length: 0, train.text_states: always, "
        "train.steps: 2, evaluate.control: false}\n"
    )
    return path


@pytest.fixture
def broken(recipe: Path) -> Path:
    """The recipe's dataset, where 6 of its 8 training images are none."""
    copy = shutil.copytree(recipe.with_name("images"), recipe.with_name("broken") / "images")
    for number in range(6):
        (copy / f"{number}.png").write_bytes(f"no image {number}".encode())
    return shutil.copy(recipe.with_name("toy.jsonl"), copy.parent)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[Launched]]:
    """Runs jobs in two processes, one job after the other."""

    def call(*jobs: dict[str, Any]) -> list[Launched]:
        folder = tmp_path / "launched"
        done = subprocess.run(
            [sys.executable, launcher.__file__, str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [
            Launched(
                json.loads(line),
                [(folder / f"{job}/{rank}.txt").read_text() for rank in range(launcher.PROCESSES)],
            )
            for job, line in enumerate(done.stdout.splitlines())
        ]

    return call


def arguments(command: str, recipe: Path, name: str, *more: str) -> list[str]:
    return [command, str(recipe), "--set", f"name={name}", *more]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_alike(one: Path, other: Path) -> None:
    """Same losses at the same steps, and same weights and moments at the end."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    weights, others = (load_file(r / "checkpoints" / "last.safetensors") for r in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=TOLERANCE, rtol=1e-4, msg=name)


def test_two_processes_do_what_one_does(
    recipe: Path,
    sweep: Path,
    broken: Path,
    cli: Cli,
    launch: Callable[..., list[Launched]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck = ("--set", "train.lr=1e-9", "--set", "train.val_every=1", "--set", "train.patience=2")
    online = ("--max-steps", "1", "--set", "encoder.online=true", "--set", "encoder.workers=1",
              "--set", f"data.path={broken}", "--set", "data.name=broken", "--set",
              "data.bad_media=skip")  # fmt: skip
    whole, patient, cut, failing, device, spread, swept, skipping = launch(
        {"arguments": arguments("run", recipe, "two", "--set", "train.accumulate=2")},
        {"arguments": arguments("train", recipe, "patient", *stuck), "never_scores": 1},
        {"arguments": arguments("train", recipe, "cut", "--max-steps", "3"), "spare": True},
        {"arguments": arguments("train", recipe, "failing"), "fails": 1},
        {"arguments": arguments("train", recipe, "device", "--set", "device=cuda:1")},
        {"arguments": arguments("train", recipe, "spread", "--set", "lm.device_map=auto")},
        {"arguments": ["sweep", str(sweep)]},
        {"arguments": arguments("train", recipe, "online", *online), "never_decodes": 1},
    )
    runs = tmp_path / "runs"

    assert whole.codes == [0, 0], whole.output
    assert cli(*arguments("run", recipe, "one")).exit_code == 0
    assert_alike(runs / "one", runs / "two")
    # each example is answered and counted once
    for name in ("predictions.jsonl", "predictions-shuffled.jsonl"):
        assert (runs / "one" / name).read_text() == (runs / "two" / name).read_text()
    scores = [json.loads((runs / name / "scores.json").read_text()) for name in ("one", "two")]
    assert scores[0] | {"seconds": 0, "rates": 0} == scores[1] | {"seconds": 0, "rates": 0}
    # one process speaks, writes and shows bars
    assert "evaluate: accuracy" in whole.output[0] and "train: 6 steps" in whole.output[0]
    assert "6/6" in whole.output[0]
    assert "accuracy" not in whole.output[1] and "step/s" not in whole.output[1]
    files = [sorted(p.name for p in (runs / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]

    # the main one scores for all, and all lose patience at the same step
    assert patient.codes == [0, 0], patient.output
    assert "step 3: no better score in 2 validations" in patient.output[0]
    assert "best at step 1" in patient.output[0]

    # a mistake in one process ends the other, also without torchrun's watching over both
    assert failing.codes[1] == 2 and failing.codes[0] not in (0, -9), failing
    assert "error: one process fails" in failing.output[1]

    # what several processes cannot have
    assert device.codes == spread.codes == [2, 2]
    assert "device: 'cuda:1' is one device, but there are 2 processes" in device.output[0]
    assert "lm.device_map: one process has all devices" in spread.output[0]

    # one makes the runs of a sweep and compares them; both make the text states that they need
    assert swept.codes == [0, 0], swept.output
    assert "text states: " in swept.output[0] and "runs  trained" in swept.output[0]
    assert "runs  trained" not in swept.output[1]

    # both leave out the media that one of them cannot decode
    assert skipping.codes == [0, 0], skipping.output
    assert "6 media that cannot be decoded are left out" in skipping.output[0]

    # a run goes on with another number of processes, here with a parameter that has no part in the
    # loss
    assert cut.codes == [0, 0], cut.output
    assert "train: 3 steps" in cut.output[0]
    monkeypatch.setattr(Connection, "__init__", Connection.__init__)  # put back at the end
    launcher.with_spare_part()
    assert "train: 6 steps" in cli(*arguments("train", recipe, "cut")).output
    assert "train: 6 steps" in cli(*arguments("train", recipe, "spare")).output
    assert_alike(runs / "spare", runs / "cut")
    saved = load_file(runs / "cut" / "checkpoints" / "last.safetensors")
    assert torch.equal(saved["trained.connection.spare"], torch.ones(3))


def test_batches_that_processes_cannot_share(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    class Three(NamedTuple):
        num_processes: int = 3

    config = load_recipe(recipe).train
    with pytest.raises(EpalmError, match=r"train\.batch_size: 8 .* 3 processes .* divisible by 3"):
        pieces_of_batch(config, Three())
    refused = cli("train", recipe, "--set", "train.accumulate=3")
    assert refused.exit_code == 2
    assert "batch_size (8) must be divisible by accumulate (3)" in refused.output
    assert not (tmp_path / "runs").exists()
