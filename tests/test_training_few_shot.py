"""The few-shot choice: seeded, nested, balanced where asked for, and what it cannot be."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from epalm.config import DataConfig, load_recipe
from epalm.data import easy_vqa as easy
from epalm.data import load_dataset
from epalm.data.example import Dataset, Example
from epalm.errors import EpalmError

Toy = Callable[..., Path]


@pytest.fixture(scope="module")
def dataset(easy_vqa: Path) -> Dataset:
    return easy.load(DataConfig(kind="easy-vqa", path=str(easy_vqa)))


def chosen(dataset: Dataset) -> set[str]:
    return {e.id for e in dataset.split("train")}


@pytest.mark.parametrize("balanced", [False, True])
def test_it_is_seeded_and_nested(dataset: Dataset, balanced: bool) -> None:
    small, large, other = (
        dataset.few_shot(count, balanced, seed) for count, seed in ((40, 0), (400, 0), (40, 1))
    )
    assert len(chosen(small)) == 40 and len(chosen(large)) == 400
    assert chosen(small) < chosen(large)
    assert chosen(other) != chosen(small)
    turned = replace(dataset, examples=dataset.examples[::-1])
    assert chosen(turned.few_shot(40, balanced, 0)) == chosen(small)
    assert small.split("test") == dataset.split("test")
    assert small.media.keys() == {e.media for e in small.examples}
    everything = dataset.few_shot(len(dataset.split("train")), balanced, 0)
    assert everything.examples == dataset.examples


def test_balanced_has_as_many_of_each_answer_while_they_last(dataset: Dataset) -> None:
    there = Counter(e.references[0] for e in dataset.split("train"))
    assert len(there) == 13
    for count in (1, 13, 30, 20000):
        taken = Counter(e.references[0] for e in dataset.few_shot(count, True, 0).split("train"))
        most = max(taken.values())
        assert all(taken[a] >= min(most - 1, there[a]) for a in there), count
    # unbalanced, yes and no are most of it
    plain = Counter(e.references[0] for e in dataset.few_shot(130, False, 0).split("train"))
    assert max(plain.values()) > 30


def test_an_example_counts_for_its_most_frequent_answer() -> None:
    answers = [("no", "yes", "yes"), ("yes",), ("yes",), ("no", "no", "yes")]
    examples = tuple(Example(str(i), "m", "?", a, "train") for i, a in enumerate(answers))
    for seed in range(20):
        some = Dataset("d", examples, {}, None).few_shot(2, True, seed)
        assert "3" in chosen(some)


@pytest.mark.parametrize(
    ("few_shot", "words"),
    [
        (
            {"count": 100000},
            r"data\.few_shot\.count: 100000 wanted, the dataset has only \d+ ",
        ),
        ({"fraction": 0.001}, r"data\.few_shot\.fraction: 0\.001 of \d+ training examples is none"),
        ({"fraction": 1.5}, r"data\.few_shot\.fraction: .* less than or equal to 1"),
        ({"fraction": 0.0}, r"data\.few_shot\.fraction: .* greater than 0"),
        ({"count": 0}, r"data\.few_shot\.count: .* greater than 0"),
        ({"count": 3, "fraction": 0.5}, r"data\.few_shot: .* fraction or count, not both"),
        ({"balanced": True}, r"data\.few_shot: .* give fraction or count too"),
        ({"counts": 3}, r"data\.few_shot\.counts: unknown key; did you mean count\?"),
    ],
)
def test_what_it_cannot_be(toy: Toy, few_shot: dict[str, object], words: str) -> None:
    with pytest.raises(EpalmError, match=words):
        load_dataset(load_recipe(toy(data={"few_shot": few_shot})))


def test_a_run_extracts_and_learns_from_the_choice_alone(
    toy: Toy, cli: Callable[..., Result], tmp_path: Path
) -> None:
    path = toy(data={"few_shot": {"count": 3, "balanced": True}}, train={"batch_size": 2})
    data = load_dataset(load_recipe(path))
    training = {e.media for e in data.split("train")}
    assert len(training) <= 3
    done = cli("run", path, "--set", "evaluate.control=false")
    assert done.exit_code == 0, done.output
    assert f"{len(training) + 4} media in" in done.output  # 4: of val and test
    scores = json.loads((tmp_path / "runs" / "toy" / "scores.json").read_text())
    assert scores["examples"] == len(data.split("test"))
    half = load_dataset(load_recipe(path, ("data.few_shot={fraction: 0.5}",)))
    whole = load_dataset(load_recipe(path, ("data.few_shot={}",)))
    assert len(half.split("train")) == round(len(whole.split("train")) / 2)
