"""Confidence intervals and comparisons: against loops, and against what they promise."""

from itertools import product

import numpy as np
import pytest

from epalm.data.example import Example
from epalm.evaluate.metrics.captions import bleu
from epalm.evaluate.metrics.interval import compare, confidence_interval, mcnemar
from epalm.evaluate.metrics.scored import Scores, Setting, mean_scores


def names(count: int, media: int) -> list[str]:
    return [f"m{i % media}" for i in range(count)]


def test_interval_is_that_of_a_loop_over_resamples() -> None:
    rng = np.random.default_rng(0)
    values, media = rng.random(60), names(60, 20)
    fast = confidence_interval(mean_scores(values), media, seed=1, resamples=20_000)
    groups = [values[np.array(media) == f"m{m}"] for m in range(20)]
    slow = [
        np.concatenate([groups[m] for m in rng.integers(20, size=20)]).mean() for _ in range(20_000)
    ]
    assert fast == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.004)


def test_interval_is_seeded() -> None:
    scores, media = mean_scores(np.arange(50) % 2), names(50, 50)
    first = confidence_interval(scores, media, seed=3)
    assert first == confidence_interval(scores, media, seed=3)
    assert first != confidence_interval(mean_scores(np.arange(50) % 3), media, seed=3)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    media = [f"m{i}" for i in range(200)]
    held = 0
    for trial in range(200):
        low, high = confidence_interval(
            mean_scores(rng.random(200) < 0.3), media, seed=trial, resamples=400
        )
        held += low <= 0.3 <= high
    assert 180 <= held <= 199  # of 200; 95% is 190


def test_questions_about_one_media_do_not_count_as_independent() -> None:
    """Ten copies of each answer say no more than one, and the interval knows."""
    once = mean_scores(np.arange(40) % 2)
    tenfold = mean_scores(np.repeat(np.arange(40) % 2, 10))
    media = [f"m{i}" for i in range(40)]
    copied = [m for m in media for _ in range(10)]
    assert confidence_interval(tenfold, copied, seed=0) == confidence_interval(once, media, seed=0)
    apart = confidence_interval(tenfold, [str(i) for i in range(400)], seed=0)
    assert apart[1] - apart[0] < 0.12 < 0.28 < np.diff(confidence_interval(once, media, 0))[0]


def test_one_media_has_no_interval() -> None:
    assert confidence_interval(mean_scores([1.0, 0.0]), ["a", "a"], seed=0) is None
    assert confidence_interval(mean_scores([np.nan, np.nan]), ["a", "b"], seed=0) is None
    assert confidence_interval(mean_scores([1.0, np.nan]), ["a", "b"], seed=0) is None


def test_interval_of_corpus_bleu_is_that_of_bleu_recomputed() -> None:
    rng = np.random.default_rng(4)
    words = np.array("a man rides brown horse on the beach with dog".split())
    texts = [" ".join(rng.choice(words, 9)) for _ in range(30)]
    examples = [
        Example(str(i), f"m{i}", "", (" ".join(rng.choice(words, 9)), t), "test")
        for i, t in enumerate(texts)
    ]
    predictions = [" ".join([*t.split()[: rng.integers(4, 9)], "dog"]) for t in texts]
    metric = bleu(4, Setting())
    scores = metric(predictions, examples)
    interval = confidence_interval(scores, [e.media for e in examples], seed=0, resamples=2000)
    slow = []
    for _ in range(400):
        rows = rng.integers(30, size=30)
        slow.append(metric([predictions[r] for r in rows], [examples[r] for r in rows]).value)
    assert interval[0] < scores.value < interval[1]
    assert interval == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.04)


def test_permutation_p_is_that_of_all_permutations() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(10), rng.random(10) + 0.15
    differences = b - a
    signs = np.array(list(product((1, -1), repeat=10)))
    exact = np.mean(np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12)
    found = compare(mean_scores(a), mean_scores(b), names(10, 10), seed=0, resamples=20_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.value == pytest.approx(differences.mean())
    assert found.interval[0] < found.value < found.interval[1]
    assert found.mcnemar is None


def test_what_leaves_a_run_without_a_score_is_no_evidence() -> None:
    """Of 16 exchanges 2 are as far apart as the runs are, and 2 leave one of them nothing."""
    none = np.nan
    a, b = mean_scores([0, 0, none, none]), mean_scores([none, none, 1, 1])
    found = compare(a, b, names(4, 4), seed=0)
    assert (found.value, found.mcnemar) == (1, None)
    assert found.p == pytest.approx(4 / 16, abs=0.02)
    with pytest.raises(ValueError, match="without a score"):
        compare(a, mean_scores([none] * 4), names(4, 4), seed=0)


def test_equal_runs_do_not_differ_and_clear_ones_do() -> None:
    right = mean_scores(np.arange(100) % 2)
    same = compare(right, right, names(100, 100), seed=0, resamples=500)
    assert (same.value, same.interval, same.p, same.mcnemar) == (0, (0, 0), 1, 1)
    better = compare(right, mean_scores(np.ones(100)), names(100, 100), seed=0, resamples=500)
    assert better.p < 0.01 and better.interval[0] > 0 and better.mcnemar < 1e-6


def test_p_is_uniform_where_runs_are_exchangeable() -> None:
    rng = np.random.default_rng(6)
    media = names(50, 50)
    below = sum(
        compare(
            mean_scores(rng.random(50)), mean_scores(rng.random(50)), media, seed, resamples=200
        ).p
        < 0.1
        for seed in range(200)
    )
    assert 8 <= below <= 34  # of 200; 10% is 20


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (6, 6), (0, 12)])
def test_mcnemar_is_the_binomial_tail(only_a: int, only_b: int) -> None:
    a = mean_scores([1] * only_a + [0] * only_b + [1, 1, 0])
    b = mean_scores([0] * only_a + [1] * only_b + [1, 1, 0])
    trials = only_a + only_b
    flips = np.array(list(product((0, 1), repeat=trials))).sum(1)
    expected = min(1.0, 2 * np.mean(flips <= min(only_a, only_b))) if trials else 1.0
    assert mcnemar(a, b) == pytest.approx(expected)


def test_mcnemar_of_many_examples() -> None:
    a, b = mean_scores([1, 0] * 50_000), mean_scores([0, 1] * 49_500 + [1, 1] * 500)
    assert 0 <= mcnemar(a, b) < 1


def test_runs_must_be_of_the_same_examples() -> None:
    with pytest.raises(ValueError, match="same examples"):
        compare(mean_scores([1.0, 0.0]), mean_scores([1.0]), ["x", "y"], seed=0)


def test_runs_in_which_other_examples_count() -> None:
    """As in consistency, which is about each run's own right answers."""
    a, b = mean_scores([1.0, 0.0, np.nan]), mean_scores([np.nan, 1.0, 1.0])
    found = compare(a, b, ["x", "y", "z"], seed=0, resamples=500)
    assert (found.value, found.mcnemar) == (0.5, None)


def test_scores_of_some_rows() -> None:
    scores = mean_scores([1.0, 0.0, np.nan, 0.5])
    assert isinstance(scores.at([0, 2, 3]), Scores)
    assert (scores.at([0, 2, 3]).value, scores.at([0, 2, 3]).n) == (0.75, 2)
