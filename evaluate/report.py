"""The report of an evaluation: report.html, made of the run folder's files and of the media."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from epalm.config import Recipe, dump_recipe
from epalm.data.example import Dataset
from epalm.data.sources import split_id
from epalm.evaluate.figures import as_svg, loss_figure, settings
from epalm.evaluate.pictures import pictures
from epalm.evaluate.report_examples import Row, choose, gallery
from epalm.evaluate.report_scores import (
    PARTS,
    Line,
    hundredfold,
    interval,
    leaves_out,
    lines_of,
    score_table,
)
from epalm.evaluate.report_style import page, table, text
from epalm.store.atomic import write_atomic
from epalm.store.spec import FeatureSpec, JointSpec
from epalm.train.run import Run

WORDS = {"image": "image", "video": "video", "audio": "sound"}


def write_report(
    run: Run,
    scores: dict[str, Any],
    dataset: Dataset,
    spec: FeatureSpec | JointSpec,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a run that was evaluated.

    Media that cannot be shown leave a line in their place.

    Args:
        scores: that `evaluate` found; its predictions are in the run folder.
        dataset: that it was evaluated on.
        spec: of the features it was evaluated with.
        notes: sentences under the title.
    """
    rows = _rows(run.folder / "predictions.jsonl")
    control = "shuffled_metrics" in scores  # else the file may be of an earlier evaluation
    others = _rows(run.folder / "predictions-shuffled.jsonl") if control else []
    shuffled = {row["id"]: row["prediction"] for row in others}
    lines = lines_of(scores)
    body = [
        *_head(run.recipe, scores, lines[0], notes),
        *_scores(scores, lines, rows),
        *_examples(run, dataset, spec, rows, shuffled),
        *_training(run, scores),
        *_setting(run, scores, spec),
    ]
    path = run.folder / "report.html"
    write_atomic(path, page(f"{run.recipe.name}: evaluation", body))
    return path


def _head(recipe: Recipe, scores: dict[str, Any], first: Line, notes: Sequence[str]) -> list[str]:
    encoders = " and ".join(_short(one.encoder.weights) for one in recipe.sources().values())
    data = " and ".join(_short(one.data.path) for one in recipe.sources().values())
    words = (
        f"{_short(recipe.lm.weights)} with {encoders}, on {scores['examples']:,} "
        f"{scores['split']} examples about {scores['media']:,} media of {data}."
    )
    keys = [(hundredfold(first.value), f"{first.name} ({interval(first.interval)})")]
    if first.shuffled is not None:
        keys.append((hundredfold(first.shuffled), "with media shuffled"))
    if first.majority is not None:
        keys.append((hundredfold(first.majority), "most frequent answer"))
    share = scores["trained_parameters"] / scores["total_parameters"]
    keys.append((f"{100 * share:.2f}%", "of all parameters trained"))
    return [
        f"<header><h1>{text(recipe.name)}</h1><p class=lead>{text(words)}</p>",
        *(f"<p>{text(note)}</p>" for note in notes),
        "<div class=key>",
        *(f"<div><b>{value}</b>{text(name)}</div>" for value, name in keys),
        "</div></header>",
    ]


def _scores(scores: dict[str, Any], lines: Sequence[Line], rows: Sequence[Row]) -> list[str]:
    words = [
        "Scores × 100. Intervals: percentile bootstrap over media. On the right, filled: the score "
        "and its interval"
    ]
    if scores.get("shuffled_metrics"):
        words.append(
            "; hollow: the same questions with media shuffled between them, which shows what is "
            "left of the score without looking"
        )
    if any(line.majority is not None for line in lines):
        words.append("; stroke: the most frequent training answer to everything")
    if leaves_out(scores):
        words.append(f"; of question types, the {PARTS} most frequent")
    if any(line.interval and line.interval[0] == line.interval[1] for line in lines):
        words.append("; an interval of no width: all media score alike, which proves no certainty")
    exact = ""
    asked = any(row["prompt"] for row in rows)
    if asked and "exact_match" not in scores["metrics"]:
        exact = f" Exact match with a reference: {hundredfold(scores['accuracy'])}"
        if "majority_accuracy" in scores:
            blind = hundredfold(scores["majority_accuracy"])
            exact += f", of the most frequent training answer: {blind}"
        exact += "."
    return ["<h2>Scores</h2>", score_table(lines), f"<p class=note>{''.join(words)}.{exact}</p>"]


