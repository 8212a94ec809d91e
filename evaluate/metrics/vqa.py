"""VQA v2 accuracy over ten human answers, as the official script computes it."""

from collections.abc import Callable, Sequence

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.normalise import normalise, strip_punctuation, trim
from epalm.evaluate.metrics.scored import Metric, Scores, Setting, mean_scores

NEEDED = 3  # other people whose agreement makes an answer fully right


def vqa_accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """The script as it stands since March 2021.

    Prediction and answers are normalised alike, and neither where the answers are all equal.

    Raises:
        EpalmError: an example has too few answers for a full score.
    """
    return _score(predictions, examples, _both_alike)


def vqa_accuracy_2017(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """The script before, by which the paper's numbers were made (convention 29).

    The prediction is always normalised. Of the answers only the punctuation is, and only where
    they are not all equal: a prediction "none" becomes "0" and matches no answer "none".

    Raises:
        EpalmError: an example has too few answers for a full score.
    """
    return _score(predictions, examples, _prediction_first)


def for_ten_answers(metric: Metric, setting: Setting) -> Metric:
    """One of the two; EpalmError where an example that may be scored has too few answers."""
    for example in setting.scored:
        _require_people(example)
    return metric


def leave_one_out(matches: int, answers: int) -> float:
    """Mean over `answers` people of min(1, n/3); n of the others gave the predicted answer.

    The `matches` people who gave it themselves see one less among the others.
    """
    agree, differ = min(1.0, (matches - 1) / NEEDED), min(1.0, matches / NEEDED)
    return (matches * agree + (answers - matches) * differ) / answers


def _score(
    predictions: Sequence[str],
    examples: Sequence[Example],
    prepare: Callable[[str, Sequence[str]], tuple[str, Sequence[str]]],
) -> Scores:
    values = []
    for prediction, example in zip(predictions, examples, strict=True):
        _require_people(example)
        given, answers = prepare(prediction, example.references)
        values.append(leave_one_out(answers.count(given), len(answers)))
    return mean_scores(values)


def _require_people(example: Example) -> None:
    if len(example.references) <= NEEDED:
        raise EpalmError(
            f"evaluate.metrics: VQA accuracy compares with ten human answers; example "
            f"{example.id} has {len(example.references)}: use exact_match"
        )


def _both_alike(prediction: str, answers: Sequence[str]) -> tuple[str, Sequence[str]]:
    prediction, answers = trim(prediction), [trim(a) for a in answers]
    if len(set(answers)) == 1:
        return prediction, answers
    return normalise(prediction), [normalise(a) for a in answers]


def _prediction_first(prediction: str, answers: Sequence[str]) -> tuple[str, Sequence[str]]:
    if len(set(answers)) > 1:
        answers = [strip_punctuation(a) for a in answers]
    return normalise(prediction), answers
