"""Sweeps: many runs from one file, and the table that compares them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch
import yaml
from safetensors.torch import load_file

from epalm.config import dump_recipe, load_recipe
from epalm.errors import EpalmError
from epalm.evaluate.compare import compare
from epalm.evaluate.scores_file import read_scores
from epalm.sweep import load_sweep
from epalm.train.run import Run
from tests.test_cli import refused

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_shipped_sweeps_stand_for_different_runs(path: Path) -> None:
    runs = load_sweep(path)
    assert len({run.recipe.name for run in runs}) == len(runs)
    trees = [run.recipe.model_dump(exclude={"name"}) for run in runs]
    assert all(tree not in trees[:i] for i, tree in enumerate(trees))


def write(path: Path, **changes: object) -> Path:
    tree = {
        "name": "s",
        "base": "toy.yaml",
        "set": {"train.steps": 2, "data.seed": 5},
        "axes": {
            "variant": {"lin": {"variant.prompt_length": 0}, "pt": {}},
            "mask": {"causal": {}, "reference": {"variant.mask": "reference"}},
        },
        "seeds": [3, 4],
    }
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


def test_every_combination_seed_by_seed(toy: Callable[..., Path]) -> None:
    runs = load_sweep(write(toy().with_name("sweep.yaml")), ("train.lr=0.5",))
    assert [r.recipe.name for r in runs[:4]] == [
        "s-lin-causal-3", "s-lin-reference-3", "s-pt-causal-3", "s-pt-reference-3"
    ]  # fmt: skip
    assert [r.seed for r in runs] == [3] * 4 + [4] * 4
    first = runs[1].recipe
    assert (first.variant.prompt_length, first.variant.mask) == (0, "reference")
    assert (first.seed, first.data_seed, first.train.steps, first.train.lr) == (3, 5, 2, 0.5)
    assert runs[1].labels == {"variant": "lin", "mask": "reference"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seeds": []}, "seeds: "),
        ({"axis": {}}, "axis: unknown key; did you mean axes"),
        ({"base": "none.yaml"}, r"none\.yaml"),
        ({"set": {"train.step": 1}}, "did you mean steps"),
        ({"axes": {"a": {"b": 3}}}, r"axes\.a\.b: "),
        ({"axes": {"a": {}}}, r"axes\.a: "),
        ({"seeds": [3, 4, 3], "axes": {}}, "two runs are called s-3"),
        ({"set": {"seed": 5}}, "seed cannot be set, a sweep gives each run its own; .*`seeds`"),
        ({"axes": {"a": {"x": {"name": "y"}}}}, "name cannot be set"),
        ({"axes": {"a": {"x": {}, "x-y": {}}, "b": {"y-z": {}, "z": {}}}}, "called s-x-y-z-3"),
        (
            {"axes": {"a": {"x": {"train.lr": 1}}, "b": {"y": {}, "z": {"train.lr": 2}}}},
            r"axes: a sets train\.lr and b sets train\.lr, of which only the later would count",
        ),
        (
            {"axes": {"a": {"x": {"train.lr": 1}}, "b": {"y": {"train": {"steps": 2}}}}},
            r"axes: a sets train\.lr and b sets train, ",
        ),
    ],
)
def test_bad_sweeps(toy: Callable[..., Path], changes: dict, word: str) -> None:
    path = write(toy().with_name("sweep.yaml"), **changes)
    with pytest.raises(EpalmError, match=word):
        load_sweep(path)


@pytest.mark.parametrize("extends", [False, True])
def test_a_recipe_is_no_sweep(toy: Callable[..., Path], cli: Callable, extends: bool) -> None:
    recipe = toy()
    if extends:
        recipe = recipe.with_name("other.yaml")
        recipe.write_text("extends: toy.yaml\nname: other\n")
    result = cli("sweep", recipe)
    assert result.exit_code == 2
    assert f"{recipe}: a recipe, not a sweep; it goes to `run`" in result.output
    assert "unknown key" not in result.output
    example = yaml.safe_load(result.output.split("as\n", 1)[1])
    path = recipe.with_name("sweep.yaml")
    path.write_text(yaml.safe_dump(example | {"base": recipe.name}))
    assert len(load_sweep(path)) == 6


def test_a_sweep_runs_resumes_and_compares(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    axes = {"variant": {"lin": {"variant.prompt_length": 0}, "pt": {}}}
    path = write(toy().with_name("sweep.yaml"), axes=axes)
    result = cli("sweep", path)
    assert result.exit_code == 0, result.output
    head, lin, pt = result.output.strip().splitlines()[-3:]
    assert head.split()[:5] == ["variant", "runs", "trained", "accuracy", "what"]
    assert lin.startswith("lin ") and pt.startswith("pt ") and "±" in lin
    scores = tmp_path / "runs" / "s-pt-4" / "scores.json"
    before = scores.stat().st_mtime_ns
    again = cli("sweep", path)
    assert again.output.strip().splitlines()[-2:] == [lin, pt]
    assert scores.stat().st_mtime_ns == before
    both = cli("compare", scores.parent, tmp_path / "runs" / "s-lin-3")
    assert [line.split()[0] for line in both.output.splitlines()] == ["run", "s-pt-4", "s-lin-3"]


def test_overrides_take_no_names(toy: Callable[..., Path], cli: Callable) -> None:
    path = write(toy().with_name("sweep.yaml"))
    refused(cli("sweep", path, "--set", "name=x"), "name cannot be set", "change `name` in")


def test_a_sweep_is_checked_before_it_begins(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    axes = {"start": {"low": {"variant.inject_start": 2}, "high": {"variant.inject_start": 90}}}
    refused(cli("sweep", write(toy().with_name("sweep.yaml"), axes=axes)), "variant.inject_start")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "features").exists()


def test_half_a_training_and_another_decoding_are_not_done(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    path = write(toy().with_name("sweep.yaml"), axes={}, seeds=[3])
    (run,) = load_sweep(path)
    folder = tmp_path / "runs" / "s-3"
    cut = tmp_path / "cut.yaml"
    cut.write_text(dump_recipe(run.recipe))
    assert cli("run", cut, "--max-steps", 1).exit_code == 0
    assert "1 runs, 0 of them done" in cli("sweep", path).output
    assert "1 runs, 1 of them done" in cli("sweep", path).output
    assert cli("evaluate", folder, "--set", "decode.num_beams=2").exit_code == 0
    assert "1 runs, 0 of them done" in cli("sweep", path).output
    assert read_scores(Run.open(folder))["step"] == 2


def test_show_says_that_a_run_was_trained_on(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    recipe, folder = toy(train={"steps": 2}), tmp_path / "runs" / "toy"
    assert cli("run", recipe, "--max-steps", 1).exit_code == 0
    assert "trained on since" not in cli("show", folder).output
    assert cli("train", recipe).exit_code == 0
    assert f"of step 1, and trained on since: run `evaluate {folder}`" in cli("show", folder).output


@pytest.mark.parametrize("together", [1, 3])
def test_one_run_that_diverges_leaves_the_others(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path, together: int
) -> None:
    """The same command tries it again, and the others are as they would be without it."""
    rates = {"mad": {"train.lr": 1e38}, "low": {"train.lr": 1e-4}, "high": {"train.lr": 1e-2}}
    axes = {"lr": {name: {**own, "train.steps": 4} for name, own in rates.items()}}
    path = write(toy().with_name("sweep.yaml"), axes=axes, seeds=[3])
    for _ in range(2):
        done = cli("sweep", path, "--together", together)
        assert "s-mad-3: the loss is" in done.output and "not-finite-" in done.output
        refused(done, "1 of the 3 runs are not in the table")
        lines = [line.split()[0] for line in done.stdout.splitlines()[-3:]]
        assert lines == ["lr", "low", "high"]
    assert "3 runs, 2 of them done" in done.output
    before = load_file(tmp_path / "runs" / "s-low-3" / "checkpoints" / "last.safetensors")
    alone = write(path.with_name("alone.yaml"), name="t", axes={"lr": {"low": axes["lr"]["low"]}},
                  seeds=[3])  # fmt: skip
    assert cli("sweep", alone).exit_code == 0
    after = load_file(tmp_path / "runs" / "t-low-3" / "checkpoints" / "last.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-5)


def test_a_run_that_another_process_trains_is_left_to_it(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    recipe = toy()
    path = write(recipe.with_name("sweep.yaml"), axes={})
    first, second = (Run.of(run.recipe) for run in load_sweep(path))
    with first.alone():
        refused(cli("sweep", path), "s-3: another process is training", "1 of the 2 runs are not")
        assert second.scores.is_file() and not first.scores.is_file()
    assert cli("sweep", path).exit_code == 0
    with Run.of(load_recipe(recipe)).alone():
        refused(cli("train", recipe, "--overwrite"), "another process is training this run")
    assert cli("train", recipe, "--overwrite").exit_code == 0
    assert not [path.name for path in (tmp_path / "runs").iterdir() if path.name[0] == "."]


def test_two_processes_share_a_sweep(
    toy: Callable[..., Path], cli: Callable, tmp_path: Path
) -> None:
    path = write(toy().with_name("sweep.yaml"), seeds=[3])
    assert cli("extract", tmp_path / "toy.yaml").exit_code == 0
    command = [sys.executable, str(ROOT / "pipeline.py"), "sweep", str(path)]
    both = [subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert {process.returncode for process in both} <= {0, 2}
    assert not any("Traceback" in words or "Errno" in words for words in said), said
    done = cli("sweep", path)
    assert "4 runs, 4 of them done" in done.output
    assert len(done.stdout.strip().splitlines()) == 1 + 1 + 4  # said, head of the table, runs


def test_mean_and_deviation() -> None:
    def scores(accuracy: float) -> dict:
        return {"accuracy": accuracy, "accuracy_by_type": {"": accuracy}, "seconds": {"train": 2.0},
                "trained_parameters": 1000}  # fmt: skip

    runs = [({"variant": "a"}, scores(0.5)), ({"variant": "a"}, scores(0.7))]
    runs.append(({"variant": "b"}, scores(0.25)))
    lines = [line.split("  ") for line in compare(runs).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[1:] == [
        ["a", "2", "1,000", "60.0 ± 14.1", "-", "-", "2"],
        ["b", "1", "1,000", "25.0", "-", "-", "2"],
    ]
