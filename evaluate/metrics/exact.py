"""Strict comparison with the references, by question type, and the blind baseline."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from epalm.data.example import Example
from epalm.evaluate.metrics.scored import Scores, mean_scores


def is_match(prediction: str, references: Sequence[str]) -> bool:
    """Equal to a reference but for case and surrounding white space."""
    return prediction.strip().casefold() in {r.strip().casefold() for r in references}


def exact_match(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """1 for a prediction that `is_match`."""
    return mean_scores(
        [is_match(p, e.references) for p, e in zip(predictions, examples, strict=True)]
    )


def strict_match(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """The paper's open-ended protocol: character by character, nothing cut off (sections 4, 4.1.2).

    Only the white space around the prediction is dropped: a word that opens an answer carries a
    space in most tokenizers, and the reference's own comparison, which keeps it, never matches
    (its bug 15).
    """
    return mean_scores(
        [p.strip() in {r.strip() for r in e.references}
         for p, e in zip(predictions, examples, strict=True)]
    )  # fmt: skip


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of exact matches; 0 for no examples."""
    return exact_match(predictions, examples).value if examples else 0.0


def accuracy_by_type(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Share of exact matches for each question type, most frequent type first."""
    scores = exact_match(predictions, examples)
    return {kind: scores.at(rows).value for kind, rows in rows_by_type(examples).items()}


def rows_by_type(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Positions of the examples of each question type, most frequent type first."""
    return group_rows((row, example.type) for row, example in enumerate(examples))


def group_rows(kinds: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """Positions by their kind; the most frequent kind first, of equal ones the first by name."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, kind in kinds:
        rows[kind].append(row)
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])))


def majority_answer(examples: Sequence[Example]) -> str:
    """The most frequent reference of the training examples; of equal ones the first by name."""
    counts = Counter(r for e in examples for r in e.references)
    return min(counts, key=lambda text: (-counts[text], text))
