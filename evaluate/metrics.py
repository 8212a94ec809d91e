"""Exact match, by question type, and the blind baseline."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from epalm.data.example import Example


def is_match(prediction: str, references: Sequence[str]) -> bool:
    """Equal to a reference but for case and surrounding white space (paper, section 4)."""
    return prediction.strip().casefold() in {r.strip().casefold() for r in references}


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of exact matches; 0 for no examples."""
    hits = [is_match(p, e.references) for p, e in zip(predictions, examples, strict=True)]
    return sum(hits) / len(hits) if hits else 0.0


def accuracy_by_type(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Share of exact matches for each question type, most frequent type first."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for prediction, example in zip(predictions, examples, strict=True):
        hits[example.type].append(is_match(prediction, example.references))
    by_size = sorted(hits.items(), key=lambda item: (-len(item[1]), item[0]))
    return {kind: sum(found) / len(found) for kind, found in by_size}


def majority_answer(examples: Sequence[Example]) -> str:
    """The most frequent reference of the training examples; of equal ones the first by name."""
    counts = Counter(r for e in examples for r in e.references)
    return min(counts, key=lambda text: (-counts[text], text))
