"""Generation over a dataset, scores, the control, and what a run folder shows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.control import shuffled_media
from epalm.evaluate.figures import draw_loss
from epalm.evaluate.metrics import accuracy, accuracy_by_type, is_match, majority_answer
from epalm.evaluate.scores import choose_examples, evaluate
from epalm.evaluate.table import format_table
from epalm.extract.loop import extract
from epalm.train.parts import Parts, assemble
from epalm.train.run import Run
from tests.conftest import fit


@pytest.fixture
def trained(toy: Callable[..., Path]) -> tuple[Run, Parts]:
    recipe = load_recipe(toy(), ("train.steps=30", "train.lr=0.03", "variant.prompt_mlp=false"))
    extract(recipe, load_dataset(recipe))
    parts = assemble(recipe)
    run = Run.create(recipe)
    fit(run, parts, None)
    return run, parts


def example(number: int, answers: tuple[str, ...], kind: str = "") -> Example:
    return Example(str(number), "m", "?", answers, "test", kind)


def test_exact_match() -> None:
    assert is_match(" Red", ["blue", "red"])
    assert not is_match("reddish", ["red"])
    assert not is_match("", ["red"])


def test_accuracies_and_majority() -> None:
    examples = [example(0, ("a",), "x"), example(1, ("b", "B2"), "y"), example(2, ("b",), "y")]
    assert accuracy(["a", "b2", "c"], examples) == pytest.approx(2 / 3)
    assert accuracy_by_type(["a", "b2", "c"], examples) == {"y": 0.5, "x": 1.0}
    assert accuracy([], []) == 0.0
    assert majority_answer(examples) == "b"


def test_control_shows_every_example_another_media() -> None:
    media = [f"{i}.png" for i in range(50)]
    shown = shuffled_media(media, seed=0)
    assert sorted(shown) == sorted(shown.values()) == sorted(media)
    assert all(key != value for key, value in shown.items())
    assert shown == shuffled_media(reversed(media), seed=0) != shuffled_media(media, seed=1)


def test_choice_of_examples_is_seeded() -> None:
    examples = [example(i, ("a",)) for i in range(30)]
    assert choose_examples(examples, 5, 0) == choose_examples(examples, 5, 0)
    assert choose_examples(examples, 5, 0) != choose_examples(examples, 5, 1)
    assert choose_examples(examples, None, 0) == choose_examples(examples, 99, 0) == examples


def test_scores_and_predictions_agree(trained: tuple[Run, Parts]) -> None:
    run, parts = trained
    scores = evaluate(run, parts)
    assert scores == json.loads(run.scores.read_text())
    assert {
        "accuracy", "accuracy_by_type", "shuffled_accuracy", "majority_accuracy",
        "trained_parameters", "total_parameters", "seconds",
    } <= scores.keys()  # fmt: skip
    examples = parts.dataset.split("test")
    rows = [
        json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in rows] == [e.id for e in examples]
    assert scores["accuracy"] == sum(row["match"] for row in rows) / len(rows)
    for column in ("", "shuffled_"):
        found = scores[f"{column}metrics"]["exact_match"]
        assert (found["value"], found["n"]) == (scores[f"{column}accuracy"], len(rows))
        assert found["interval"][0] <= found["value"] <= found["interval"][1]
    control = [
        json.loads(line)
        for line in (run.folder / "predictions-shuffled.jsonl").read_text().splitlines()
    ]
    assert all(
        a["media"] != b["media"] and a["id"] == b["id"] for a, b in zip(rows, control, strict=True)
    )
    assert {"train", "evaluate", "control"} <= scores["seconds"].keys()
    trained_count = sum(p.numel() for p in parts.model.trained.parameters())
    assert scores["trained_parameters"] == trained_count
    lm = sum(p.numel() for p in parts.model.lm.parameters())
    assert scores["total_parameters"] == lm + trained_count + parts.features.spec.encoder_parameters


def test_evaluating_twice_gives_the_same(trained: tuple[Run, Parts]) -> None:
    run, parts = trained
    first, second = evaluate(run, parts), evaluate(run, parts)
    assert first | {"seconds": 0, "rates": 0} == second | {"seconds": 0, "rates": 0}


def test_missing_split(trained: tuple[Run, Parts]) -> None:
    run, parts = trained
    parts = replace(
        parts, dataset=parts.dataset.without_media(e.media for e in parts.dataset.split("test"))
    )
    with pytest.raises(EpalmError, match="the dataset has no test examples"):
        evaluate(run, parts)


def test_table_is_made_of_the_scores() -> None:
    table = format_table(
        {
            "seconds": {"extract": 12.34, "train": 100.0},
            "rates": {"extract": "50 media/s", "train": "20 examples/s"},
            "trained_parameters": 1_000,
            "total_parameters": 100_000,
            "split": "test",
            "examples": 4,
            "examples_by_type": {"a": 3, "": 1},
            "accuracy": 0.75,
            "accuracy_by_type": {"a": 1.0, "": 0.0},
            "majority_accuracy": 0.5,
            "majority_accuracy_by_type": {"a": 0.5, "": 0.5},
        }
    )
    for line in (
        "extract          12.3  50 media/s",
        "trained parameters: 1,000 of 100,000 (1.00%)",
        "overall                 4    75.0%         -     50.0%",
        "other                   1     0.0%         -     50.0%",
    ):
        assert line in table.splitlines()


def test_loss_curve(trained: tuple[Run, Parts]) -> None:
    run, _ = trained
    with Image.open(draw_loss(run)) as picture:
        assert picture.size == (1380, 450)
