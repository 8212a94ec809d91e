"""Percentile bootstrap over media, and tests whether two runs differ on the same questions.

Questions about one media are not independent: a picture that the model misreads spoils all of its
questions. Whole media are therefore drawn with replacement, each with all of its examples. Where
every media has one example this is the plain bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, fsum, lgamma, log

import numpy as np
from numpy.typing import NDArray

from epalm.data.grouping import unique_rows
from epalm.evaluate.metrics.scored import Floats, Scores

RESAMPLES = 10_000
COVERAGE = 0.95
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a block of resamples to some tens of MB


def confidence_interval(
    scores: Scores, media: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95% percentile interval of a score; None where fewer than two media have a say.

    None too for a score that cannot be resampled.

    Args:
        media: (N,) media id of each example.
    """
    if scores.of_rows is not None:
        return None
    sums = _sums_by_media(scores.statistics, media)
    sums = sums[sums.any(1)]  # media of which no example counts have no say
    if len(sums) < 2:
        return None
    drawn = [scores.combine(block) for block in _resampled(sums, seed, resamples)]
    return _percentiles(np.concatenate(drawn))


@dataclass(frozen=True)
class Difference:
    """Score of run B less that of run A on the same examples.

    Attributes:
        value: B - A.
        interval: 95% of the paired bootstrap over media.
        p: two-sided, of the paired permutation test over media: how often runs that are
            exchangeable differ at least so much, or leave one of them without a score.
        mcnemar: two-sided p of the exact McNemar test over single examples, for scores that are 0
            or 1 throughout; None for others. It takes examples for independent.
    """

    value: float
    interval: tuple[float, float]
    p: float
    mcnemar: float | None


def compare(
    a: Scores, b: Scores, media: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Difference:
    """Whether two runs differ on the same N examples.

    Raises:
        ValueError: the runs were not scored on the same examples, or on fewer than two media, or
            one of them has no example that counts.
    """
    if a.statistics.shape != b.statistics.shape:
        raise ValueError("the two runs were not scored on the same examples")
    if not (a.n and b.n):
        raise ValueError("a run without a score differs from none")
    sums_a, sums_b = _sums_by_media(a.statistics, media), _sums_by_media(b.statistics, media)
    if len(sums_a) < 2:
        raise ValueError("fewer than two media cannot be resampled")
    width = sums_a.shape[1]

    def difference(sums: Floats) -> Floats:
        return b.combine(sums[..., width:]) - a.combine(sums[..., :width])

    both = np.concatenate([sums_a, sums_b], axis=1)
    drawn = [difference(block) for block in _resampled(both, seed, resamples)]
    observed = float(difference(both.sum(0)))
    at_least = 0
    exchanged = np.concatenate([sums_b, sums_a], axis=1)
    for block in _swapped(both, exchanged, seed, resamples):
        less = np.abs(difference(block)) < abs(observed) - 1e-12  # NaN is not
        at_least += int((~less).sum())
    return Difference(
        observed,
        _percentiles(np.concatenate(drawn)),
        (at_least + 1) / (resamples + 1),  # the observed labelling is one of the permutations
        mcnemar(a, b),
    )


def mcnemar(a: Scores, b: Scores) -> float | None:
    """Exact two-sided McNemar test of two runs' 0/1 scores.

    None where scores are not 0 or 1, or where other examples count in one run than in the other.
    """
    both = np.stack([a.per_example, b.per_example])
    counted = ~np.isnan(both)
    both = both[:, counted.all(0)]
    if (counted[0] != counted[1]).any() or not np.isin(both, (0.0, 1.0)).all():
        return None
    only_a, only_b = int((both[0] > both[1]).sum()), int((both[1] > both[0]).sum())
    trials = only_a + only_b
    # binomial(trials, 1/2) up to the smaller count, in logarithms, since 2**trials overflows
    tail = fsum(
        exp(lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1) - trials * log(2))
        for k in range(min(only_a, only_b) + 1)
    )
    return min(1.0, 2 * tail)


def _sums_by_media(statistics: Floats, media: Sequence[str]) -> Floats:
    """(N, K) statistics summed over the examples of each of M media: (M, K)."""
    names, rows = unique_rows(media)
    sums = np.zeros((len(names), statistics.shape[1]))
    np.add.at(sums, rows, statistics)
    return sums


def _blocks(media: int, resamples: int) -> Iterator[int]:
    size = max(1, _DRAWS_AT_ONCE // media)
    for begin in range(0, resamples, size):
        yield min(size, resamples - begin)


def _resampled(sums: Floats, seed: int, resamples: int) -> Iterator[Floats]:
    """Sums over M media drawn with replacement, in blocks (R, K) of resamples."""
    generator = np.random.default_rng(seed)
    count = len(sums)
    for size in _blocks(count, resamples):
        draws = generator.integers(count, size=(size, count), dtype=np.int32)
        yield np.stack([column[draws].sum(1) for column in sums.T], axis=1)


def _swapped(sums: Floats, exchanged: Floats, seed: int, resamples: int) -> Iterator[Floats]:
    """Sums over M media after the two runs change places in a random half of them, in blocks."""
    generator = np.random.default_rng(seed)
    base, change = sums.sum(0), exchanged - sums
    for size in _blocks(len(sums), resamples):
        swaps = generator.integers(2, size=(size, len(sums)), dtype=np.int8)
        yield base + swaps.astype(np.float64) @ change


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50 * (1 - COVERAGE)
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
