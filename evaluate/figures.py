"""Curves of training, as PNG, and as SVG that takes the colours of the page it stands in."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure, FigureBase

from epalm.train.run import Run

# by matplotlib on paper, and by the variables of report_style.py in a page
THEME = {"#1b2430": "--ink", "#6b7684": "--quiet", "#1f5f8b": "--accent", "#a8b3bf": "--pale"}
INK, QUIET, ACCENT, PALE = THEME
_FAMILY = re.compile(r"font(-family)?:([^;\"]*?)'DejaVu Sans'[^;\"]*(?:; )?")

Metrics = Sequence[Mapping[str, Any]]


def draw_loss(run: Run) -> Path:
    """The run's training loss and validation scores over steps; loss.png."""
    path = run.folder / "loss.png"
    with settings():
        loss_figure(run).savefig(path, dpi=150)
    return path


def loss_figure(run: Run) -> Figure:
    """The same as a figure; to be drawn within `settings`."""
    figure = Figure(figsize=(9.2, 3.0), layout="constrained")
    plot_training(figure, [run.read_metrics()])
    return figure


def plot_training(figure: FigureBase, runs: Sequence[Metrics]) -> None:
    """Training loss beside validation scores, if there are any; a line for each run.

    Args:
        runs: lines of each one's metrics.jsonl.
    """
    scored = any("val_score" in line for lines in runs for line in lines)
    left, *right = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    left.set(xlabel="step", title="training loss", yscale="log")
    left.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    left.yaxis.set_minor_locator(ticker.NullLocator())
    for axis in right:
        axis.set(xlabel="step", title="validation score × 100")
    for number, lines in enumerate(runs):
        left.plot(*_curve(lines, "loss"), **line_style(number))
        for axis in right:
            steps, scores = _curve(lines, "val_score")
            axis.plot(steps, [100 * s for s in scores], marker="o", markersize=3.5,
                      **line_style(number))  # fmt: skip


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of the n-th run; twelve differ."""
    dashes = ("-", "--", ":", "-.")
    return {"color": (ACCENT, QUIET, PALE)[number % 3], "linestyle": dashes[number // 3 % 4]}


def as_svg(figure: Figure, salt: str) -> str:
    """A figure as an element that stands in an HTML page, without ids of other figures.

    Args:
        salt: makes its ids; another for each figure of a page.
    """
    stream = io.StringIO()
    with settings(), matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = _FAMILY.sub(lambda m: "" if m[1] else f"font-size:{m[2].rstrip()}; ", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var({variable})")
    # ids such as axes_1 are alike in all figures, and nothing refers to them
    return re.sub(r'<g id="[^"]*">', "<g>", svg)


def _curve(lines: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Steps and values; both empty where there are none."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def settings() -> Any:
    """Within it, figures have our colours and sizes."""
    return matplotlib.rc_context({
        "axes.edgecolor": PALE, "axes.labelcolor": QUIET, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlecolor": INK,
        "axes.titlelocation": "left", "axes.titlesize": 10, "font.size": 9,
        "lines.linewidth": 1.4, "svg.fonttype": "none", "text.color": INK, "xtick.color": QUIET,
        "ytick.color": QUIET,
    })  # fmt: skip
