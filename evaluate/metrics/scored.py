"""What a metric makes of predictions: a value per example, and sums that the score follows from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from epalm.config import DataConfig
from epalm.data.example import Example

Floats = NDArray[np.float64]


def mean_of_sums(sums: Floats) -> Floats:
    """(…, 2) sums of value and count -> (…,) means; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Scores:
    """One metric of N predictions.

    Nearly all scores we report are functions of sums over examples, so that one resampling routine
    serves them: the mean of per-example values, and corpus BLEU, whose n-gram counts are summed.

    Attributes:
        per_example: (N,) value of each prediction alone; NaN where the metric leaves it out.
        statistics: (N, K) what is summed over examples.
        combine: (…, K) sums -> (…,) score.
        of_rows: (N, K) statistics -> score, of a metric that is no function of sums; it cannot be
            resampled, and has no interval.
    """

    per_example: Floats
    statistics: Floats
    combine: Callable[[Floats], Floats] = mean_of_sums
    of_rows: Callable[[Floats], float] | None = None

    @property
    def value(self) -> float:
        """The score of all examples; NaN when none is counted."""
        if self.of_rows is not None:
            return self.of_rows(self.statistics)
        return float(self.combine(self.statistics.sum(0)))

    @property
    def n(self) -> int:
        """Examples that count."""
        return int((~np.isnan(self.per_example)).sum())

    def at(self, rows: Sequence[int]) -> "Scores":
        """The same metric of these examples only."""
        chosen = np.asarray(rows, dtype=np.intp)
        return replace(
            self, per_example=self.per_example[chosen], statistics=self.statistics[chosen]
        )


Metric = Callable[[Sequence[str], Sequence[Example]], Scores]


def mean_scores(values: Sequence[float] | Floats) -> Scores:
    """A metric that is the mean of per-example values; NaN marks an example that does not count."""
    each = np.asarray(values, dtype=np.float64)
    counted = ~np.isnan(each)
    return Scores(each, np.stack([np.where(counted, each, 0.0), counted], axis=1))


@dataclass(frozen=True)
class Setting:
    """What a metric may need beside predictions and examples.

    Attributes:
        training: the dataset's training examples; may be empty.
        scored: its examples that may be scored; may be empty.
        official: tokenize captions with Stanford's Java program.
        data: the dataset's, for metrics that read more of its files.
        split: that is evaluated.
    """

    training: Sequence[Example] = ()
    scored: Sequence[Example] = ()
    official: bool = False
    data: DataConfig | None = None
    split: str = "test"
