"""`data`: datasets."""

from pathlib import Path

import click

from epalm.commands.options import recipe_argument, set_option


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
    questions that stand there twice, and empty texts.
    """
    from epalm.config import load_recipe
    from epalm.data.check import check
    from epalm.data.sources import naming

    loaded = load_recipe(recipe, overrides)
    stopped = False
    for name, alone in loaded.sources().items():
        with naming(name, bool(loaded.also)):
            report = check(alone, hashes, whole=not loaded.also)
            if decode:
                from epalm.extract.sample import undecodable

                tried, reasons = undecodable(alone, report.chosen, decode)
                report.judge(reasons, f"of {tried:,} media cannot be decoded")
        if loaded.also:
            click.echo(f"source {name}:")
        click.echo(report.text(rows))
        stopped = stopped or bool(report.stops)
    context.exit(1 if stopped else 0)
