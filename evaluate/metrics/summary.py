"""A metric's scores as scores.json holds them."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from epalm.data.example import Example
from epalm.evaluate.metrics.exact import group_rows, rows_by_type
from epalm.evaluate.metrics.interval import confidence_interval
from epalm.evaluate.metrics.scored import Scores


def summarise(scores: Scores, examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """Value, 95% interval and n, overall and for each type of example.

    Returns:
        `value` (None where no example counts), `interval` (low and high, None where fewer than two
        media say anything) and `n`, the examples that count; `by_type` with the same three of each
        question type, and `by` with them of each further type by its name (such as question_type),
        where the examples have types.
    """
    summary = _summarise(scores, examples, range(len(examples)), seed)

    def each(rows_of: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
        return {kind: _summarise(scores, examples, rows, seed) for kind, rows in rows_of.items()}

    kinds = rows_by_type(examples)
    if kinds.keys() - {""}:
        summary["by_type"] = each(kinds)
    names = list(dict.fromkeys(name for example in examples for name in example.types))
    if names:
        summary["by"] = {
            name: each(
                group_rows((r, e.types[name]) for r, e in enumerate(examples) if name in e.types)
            )
            for name in names
        }
    return summary


def _summarise(
    scores: Scores, examples: Sequence[Example], rows: Sequence[int], seed: int
) -> dict[str, Any]:
    chosen = scores.at(rows)
    interval = confidence_interval(chosen, [examples[row].media for row in rows], seed)
    return {
        "value": None if isnan(chosen.value) else chosen.value,
        "interval": interval and list(interval),
        "n": chosen.n,
    }
