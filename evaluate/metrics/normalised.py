"""GQA and video QA as the reference scores them: normalised, then exact (convention 29)."""

from collections import Counter
from collections.abc import Sequence
from math import nan

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.normalise import normalise
from epalm.evaluate.metrics.scored import Metric, Scores, Setting, mean_scores

MOST_FREQUENT = 1000


def normalised_match(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """Share of predictions equal to a reference once both are normalised as VQA answers are."""
    return mean_scores(matches(predictions, examples))


def normalised_match_top1k(setting: Setting) -> Metric:
    """`normalised_match` of the questions whose answer is among the most frequent ones in training.

    The paper's Table 5 marks these scores with a dagger. Other questions do not count. A classifier
    over the same answers that is asked all questions, as in closed-vocabulary work, would have this
    score times n over all.

    Raises:
        EpalmError: there are no training examples to count answers in.
    """
    if not setting.training:
        raise EpalmError(
            "evaluate.metrics: normalised_match_top1k counts the dataset's training answers, and "
            "it has no train split; use normalised_match"
        )
    known = most_frequent(setting.training, MOST_FREQUENT)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        return mean_scores(
            [
                match if known.intersection(normalise(r) for r in example.references) else nan
                for match, example in zip(matches(predictions, examples), examples, strict=True)
            ]
        )

    return metric


def most_frequent(examples: Sequence[Example], count: int) -> frozenset[str]:
    """The `count` most frequent normalised references; of equal ones the first by name."""
    counts = Counter(normalise(r) for e in examples for r in e.references)
    return frozenset(sorted(counts, key=lambda text: (-counts[text], text))[:count])


def matches(predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 or 0 for each example: whether prediction and a reference are equal once normalised."""
    return [
        float(normalise(prediction) in {normalise(r) for r in example.references})
        for prediction, example in zip(predictions, examples, strict=True)
    ]
