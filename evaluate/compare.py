"""Runs side by side, made of their recipes and scores.json alone."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from epalm.evaluate.scores_file import read_scores
from epalm.train.progress import read_progress
from epalm.train.run import Run


def is_scored(run: Run) -> bool:
    """Its training is over, and its best weights have been evaluated as its recipe says now."""
    if not (run.scores.is_file() and run.last.is_file()):
        return False
    scores, recipe = read_scores(run), run.recipe
    return (
        read_progress(run.last).is_over(recipe.train)
        and scores.get("step") == read_progress(run.weights("best")).step
        and scores.get("evaluate") == recipe.evaluate.model_dump(mode="json")
        and scores.get("decode") == recipe.decode.model_dump(mode="json")
        and scores.get("changes") == run.changes()
    )


def named(runs: Sequence[Run]) -> list[str]:
    """What to call runs beside each other: by name, or by folder where two have the same name."""
    names = [run.recipe.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def unlike(names: Sequence[str], scores: Sequence[dict[str, Any]]) -> str:
    """A line that says where runs are not scored on as many examples of a split; else nothing."""
    about = [f"{each['examples']:,} {each['split']} examples" for each in scores]
    if len(set(about)) == 1:
        return ""
    pairs = (f"{name} on {words}" for name, words in zip(names, about, strict=True))
    return f"not on the same examples: {', '.join(pairs)}"


def compare(runs: Sequence[tuple[Mapping[str, str], dict[str, Any]]]) -> str:
    """A table of scores, a line for runs of the same labels: mean and standard deviation.

    Args:
        runs: of each its labels (name, or value on each axis of a sweep) and its scores.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for labels, scores in runs:
        groups[tuple(labels.values())].append(scores)
    axes = list(runs[0][0])
    columns = list(dict.fromkeys(name for _, scores in runs for name in _cells(scores)))
    lines = [[*axes, "runs", "trained", *columns, "train s"]]
    for values, group in groups.items():
        cells = [_cells(scores) for scores in group]
        means = [_percent([each.get(name) for each in cells]) for name in columns]
        seconds = [s["seconds"]["train"] for s in group if "train" in s["seconds"]]
        spent = f"{statistics.mean(seconds):.0f}" if seconds else "-"  # a run may be imported
        trained = f"{group[0]['trained_parameters']:,}"
        lines.append([*values, str(len(group)), trained, *means, spent])
    return _align(lines, len(axes))


def _cells(scores: dict[str, Any]) -> dict[str, float | None]:
    """A run's shares by column; exact match is called accuracy, and has its baselines."""
    metrics = scores.get("metrics", {})
    cells = {name: part["value"] for name, part in metrics.items() if name != "exact_match"}
    if metrics and "exact_match" not in metrics:
        return cells
    cells["accuracy"] = scores["accuracy"]
    kinds = scores["accuracy_by_type"]
    if len(kinds) > 1:
        cells |= {kind or "other": kinds[kind] for kind in sorted(kinds)}
    return cells | {n: scores.get(f"{n}_accuracy") for n in ("shuffled", "majority")}


def _percent(values: Sequence[float | None]) -> str:
    """Mean and, of several, sample standard deviation, in percent."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.1f}"


def _align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