def _examples(
    run: Run,
    dataset: Dataset,
    spec: FeatureSpec | JointSpec,
    rows: Sequence[Row],
    shuffled: dict[str, str],
) -> list[str]:
    chosen = choose(rows, run.recipe.seed)
    modality = {
        row["media"]: spec.modality
        if isinstance(spec, FeatureSpec)
        else spec.sources[split_id(row["media"])[0]].modality
        for row in (*chosen.best, *chosen.worst)
    }
    shown = pictures({media: (dataset.media[media], kind) for media, kind in modality.items()})
    kinds = {WORDS[kind] for kind in modality.values()}
    other = f"with another {kinds.pop() if len(kinds) == 1 else 'file'}"
    body = [
        "<h2>Examples</h2>",
        "<p class=note>Not a sample: those of highest and of lowest score, no two about the same "
        "media. Of equal scores a choice by lot, question types in turn.</p>",
    ]
    for title, some in (("Highest scores", chosen.best), ("Lowest scores", chosen.worst)):
        if some:
            body += [f"<h3>{title}</h3>", gallery(some, shuffled, shown, other)]
    if not chosen.worst and len(rows) > len(chosen.best):
        body.append("<p class=note>All others have the same score.</p>")
    return body


def _training(run: Run, scores: dict[str, Any]) -> list[str]:
    stages = [
        [text(name), f"{seconds:,.1f}", text(scores["rates"][name])]
        for name, seconds in scores["seconds"].items()
    ]
    body = ["<h2>Time and parameters</h2>"]
    if any("loss" in line for line in run.read_metrics()):  # a run may be imported
        with settings():
            body = ["<h2>Training</h2>", _plot(as_svg(loss_figure(run), "loss"))]
    trained, total = scores["trained_parameters"], scores["total_parameters"]
    counts = [
        ["trained", f"{trained:,}", f"{100 * trained / total:.2f}%"],
        ["frozen", f"{total - trained:,}", f"{100 - 100 * trained / total:.2f}%"],
        ["all", f"{total:,}", ""],
    ]
    return [
        *body,
        "<div class=columns><div><h3>Time</h3>",
        table(["stage", "seconds", "rate"], stages),
        "</div><div><h3>Parameters</h3>",
        table(["", "number", "share"], counts),
        "</div></div>",
    ]


def _setting(run: Run, scores: dict[str, Any], spec: FeatureSpec | JointSpec) -> list[str]:
    decode = [[text(k), text(v)] for k, v in scores["decode"].items() if v is not None]
    made_by = [
        ["epalm", version("epalm")],
        ["torch", version("torch")],
        ["transformers", version("transformers")],
        ["Python", platform.python_version()],
        ["device", text(_device())],
    ]
    sources = spec.sources if isinstance(spec, JointSpec) else {"": spec}
    for name, one in sources.items():
        made_by.append([text(f"{name} encoder".strip()), text(f"{one.encoder}, {one.modality}")])
        made_by.append([text(f"{name} features".strip()), text(one.fingerprint)])
    return [
        "<h2>Setting</h2>",
        "<div class=columns><div><h3>Decoding</h3>",
        table([], decode),
        "</div><div><h3>Made by</h3>",
        table([], made_by),
        "</div></div>",
        "<h3>Recipe, resolved</h3>",
        f"<pre>{text(dump_recipe(run.recipe))}</pre>",
    ]


def _plot(svg: str) -> str:
    return f"<figure class=plot>{svg}</figure>"


def _short(address: str) -> str:
    """The last name in the address of weights or data."""
    return address.partition("#")[0].rstrip("/").rpartition("/")[2]


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _rows(path: Path) -> list[Row]:
    # not splitlines(): texts may hold other line separators
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
