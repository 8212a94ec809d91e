"""The order of an epoch, on easy-VQA's real questions."""

import json
import random
from pathlib import Path

import pytest

from epalm.train.order import SPREAD, order_of_epoch


@pytest.fixture(scope="module")
def questions(easy_vqa: Path) -> tuple[list[str], list[int]]:
    """Media and length in words of 13,000 questions."""
    rows = json.loads((easy_vqa / "train" / "questions.json").read_text())
    asked = [(str(image), len(text.split())) for text, _, image in rows if image < 1400]
    return [media for media, _ in asked], [length for _, length in asked]


def batches_of(questions: tuple[list[str], list[int]], size: int, seed: int) -> list[list[int]]:
    order = order_of_epoch(*questions, size, 4, random.Random(seed))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


@pytest.mark.parametrize("size", [16, 64])
def test_under_a_twentieth_is_padding(questions: tuple, size: int) -> None:
    media, lengths = questions
    batches = batches_of(questions, size, 0)
    real = sum(lengths[i] for batch in batches for i in batch)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert 1 - real / padded < 0.05
    shared = sum(len(batch) for batch in batches) / sum(
        len({media[i] for i in batch}) for batch in batches
    )
    assert shared > 1.5  # texts about one media in a batch


def test_all_once_shuffled_and_alike_only_in_groups(questions: tuple) -> None:
    media, lengths = questions
    batches = batches_of(questions, 64, 0)
    shown = [i for batch in batches for i in batch]
    assert len(shown) == len(set(shown)) == len(media) // 64 * 64
    assert batches == batches_of(questions, 64, 0) != batches_of(questions, 64, 1)
    means = [sum(lengths[i] for i in batch) / 64 for batch in batches]
    rises = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 0.3 < rises / len(means) < 0.7  # not from short to long


def test_every_example_has_its_turn() -> None:
    """Also the longest, where a batch is large and what is left out is much."""
    media = [str(n // 2) for n in range(100)]
    lengths = list(range(5, 105))
    seen = [set(order_of_epoch(media, lengths, 64, 4, random.Random(n))) for n in range(20)]
    assert {len(epoch) for epoch in seen} == {64}
    assert set.union(*seen) == set(range(100))
    longest = sum(len(epoch & set(range(90, 100))) for epoch in seen)
    assert 90 < longest < 165  # 128 expected, of 200


def test_a_group_is_of_one_media_and_of_like_length() -> None:
    media = ["a"] * 6 + ["b"] * 2
    lengths = [20, 21, 22, 23, 24, 30, 20, 40]
    order = order_of_epoch(media, lengths, 8, 4, random.Random(3))
    places = {index: place for place, index in enumerate(order)}
    assert sorted(places) == list(range(8))
    close = {abs(places[a] - places[b]) for a, b in ((0, 1), (1, 2))}
    assert close == {1}
    assert lengths[2] - lengths[0] <= SPREAD * lengths[2] < lengths[3] - lengths[0]
