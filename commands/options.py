"""Arguments and options that several commands have."""

from pathlib import Path

import click

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
run_argument = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field."
)
checkpoint_option = click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True,
    help="Weights of the best validation, or of the last step.",
)  # fmt: skip
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace the run folder instead of resuming it."
)


max_steps_option = click.option(
    "--max-steps", type=click.IntRange(min=1), metavar="N",
    help="Stop after step N of the recipe's; the same command without it goes on.",
)  # fmt: skip
