"""Runs side by side in a picture: scores with their intervals, and the curves of training."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure, SubFigure

from epalm.errors import EpalmError
from epalm.evaluate.compare import named
from epalm.evaluate.figures import as_svg, line_style, plot_training, settings
from epalm.evaluate.report_scores import Line, lines_of
from epalm.evaluate.report_style import page, text
from epalm.evaluate.scores_file import read_scores
from epalm.store.atomic import write_atomic
from epalm.train.run import Run

MARKERS = "osD^v"
GAP = 0.6  # of the height between two scores that a score's runs take


def check_ending(path: Path) -> None:
    """EpalmError when nothing can be drawn into a file called so."""
    if path.suffix not in (".png", ".html"):
        raise EpalmError(f"compare --out: {path}: must end in .png or .html")


def draw(runs: Sequence[Run], tables: Sequence[str], path: Path) -> None:
    """Draw runs into a PNG, or into an HTML page with the tables; see `check_ending`.

    Raises:
        EpalmError: a run's scores have no intervals.
    """
    with settings():
        figure = _figure(runs)
        if path.suffix == ".png":
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            return
        svg = as_svg(figure, "compare")
    names = ", ".join(named(runs))
    body = [f"<h1>{text(names, 200)}</h1>", f"<figure class=plot>{svg}</figure>"]
    body += [f"<pre class=table>{text(table)}</pre>" for table in tables]
    write_atomic(path, page(names, body))


def _figure(runs: Sequence[Run]) -> Figure:
    lines = [_lines(run) for run in runs]
    names = list(dict.fromkeys(line.name for some in lines for line in some))
    high = 1.2 + len(names) * max(0.3, 0.12 * len(runs))
    figure = Figure(figsize=(9.2, high + 3.0), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[high, 3.0])[:, 0]
    _plot_scores(top, named(runs), lines, names)
    plot_training(bottom, [run.read_metrics() for run in runs])
    return figure


def _plot_scores(
    figure: SubFigure, runs: Sequence[str], lines: Sequence[list[Line]], names: Sequence[str]
) -> None:
    axis = figure.subplots()
    for number, some in enumerate(lines):
        shown = [line for line in some if line.value is not None]
        values = [100 * (line.value or 0.0) for line in shown]
        ends = [line.interval or (line.value or 0.0,) * 2 for line in shown]
        # not below 0: an interval may miss its value by a rounding error
        below = [max(value - 100 * low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
        above = [
            max(100 * high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)
        ]
        offset = GAP * ((number + 0.5) / len(lines) - 0.5)
        axis.errorbar(
            values, [names.index(line.name) + offset for line in shown], xerr=[below, above],
            fmt=MARKERS[number % len(MARKERS)], markersize=4.5, label=runs[number],
            color=line_style(number)["color"], linestyle="none",
        )  # fmt: skip
    axis.set(title="score × 100, with its 95% interval")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _lines(run: Run) -> list[Line]:
    scores = read_scores(run)
    if "metrics" not in scores:
        raise EpalmError(f"{run.scores}: holds no intervals; run `evaluate {run.folder}` again")
    return lines_of(scores)
