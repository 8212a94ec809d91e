"""What an evaluation writes belongs together, whatever stops it and whoever else evaluates."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from epalm.train.run import Run
from tests.test_cli import refused

Cli = Callable[..., Result]


@pytest.fixture
def recipe(toy: Callable[..., Path], cli: Cli) -> Path:
    """Of a run that is trained and evaluated."""
    recipe = toy(train={"steps": 2})
    assert cli("run", recipe).exit_code == 0
    return recipe


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Run:
    return Run.open(tmp_path / "runs" / "toy")


@pytest.mark.parametrize("name", ["predictions-shuffled.jsonl", "report.html", "loss.png"])
def test_scores_are_there_when_all_else_is(run: Run, cli: Cli, tmp_path: Path, name: str) -> None:
    """Until then the answers are kept, and a sweep or `show` does not take the run for done."""
    before = {file: (run.folder / file).read_bytes() for file in ("scores.json", name)}
    (run.folder / name).unlink()
    (run.folder / name).mkdir()  # in the way of the file
    assert cli("evaluate", run.folder, "--set", "decode.max_new_tokens=1").exit_code == 2
    refused(cli("show", run.folder), "scores.json: not there; run `evaluate` first")
    assert len(list(run.folder.glob("partial-*"))) == 2
    (run.folder / name).rmdir()
    assert cli("evaluate", run.folder).exit_code == 0
    assert not list(run.folder.glob("partial-*"))
    if name != "report.html":  # it shows times
        assert (run.folder / name).read_bytes() == before[name]
    kept = ("accuracy", "metrics", "shuffled_metrics", "decode", "step")
    new, old = json.loads(run.scores.read_text()), json.loads(before["scores.json"])
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}


def test_scores_elsewhere_are_of_the_recipe_beside_them(
    recipe: Path, run: Run, cli: Cli, tmp_path: Path
) -> None:
    other, there = tmp_path / "other.yaml", run.folder / "on" / "other"

    def evaluate(split: str) -> Result:
        tree = {"extends": recipe.name, "name": "other", "evaluate": {"split": split}}
        other.write_text(yaml.safe_dump(tree))
        return cli("evaluate", run.folder, "--on", other)

    assert evaluate("val").exit_code == 0
    (there / "predictions.jsonl").unlink()
    (there / "predictions.jsonl").mkdir()
    assert evaluate("test").exit_code == 2
    refused(cli("show", there), "scores.json: not there")
    (there / "predictions.jsonl").rmdir()
    assert evaluate("test").exit_code == 0
    assert json.loads((there / "scores.json").read_text())["split"] == "test"


def test_a_run_is_evaluated_by_one_process_at_a_time(
    recipe: Path, run: Run, cli: Cli, tmp_path: Path
) -> None:
    scores, weights = run.scores.read_bytes(), run.last.read_bytes()
    with run.scoring():
        refused(cli("evaluate", run.folder), "another process is evaluating this run; wait")
        # its scores would come to stand in the new run
        refused(cli("train", recipe, "--overwrite"), "another process is evaluating this run")
        assert cli("evaluate", run.folder, "--on", recipe).exit_code == 0
    there = Run(run.folder / "on" / "toy", run.recipe)
    with there.scoring():
        refused(cli("evaluate", run.folder, "--on", recipe), "on/toy: another process")
        refused(cli("train", recipe, "--overwrite"), "on/toy: another process is evaluating")
    assert (run.scores.read_bytes(), run.last.read_bytes()) == (scores, weights)
    assert cli("train", recipe, "--overwrite").exit_code == 0
    assert not run.scores.is_file()
    assert not [path for path in (tmp_path / "runs").rglob("*.lock")]
