"""Scoring a run: predictions, scores and the shuffled-media control."""

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from accelerate.utils import broadcast_object_list

from epalm.config import Recipe
from epalm.data.example import SPLITS, Dataset, Example
from epalm.errors import EpalmError
from epalm.evaluate.by_source import control_media, majority_answers, metrics_of
from epalm.evaluate.generation import generate_answers
from epalm.evaluate.metrics import accuracy, accuracy_by_type, is_match
from epalm.evaluate.metrics.scored import Metric, Scores
from epalm.evaluate.metrics.summary import summarise
from epalm.evaluate.partial import PartialAnswers, binding_of, discard_partial
from epalm.store.stage import Stage
from epalm.train.parts import Parts
from epalm.train.run import Run


def evaluate(
    run: Run,
    parts: Parts,
    step: int | None = None,
    present: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Score the model that `parts` holds, and write predictions and scores into the run folder.

    The scores are written last: where they are, all else is there and about the same answers. Until
    then the answers are kept, so that an evaluation that is interrupted has them.

    Args:
        step: of the training, that the model's weights are of; None: unknown.
        present: writes what else is to be written about the scores.

    Raises:
        EpalmError: the dataset has no examples of the split, or a metric cannot be computed.
    """
    config = run.recipe.evaluate
    run.writes = parts.accelerator.is_main_process
    # of several processes, one scores: some metrics take a process of their own and much memory
    metrics = evaluation_metrics(run.recipe, parts.dataset) if run.writes else {}
    run.bind_features(parts.features.spec)
    examples = evaluation_examples(run.recipe, parts.dataset)
    predictions = _timed_answers(run, parts, examples, None, "evaluate")
    scored = _scored(metrics, predictions, examples)
    files = {"predictions.jsonl": _lines(examples, predictions, None, scored)}
    scores: dict[str, Any] = {
        "split": config.split,
        "examples": len(examples),
        "media": len({e.media for e in examples}),
        "accuracy": accuracy(predictions, examples),
        "accuracy_by_type": accuracy_by_type(predictions, examples),
        "examples_by_type": _sizes(examples),
        "metrics": _summaries(scored, examples, run.recipe.data_seed),
    }
    if config.control:
        media_of = control_media(examples, run.recipe.seed)
        shuffled = _timed_answers(run, parts, examples, media_of, "control")
        scored = _scored(metrics, shuffled, examples)
        files["predictions-shuffled.jsonl"] = _lines(examples, shuffled, media_of, scored)
        scores["shuffled_accuracy"] = accuracy(shuffled, examples)
        scores["shuffled_accuracy_by_type"] = accuracy_by_type(shuffled, examples)
        scores["shuffled_metrics"] = _summaries(scored, examples, run.recipe.data_seed)
    training = parts.dataset.split("train")
    if training:
        answers = majority_answers(training)
        majority = [answers.get(e.source, "") for e in examples]
        scores["majority_answer"] = answers.get("", answers)
        scores["majority_accuracy"] = accuracy(majority, examples)
        scores["majority_accuracy_by_type"] = accuracy_by_type(majority, examples)
    scores["trained_parameters"] = parts.trained_parameters
    scores["total_parameters"] = parts.total_parameters
    scores["step"] = step
    scores["decode"] = run.recipe.decode.model_dump()
    scores["evaluate"] = config.model_dump(mode="json")
    scores["changes"] = run.changes()
    stages = {k: v for k, v in run.stages().items() if config.control or k != "control"}
    scores["seconds"] = {name: stage.seconds for name, stage in stages.items()}
    scores["rates"] = {name: stage.rate for name, stage in stages.items()}
    if run.writes:
        run.scores.unlink(missing_ok=True)  # they would be of other answers
        for name, text in files.items():
            run.write(run.folder / name, text)
        if present is not None:
            present(scores)
        run.write(run.scores, json.dumps(scores, indent=2))
        discard_partial(run.folder)
    return scores


def validate(parts: Parts) -> float:
    """The recipe's first metric on its validation examples (convention 30); 0 where none counts.

    Of several sources, the mean over those that have such examples. Several processes share the
    examples; the main one scores the answers of all, and all return its number: they must agree on
    which checkpoint is best and when patience ends.
    """
    recipe = parts.recipe
    examples = choose_examples(
        parts.dataset.split("val"), recipe.train.val_examples, recipe.data_seed
    )
    answers = _answers(parts, examples, None, "validate")
    main = parts.accelerator.is_main_process
    score = _validation_score(parts, answers, examples) if main else None
    return float(broadcast_object_list([score])[0])


def _validation_score(parts: Parts, answers: Sequence[str], examples: Sequence[Example]) -> float:
    recipe = parts.recipe
    first = [next(iter(own.values())) for own in metrics_of(recipe, parts.dataset).values()]
    scores = [metric(answers, examples) for metric in first]
    values = [each.value for each in scores if each.n]
    return statistics.fmean(values) if values else 0.0


def evaluation_metrics(recipe: Recipe, dataset: Dataset) -> dict[str, Metric]:
    """The recipe's metrics, or its dataset's default ones; EpalmError when one cannot be had.

    Of several sources, those of each, as `SOURCE: NAME`.
    """
    return {
        f"{source}: {name}" if source else name: metric
        for source, metrics in metrics_of(recipe, dataset).items()
        for name, metric in metrics.items()
    }


def evaluation_examples(recipe: Recipe, dataset: Dataset) -> Sequence[Example]:
    """The examples that a recipe's evaluation is about; EpalmError when there are none."""
    config = recipe.evaluate
    examples = choose_examples(dataset.split(config.split), config.examples, recipe.data_seed)
    if not examples:
        held = ", ".join(s for s in SPLITS if dataset.split(s)) or "none"
        raise EpalmError(
            f"evaluate.split: the dataset has no {config.split} examples; splits it has: {held}"
        )
    return examples


def choose_examples(examples: Sequence[Example], count: int | None, seed: int) -> Sequence[Example]:
    """A seeded choice of so many examples; None or too many: all."""
    if count is None or count >= len(examples):
        return examples
    return random.Random(f"{seed} examples").sample(list(examples), count)


def _timed_answers(
    run: Run,
    parts: Parts,
    examples: Sequence[Example],
    media_of: Mapping[str, str] | None,
    label: str,
) -> list[str]:
    """Answers, those that an interrupted evaluation has left among them."""
    media = [e.media if media_of is None else media_of[e.media] for e in examples]
    shown = [(each, parts.features.content_hash(each)) for each in media]
    binding = binding_of(run.recipe, parts.features.spec.canonical(), parts.model, examples, shown)
    place, places = parts.accelerator.process_index, parts.accelerator.num_processes
    partial = PartialAnswers(run.folder, label, binding, place, places)
    before, start = partial.seconds, time.perf_counter()
    answers = _answers(parts, examples, media_of, label, partial)
    seconds = before + time.perf_counter() - start
    run.add_stage(label, Stage(round(seconds, 2), f"{len(examples) / seconds:.1f} examples/s"))
    return answers


def _answers(
    parts: Parts,
    examples: Sequence[Example],
    media_of: Mapping[str, str] | None,
    label: str,
    partial: PartialAnswers | None = None,
) -> list[str]:
    return generate_answers(
        parts.model,
        parts.codec,
        parts.features,
        examples,
        parts.recipe.decode,
        media_of,
        label,
        parts.accelerator,
        partial,
    )


def _scored(
    metrics: Mapping[str, Metric], predictions: Sequence[str], examples: Sequence[Example]
) -> dict[str, Scores]:
    return {name: metric(predictions, examples) for name, metric in metrics.items()}


def _summaries(
    scored: Mapping[str, Scores], examples: Sequence[Example], seed: int
) -> dict[str, dict[str, Any]]:
    return {name: summarise(scores, examples, seed) for name, scores in scored.items()}


def _sizes(examples: Sequence[Example]) -> dict[str, int]:
    kinds = [e.type for e in examples]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _lines(
    examples: Sequence[Example],
    predictions: Sequence[str],
    media_of: Mapping[str, str] | None,
    scored: Mapping[str, Scores],
) -> str:
    """A line per example, with its scores by those metrics that count it."""
    lines = [
        json.dumps(
            {
                "id": example.id,
                "media": example.media if media_of is None else media_of[example.media],
                "type": example.type,
                "prompt": example.prompt,
                "references": example.references,
                "prediction": prediction,
                "match": is_match(prediction, example.references),
                "scores": {
                    name: round(float(scores.per_example[row]), 6)
                    for name, scores in scored.items()
                    if not isnan(scores.per_example[row])
                },
            },
            ensure_ascii=False,
        )
        for row, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
    ]
    return "\n".join(lines) + "\n"
