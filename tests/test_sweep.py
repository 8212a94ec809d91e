"""Sweeps: many runs from one file, and the table that compares them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from epalm.errors import EpalmError
from epalm.evaluate.compare import compare
from epalm.sweep import load_sweep

SWEEPS = sorted((Path(__file__).parents[1] / "recipes" / "sweeps").glob("*.yaml"))


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
        ({"axes": {"a": {"x": {}, "x-y": {}}, "b": {"y-z": {}, "z": {}}}}, "called s-x-y-z-3"),
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
