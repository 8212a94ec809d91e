"""Scoring a run: predictions, scores and the shuffled-media control."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from epalm.config import Recipe
from epalm.data.example import SPLITS, Dataset, Example
from epalm.errors import EpalmError
from epalm.evaluate.control import shuffled_media
from epalm.evaluate.generation import generate_answers
from epalm.evaluate.metrics import accuracy, accuracy_by_type, is_match, majority_answer
from epalm.store.atomic import write_atomic
from epalm.store.stage import Stage
from epalm.train.parts import Parts
from epalm.train.run import Run


def evaluate(run: Run, parts: Parts) -> dict[str, Any]:
    """Score the model that `parts` holds, and write predictions and scores into the run folder.

    Raises:
        EpalmError: the dataset has no examples of the split.
    """
    config = run.recipe.evaluate
    run.bind_features(parts.features.spec)
    examples = evaluation_examples(run.recipe, parts.dataset)
    predictions = _timed_answers(run, parts, examples, None, "evaluate")
    _write_predictions(run, "predictions.jsonl", examples, predictions, None)
    scores: dict[str, Any] = {
        "split": config.split,
        "examples": len(examples),
        "media": len({e.media for e in examples}),
        "accuracy": accuracy(predictions, examples),
        "accuracy_by_type": accuracy_by_type(predictions, examples),
        "examples_by_type": _sizes(examples),
    }
    if config.control:
        media_of = shuffled_media((e.media for e in examples), run.recipe.seed)
        shuffled = _timed_answers(run, parts, examples, media_of, "control")
        _write_predictions(run, "predictions-shuffled.jsonl", examples, shuffled, media_of)
        scores["shuffled_accuracy"] = accuracy(shuffled, examples)
        scores["shuffled_accuracy_by_type"] = accuracy_by_type(shuffled, examples)
    training = parts.dataset.split("train")
    if training:
        answer = majority_answer(training)
        scores["majority_answer"] = answer
        scores["majority_accuracy"] = accuracy([answer] * len(examples), examples)
        scores["majority_accuracy_by_type"] = accuracy_by_type([answer] * len(examples), examples)
    scores["trained_parameters"] = parts.trained_parameters
    scores["total_parameters"] = parts.total_parameters
    scores["decode"] = run.recipe.decode.model_dump()
    stages = {k: v for k, v in run.stages().items() if config.control or k != "control"}
    scores["seconds"] = {name: stage.seconds for name, stage in stages.items()}
    scores["rates"] = {name: stage.rate for name, stage in stages.items()}
    write_atomic(run.scores, json.dumps(scores, indent=2))
    return scores


def validate(parts: Parts) -> float:
    """Accuracy on the recipe's validation examples."""
    recipe = parts.recipe
    examples = choose_examples(parts.dataset.split("val"), recipe.train.val_examples, recipe.seed)
    return accuracy(_answers(parts, examples, None, "validate"), examples)


def evaluation_examples(recipe: Recipe, dataset: Dataset) -> Sequence[Example]:
    """The examples that a recipe's evaluation is about; EpalmError when there are none."""
    config = recipe.evaluate
    examples = choose_examples(dataset.split(config.split), config.examples, recipe.seed)
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
    start = time.perf_counter()
    answers = _answers(parts, examples, media_of, label)
    seconds = time.perf_counter() - start
    run.add_stage(label, Stage(round(seconds, 2), f"{len(examples) / seconds:.1f} examples/s"))
    return answers


def _answers(
    parts: Parts, examples: Sequence[Example], media_of: Mapping[str, str] | None, label: str
) -> list[str]:
    return generate_answers(
        parts.model, parts.codec, parts.features, examples, parts.recipe.decode, media_of, label
    )


def _sizes(examples: Sequence[Example]) -> dict[str, int]:
    kinds = [e.type for e in examples]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _write_predictions(
    run: Run,
    name: str,
    examples: Sequence[Example],
    predictions: Sequence[str],
    media_of: Mapping[str, str] | None,
) -> None:
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
            },
            ensure_ascii=False,
        )
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    write_atomic(run.folder / name, "\n".join(lines) + "\n")
