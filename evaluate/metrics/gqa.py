"""GQA's further scores (Hudson, Manning 2019); its accuracy is `normalised_match`.

As its official script has them, but that answers are compared once normalised, as its accuracy is
here. The script's grounding needs maps of a model's attention, which this model has not.
"""

from collections.abc import Callable, Sequence
from math import nan
from statistics import fmean

import numpy as np

from epalm.config import DataConfig
from epalm.data.example import Example
from epalm.data.gqa_extras import Choices, choices_file, global_groups, read_choices
from epalm.data.sources import split_id
from epalm.errors import EpalmError
from epalm.evaluate.metrics.normalise import normalise
from epalm.evaluate.metrics.normalised import matches
from epalm.evaluate.metrics.scored import Floats, Metric, Scores, Setting, mean_scores

COMMON = ("color", "material", "shape")
"""All that can be answered, validly or plausibly, to what two things have in common."""


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
        values.append(fmean(entailed) if match and entailed and _balanced(example) else nan)
    return mean_scores(values)


def gqa_validity(setting: Setting) -> Metric:
    """Share of answers that can be one at all, such as a colour to the question for a colour.

    Raises:
        EpalmError: the split that is evaluated has no file of choices.
    """
    return _belonging(setting, "gqa_validity", lambda choices: choices.valid)


def gqa_plausibility(setting: Setting) -> Metric:
    """Share of answers that make sense in the real world: an apple's colour is not purple.

    Raises:
        EpalmError: the split that is evaluated has no file of choices.
    """
    return _belonging(setting, "gqa_plausibility", lambda choices: choices.plausible)


def gqa_distribution(setting: Setting) -> Metric:
    """How far the answers' distribution is from the references'; the lower the better.

    Of each global group of questions the chi-square statistic of its references' counts, averaged
    with the groups' sizes as weights, over 10,000: a hundredfold is what the official script
    prints. A mean over groups of squares is no function of sums over examples, and resampling
    would raise it: it has no interval.

    Raises:
        EpalmError: the dataset is not GQA's.
    """
    data = _gqas(setting, "gqa_distribution")
    groups: dict[str, dict[str, str]] = {}

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        numbers: dict[tuple[str, str], int] = {}
        rows = np.zeros((len(examples), 3))
        each = np.full(len(examples), nan)
        for row, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
            if example.split not in groups:
                groups[example.split] = global_groups(data, example.split)
            group = groups[example.split].get(_own_id(example))
            if group is None or not _balanced(example):
                continue
            gold, given = normalise(example.references[0]), normalise(prediction)
            rows[row] = [
                numbers.setdefault((group, answer), len(numbers) + 1)
                for answer in ("", gold, given)
            ]
            each[row] = float(gold != given) / 10_000
        return Scores(each, rows, of_rows=_distance)

    return metric


def _distance(rows: Floats) -> float:
    """Of (N, 3) numbers of group, reference and answer; those of a group that is 0 do not count."""
    group, gold, given = rows[rows[:, 0] > 0].astype(np.intp).T
    if not len(group):
        return nan
    answers, first, expected = np.unique(gold, return_index=True, return_counts=True)
    observed = np.bincount(given, minlength=answers.max() + 1)[answers]
    statistics = np.bincount(group[first], (observed - expected) ** 2 / expected)
    sizes = np.bincount(group, minlength=len(statistics))
    return float(statistics @ sizes / sizes.sum() / 10_000)


def _belonging(setting: Setting, name: str, part: Callable[[Choices], tuple[str, ...]]) -> Metric:
    """Whether an answer is one of its question's choices; of questions without, nothing."""
    data = _gqas(setting, name)
    if choices_file(data, setting.split) is None:
        raise EpalmError(
            f"evaluate.metrics: {name} needs the choices of the {setting.split} split, such as "
            f"val_choices.json beside val_balanced_questions.json; {data.path} has none"
        )
    known: dict[str, Choices] = {}

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        new = [e for e in examples if _balanced(e) and _own_id(e) not in known]
        for split in sorted({e.split for e in new}):
            path = choices_file(data, split)
            if path is not None:
                known.update(read_choices(path, [_own_id(e) for e in new if e.split == split]))
        values = []
        for prediction, example in zip(predictions, examples, strict=True):
            own = known.get(_own_id(example))
            if own is None:
                values.append(nan)
                continue
            common = "Common" in example.types["detailed"]
            allowed = COMMON if common else part(own)
            values.append(float(normalise(prediction) in {normalise(a) for a in allowed}))
        return mean_scores(values)

    return metric


def _gqas(setting: Setting, name: str) -> DataConfig:
    """Where GQA's files are; EpalmError where the dataset is another."""
    if setting.data is None or setting.data.kind != "gqa":
        raise EpalmError(f"evaluate.metrics: {name} is read from GQA's own files (data.kind: gqa)")
    return setting.data


def _own_id(example: Example) -> str:
    """Its id in its own dataset."""
    return split_id(example.id)[1] if example.source else example.id


def _balanced(example: Example) -> bool:
    """The official scores are about the balanced questions of a file that holds others too."""
    return example.types.get("balanced") != "no"
