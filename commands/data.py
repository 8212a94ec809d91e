"""`data`: datasets."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from epalm.commands.options import recipe_argument, set_option
from epalm.errors import EpalmError

if TYPE_CHECKING:
    from epalm.config import Recipe
    from epalm.data.example import Dataset


@click.group()
def data() -> None:
    """Look at datasets."""


@data.command("check")
@recipe_argument
@click.option("--hash", "hashes", is_flag=True, help="Also read all media, to find equal ones.")
@click.option("--decode", type=click.IntRange(min=1), metavar="N", help="Also decode N media.")
@click.option(
    "--rows", type=click.IntRange(min=0), default=2, show_default=True,
    help="Examples of each split to show.",
)  # fmt: skip
@set_option
@click.pass_context
def data_check(
    context: click.Context,
    recipe: Path,
    hashes: bool,
    decode: int | None,
    rows: int,
    overrides: tuple[str, ...],
) -> None:
    """Check a recipe's data. Exit code 1: something would stop the recipe; 2: it cannot be read.

    Prints counts beside the published ones, and finds missing media, splits that share media,
    questions that stand there twice, empty texts, and splits, answers and metrics that do not go
    together. LM and encoder are not looked at.
    """
    from epalm.config import MAIN, load_recipe
    from epalm.data.check import check
    from epalm.data.sources import join, naming

    loaded = load_recipe(recipe, overrides)
    reports = {}
    for name, alone in loaded.sources().items():
        with naming(name, bool(loaded.also)):
            report = check(alone, hashes, whole=not loaded.also)
            if decode:
                from epalm.extract.sample import undecodable

                tried, reasons = undecodable(alone, report.chosen, decode)
                report.judge(reasons, f"of {tried:,} media cannot be decoded")
        reports[name] = report
    together = join({name: report.left for name, report in reports.items()})
    reports[MAIN].stops += _what_stops(loaded, together)
    for name, report in reports.items():
        if loaded.also:
            click.echo(f"source {name}:")
        click.echo(report.text(rows))
    context.exit(1 if any(report.stops for report in reports.values()) else 0)


def _what_stops(recipe: "Recipe", dataset: "Dataset") -> list[str]:
    """What `run` would say of all sources' examples before it extracts anything."""
    from epalm.evaluate.scores import evaluation_metrics
    from epalm.train.check import check_splits

    found = []
    if dataset.split(recipe.evaluate.split):
        try:
            evaluation_metrics(recipe, dataset)
        except EpalmError as error:
            found.append(f"evaluation: {error}")
    if dataset.split("train"):  # else it is for runs trained on other data
        try:
            check_splits(dataset, recipe)
        except EpalmError as error:
            found.append(f"training: {error}")
    return found
