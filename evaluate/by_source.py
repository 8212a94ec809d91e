"""What is scored source by source, where a recipe has several."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import nan

import numpy as np

from epalm.config import Recipe
from epalm.data.example import Dataset, Example
from epalm.data.sources import naming
from epalm.evaluate.control import shuffled_media
from epalm.evaluate.metrics import default_metrics, majority_answer, make_metrics
from epalm.evaluate.metrics.scored import Metric, Scores, Setting, mean_scores


def metrics_of(recipe: Recipe, dataset: Dataset) -> dict[str, dict[str, Metric]]:
    """By source, the recipe's metrics or the default ones of its dataset.

    Each is about that source's examples, and leaves the others out.

    Raises:
        EpalmError: one of them cannot be had.
    """
    if not recipe.also:
        return {"": _metrics(recipe, dataset.examples)}
    found = {}
    for source, alone in recipe.sources().items():
        own = [e for e in dataset.examples if e.source == source]
        with naming(source, True):
            metrics = _metrics(alone, own)
        found[source] = {name: _restricted(metric, source) for name, metric in metrics.items()}
    return found


def control_media(examples: Sequence[Example], seed: int) -> dict[str, str]:
    """For each media another one of its source; see `shuffled_media`."""
    media_of: dict[str, str] = {}
    for own in _by_source(examples).values():
        media_of |= shuffled_media((e.media for e in own), seed)
    return media_of


def majority_answers(training: Sequence[Example]) -> dict[str, str]:
    """By source, the answer that its training examples have most often."""
    return {source: majority_answer(own) for source, own in _by_source(training).items()}


def _metrics(recipe: Recipe, examples: Sequence[Example]) -> dict[str, Metric]:
    config = recipe.evaluate
    training = [e for e in examples if e.split == "train"]
    scored = [e for e in examples if e.split in ("val", config.split)]
    setting = Setting(training, scored, config.official, recipe.data, config.split)
    names = config.metrics
    if names is None:
        names = default_metrics(examples, setting)
    return make_metrics(names, setting)


def _restricted(metric: Metric, source: str) -> Metric:
    """The metric of a source's examples, among those of others."""

    def restricted(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        rows = [row for row, example in enumerate(examples) if example.source == source]
        if not rows:
            return mean_scores([nan] * len(examples))
        own = metric([predictions[row] for row in rows], [examples[row] for row in rows])
        values = np.full(len(examples), nan)
        values[rows] = own.per_example
        statistics = np.zeros((len(examples), own.statistics.shape[1]))
        statistics[rows] = own.statistics
        return replace(own, per_example=values, statistics=statistics)

    return restricted


def _by_source(examples: Sequence[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[example.source].append(example)
    return found
