"""Metrics of a run: in scores.json's table, and two runs compared on the same examples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.scores import evaluation_examples, evaluation_metrics
from epalm.evaluate.significance import differences
from epalm.evaluate.table import format_table
from epalm.train.run import Run


def predicted(path: Path, name: str, answer: Callable[[Example], str]) -> Run:
    """A run folder with the predictions that `answer` gives."""
    recipe = load_recipe(path, (f"name={name}", "evaluate.metrics=[exact_match, normalised_match]"))
    run = Run.create(recipe)
    lines = [
        json.dumps({"id": e.id, "references": e.references, "prediction": answer(e)})
        for e in evaluation_examples(recipe, load_dataset(recipe))
    ]
    (run.folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_two_runs_on_the_same_examples(
    toy: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    path = toy()
    right = predicted(path, "right", lambda e: e.references[0])
    wrong = predicted(path, "wrong", lambda e: "\u2028")
    found = differences(right, wrong)
    assert found.keys() == {"exact_match", "normalised_match"}
    assert (found["exact_match"].value, found["exact_match"].interval) == (-1, (-1, -1))
    assert found["exact_match"].mcnemar < 0.05  # examples; there are only two media
    scores = {"split": "test", "examples": 7, "accuracy": 1.0, "accuracy_by_type": {"": 1.0},
              "examples_by_type": {"": 7}, "seconds": {"train": 1.0}, "rates": {"train": "1/s"},
              "trained_parameters": 1, "total_parameters": 2}  # fmt: skip
    for run in (right, wrong):
        run.last.parent.mkdir(exist_ok=True)
        run.last.touch()  # a run that was trained
        run.scores.write_text(json.dumps(scores))
    shown = cli("compare", right.folder, wrong.folder, "--paired")
    assert shown.exit_code == 0, shown.output
    assert "wrong less right, x 100" in shown.output and "-100.0 - -100.0" in shown.output
    assert "not on the same examples" not in shown.output
    right.scores.write_text(json.dumps(scores | {"examples": 2000}))
    other = cli("compare", right.folder, wrong.folder)
    words = "not on the same examples: right on 2,000 test examples, wrong on 7 test examples"
    assert words in other.output
    alone = cli("compare", right.folder, "--paired")
    assert alone.exit_code == 2 and "takes two runs, not 1" in alone.output


def test_runs_on_other_examples_are_not_compared(toy: Callable[..., Path]) -> None:
    path = toy()
    a, b = (predicted(path, name, lambda e: "yes") for name in ("a", "b"))
    file = b.folder / "predictions.jsonl"
    file.write_text(file.read_text().split("\n", 1)[1])
    with pytest.raises(EpalmError, match="evaluated on different examples; evaluate both"):
        differences(a, b)
    file.unlink()
    with pytest.raises(EpalmError, match="run `evaluate` first"):
        differences(a, b)


def test_a_recipe_names_its_metrics(toy: Callable[..., Path]) -> None:
    path = toy()
    for override, names in (
        ("evaluate.metrics=null", ["exact_match"]),
        ("evaluate.metrics=[normalised_match_top1k, bleu_1]", ["normalised_match_top1k", "bleu_1"]),
    ):
        recipe = load_recipe(path, (override,))
        assert list(evaluation_metrics(recipe, load_dataset(recipe))) == names


def test_table_shows_metrics_with_intervals() -> None:
    part = {"value": 0.5, "interval": [0.4, 0.625], "n": 8}
    scores = {
        "seconds": {}, "rates": {}, "trained_parameters": 1, "total_parameters": 2,
        "split": "val", "examples": 8, "accuracy": 0.5,
        "accuracy_by_type": {"x": 0.5, "y": 0.5}, "examples_by_type": {"x": 4, "y": 4},
        "metrics": {"exact_match": part | {"by_type": {"x": part, "y": part | {"interval": None}}}},
    }  # fmt: skip
    lines = format_table(scores).splitlines()
    assert lines[-4:] == [
        "val accuracy     examples    model  shuffled  majority    95% interval",
        "overall                 8    50.0%         -         -     40.0 - 62.5",
        "x                       4    50.0%         -         -     40.0 - 62.5",
        "y                       4    50.0%         -         -               -",
    ]
    none = {"value": None, "interval": None, "n": 0}
    scores["metrics"] = {"cider": part | {"value": 1.07}, "normalised_match_top1k": none}
    scores["shuffled_metrics"] = {"cider": part, "normalised_match_top1k": none}
    assert format_table(scores).splitlines()[-3:] == [
        "val score x 100          examples    model  shuffled    95% interval",
        "cider                           8    107.0      50.0     40.0 - 62.5",
        "normalised_match_top1k          0        -         -               -",
    ]
    scores["metrics"] = {"vqa_accuracy": part | {"by_type": {"x": part, "": part}}}
    scores.pop("shuffled_metrics")
    assert [line.split()[0] for line in format_table(scores).splitlines()[-3:]] == [
        "vqa_accuracy", "x", "other",
    ]  # fmt: skip
