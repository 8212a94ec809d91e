"""The command line: a thin table of commands, each of which imports its stage inside itself.

extract RECIPE          run the frozen encoder once, fill the feature store
train RECIPE            fit connections and soft prompt on the features
evaluate RUN            generate, score, and control with shuffled media
predict RUN             one image, one prompt, one answer
run RECIPE              extract, train and evaluate, one after the other
show RUN                the table of a run's scores
"""

import errno
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # As a script, the checkout comes first on the path and its folders would shadow other packages
    # (Hugging Face's evaluate, say); everything of ours is imported as epalm.….
    sys.path.pop(0)
    if find_spec("epalm") is None:
        sys.exit("epalm is not installed; run `pip install -e .` in the checkout first")

import click

from epalm.errors import EpalmError

if TYPE_CHECKING:
    from epalm.config import Recipe
    from epalm.train.parts import Parts
    from epalm.train.run import Run


class Commands(click.Group):
    """Turns our own and the system's errors into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EpalmError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # disk full, no permission, a file where a folder should be
            if error.errno == errno.EPIPE:  # the reader of our output went away
                raise
            click.echo(f"error: {error}; what is written stays", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; what is written stays, the same command goes on", err=True)
            ctx.exit(130)


@click.group(cls=Commands)
@click.version_option(package_name="epalm")
def main() -> None:
    """Teach a frozen language model to perceive: extract features once, train on them often."""


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
run_argument = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field."
)
checkpoint_option = click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace the run folder instead of resuming it."
)


@main.command()
@recipe_argument
@set_option
def extract(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Encode the recipe's media that the feature store does not hold yet."""
    from epalm.config import load_recipe

    _extract(load_recipe(recipe, overrides))


@main.command()
@recipe_argument
@set_option
@overwrite_option
def train(recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Train on cached features, or resume the recipe's run."""
    from epalm.config import load_recipe

    _train(load_recipe(recipe, overrides), overwrite)


@main.command()
@run_argument
@set_option
@checkpoint_option
def evaluate(folder: Path, overrides: tuple[str, ...], checkpoint: str) -> None:
    """Score a run and the same run with media shuffled between questions."""
    from epalm.train.parts import assemble
    from epalm.train.run import Run

    run = Run.open(folder, overrides)
    _evaluate(run, assemble(run.recipe), checkpoint)


@main.command()
@run_argument
@click.option("--image", type=click.Path(path_type=Path), required=True)
@click.option("--ask", required=True, metavar="TEXT", help="The prompt, as in the dataset.")
@set_option
@checkpoint_option
def predict(
    folder: Path, image: Path, ask: str, overrides: tuple[str, ...], checkpoint: str
) -> None:
    """Answer a question about an image file."""
    from epalm.evaluate.predict import predict as answer
    from epalm.train.run import Run

    run = Run.open(folder, overrides)
    click.echo(answer(run, getattr(run, checkpoint), image, ask))


@main.command()
@recipe_argument
@set_option
@overwrite_option
def run(recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Extract, train and evaluate."""
    from epalm.config import load_recipe
    from epalm.data import load_dataset
    from epalm.evaluate.scores import evaluation_examples

    loaded = load_recipe(recipe, overrides)
    evaluation_examples(loaded, load_dataset(loaded))  # before hours are spent
    _extract(loaded)
    finished, parts = _train(loaded, overwrite)
    _evaluate(finished, parts, "best")


@main.command()
@run_argument
def show(folder: Path) -> None:
    """Print the table of a run's scores."""
    import json

    from epalm.evaluate.table import format_table
    from epalm.train.run import Run

    scores = Run.open(folder).scores
    if not scores.is_file():
        raise EpalmError(f"{scores}: not there; run `evaluate` first")
    click.echo(format_table(json.loads(scores.read_text(encoding="utf-8"))))


def _extract(recipe: "Recipe") -> None:
    from epalm.data import load_dataset
    from epalm.extract.loop import extract as encode

    report = encode(recipe, load_dataset(recipe))
    features = report.features
    if not report.encoded:
        failed = f" but {len(report.failed)} that cannot be used" if report.failed else ""
        click.echo(
            f"extract: all {report.found} media{failed} are in {features.folder}, nothing to do"
        )
        return
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    click.echo(
        f"extract: {report.encoded} media in {report.total_seconds:.1f} s ({stages}), "
        f"{report.found} found, {len(report.failed)} failed; now {len(features)} in "
        f"{features.folder}"
    )


def _train(recipe: "Recipe", overwrite: bool) -> tuple["Run", "Parts"]:
    from epalm.evaluate.scores import validate
    from epalm.train.batches import TrainingBatches
    from epalm.train.loop import train as fit
    from epalm.train.parts import assemble
    from epalm.train.run import Run

    parts = assemble(recipe)
    examples = parts.dataset.split("train")
    batches = TrainingBatches(examples, parts.features, parts.codec, recipe, parts.device)
    target = Run.create(recipe, overwrite)
    progress = fit(target, parts, batches, validate if parts.dataset.split("val") else None)
    click.echo(
        f"train: {progress.step} steps, best at step {progress.best_step}; weights in {target.best}"
    )
    return target, parts


def _evaluate(run: "Run", parts: "Parts", checkpoint: str) -> None:
    from epalm.evaluate.figures import draw_loss, write_examples
    from epalm.evaluate.scores import evaluate as score
    from epalm.train.checkpoint import load_weights

    load_weights(getattr(run, checkpoint), parts.model)
    scores = score(run, parts)
    files = [run.scores, draw_loss(run), write_examples(run, parts.dataset)]
    shuffled = scores.get("shuffled_accuracy")
    control = "" if shuffled is None else f" ({shuffled:.1%} with media shuffled)"
    click.echo(
        f"evaluate: accuracy {scores['accuracy']:.1%}{control} on {scores['examples']} "
        f"{scores['split']} examples; written: {', '.join(map(str, files))}"
    )


if __name__ == "__main__":
    main(prog_name="pipeline.py")
