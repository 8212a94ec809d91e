"""GQA's consistency (Hudson, Manning 2019); its accuracy is `normalised_match`."""

from collections.abc import Sequence
from math import nan
from statistics import fmean

from epalm.data.example import Example
from epalm.evaluate.metrics.normalised import matches
from epalm.evaluate.metrics.scored import Scores, mean_scores


def gqa_consistency(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """Accuracy on what follows from the questions that were answered rightly.

    Of each right answer, the share of the questions it entails that are answered rightly too;
    averaged over the right answers that entail a question among the examples. The official number
    needs all entailed questions, which only the unbalanced files hold.
    """
    right = matches(predictions, examples)
    of_id = {example.id: match for example, match in zip(examples, right, strict=True)}
    values = []
    for example, match in zip(examples, right, strict=True):
        entailed = [of_id[other] for other in example.entails if other in of_id]
        values.append(fmean(entailed) if match and entailed else nan)
    return mean_scores(values)
