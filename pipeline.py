"""The command line: a thin table of commands, each of which imports its stage inside itself.

extract RECIPE          run the frozen encoder once, fill the feature store
train RECIPE            fit connections and soft prompt on the features
evaluate RUN            generate, score, and control with shuffled media; a report
predict RUN             answers about a file, a folder of them, or the lines of a file
run RECIPE              extract, train and evaluate, one after the other
show RUN                the table of a run's scores
sweep SWEEP             many runs from one file, and the table that compares them
compare RUN…            runs side by side
export RUN FOLDER       the trained model by itself, for Python or another machine
import-official FILE RECIPE
                        a run made of a checkpoint of the authors' code
data check RECIPE       what is wrong with a dataset, before hours are spent on it
cache COMMAND           ls, info, verify, diff, repair, gc, convert, estimate: the feature store
"""

import errno
import sys
from contextlib import ExitStack
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

from epalm.commands import stages
from epalm.commands.cache import cache
from epalm.commands.data import data
from epalm.commands.options import (
    checkpoint_option,
    max_steps_option,
    overwrite_option,
    recipe_argument,
    run_argument,
    set_option,
)
from epalm.errors import EpalmError
from epalm.memory import keep_freed_memory

if TYPE_CHECKING:
    from epalm.evaluate.predict import Predictor
    from epalm.evaluate.predict_inputs import Asked


class Commands(click.Group):
    """Turns our own and the system's errors into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        without = " without --overwrite" if "--overwrite" in ctx.args else ""
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
            click.echo(
                f"interrupted; what is written stays, the same command{without} goes on", err=True
            )
            ctx.exit(130)


@click.group(cls=Commands)
@click.version_option(package_name="epalm")
def main() -> None:
    """Teach a frozen language model to perceive: extract features once, train on them often."""
    keep_freed_memory()


@main.command()
@recipe_argument
@set_option
@click.option("--retry-failed", is_flag=True, help="Try media again that failed before.")
def extract(recipe: Path, overrides: tuple[str, ...], retry_failed: bool) -> None:
    """Encode the recipe's media that the feature store does not hold yet."""
    from epalm.config import load_recipe

    stages.extract(load_recipe(recipe, overrides), retry_failed)


@main.command()
@recipe_argument
@set_option
@overwrite_option
@max_steps_option
def train(recipe: Path, overrides: tuple[str, ...], overwrite: bool, max_steps: int | None) -> None:
    """Train on cached features, or resume the recipe's run."""
    from epalm.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    stages.join(loaded)
    with ExitStack() as locks:
        stages.train(loaded, locks, overwrite, max_steps)


@main.command()
@run_argument
@click.option(
    "--on", metavar="RECIPE", type=click.Path(path_type=Path),
    help="On this recipe's data and features, into RUN/on/NAME; prints the gap.",
)  # fmt: skip
@set_option
@checkpoint_option
def evaluate(folder: Path, on: Path | None, overrides: tuple[str, ...], checkpoint: str) -> None:
    """Score a run and the same run with media shuffled between questions.

    An evaluation that was interrupted goes on where it was.
    """
    from epalm.train.parts import assemble
    from epalm.train.run import Run

    run = Run.open(folder, overrides)
    stages.join(run.recipe)
    if on is None:
        stages.evaluate(run, assemble(run.recipe), run.weights(checkpoint))
    else:
        stages.evaluate_on(run, on, overrides, run.weights(checkpoint))


@main.command()
@run_argument
@click.option("--image", metavar="PATH", type=click.Path(path_type=Path), help="What is seen, or")
@click.option("--video", metavar="PATH", type=click.Path(path_type=Path), help="what is seen, or")
@click.option("--audio", metavar="PATH", type=click.Path(path_type=Path), help="what is heard.")
@click.option(
    "--ask", "prompts", multiple=True, metavar="TEXT",
    help="The prompt, as in the dataset; may be given several times.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each answer.")
@set_option
@checkpoint_option
@click.pass_context
def predict(
    context: click.Context,
    /,
    folder: Path,
    prompts: tuple[str, ...],
    as_json: bool,
    overrides: tuple[str, ...],
    checkpoint: str,
    **paths: Path | None,
) -> None:
    """Answer questions about images, videos or sounds. RUN may be an exported folder.

    PATH is a file, a folder of them, or a .jsonl file with `media` and `prompt` in each line; `-`:
    such lines from standard input. Of a run with several sources, the one of that modality is
    asked. Of many files, those that cannot be used get a line on standard error each, and the exit
    code is 2.
    """
    from epalm.evaluate.predict import Predictor
    from epalm.evaluate.predict_inputs import asked
    from epalm.model.pretrained import CONFIG
    from epalm.train.run import Run

    given = {modality: path for modality, path in paths.items() if path is not None}
    if len(given) != 1:
        raise EpalmError("predict: give one file or folder, as --image, --video or --audio")
    ((modality, path),) = given.items()
    wanted = asked(path, prompts)
    if (folder / CONFIG).is_file():
        if checkpoint != "best":
            raise EpalmError(f"{folder}: an exported model takes no --checkpoint, it has one")
        predictor = Predictor.from_pretrained(folder, modality=modality, overrides=overrides)
    else:
        run = Run.open(folder, overrides)
        predictor = Predictor.from_run(run, run.weights(checkpoint), modality)
    if len(wanted) > 1 or wanted[0].media != path:
        context.exit(2 if _predict_many(predictor, wanted, as_json) else 0)
    features = predictor.encode([path])
    if len(prompts) == 1 and predictor.decode.num_beams == 1 and not as_json:
        predictor.stream(features, prompts[0], lambda words: click.echo(words, nl=False))
        click.echo()
        return
    for prompt, answer in zip(prompts, predictor.ask(features, prompts), strict=True):
        click.echo(_answer_line(str(path), prompt, answer) if as_json else answer)


@main.command()
@recipe_argument
@set_option
@overwrite_option
@max_steps_option
def run(recipe: Path, overrides: tuple[str, ...], overwrite: bool, max_steps: int | None) -> None:
    """Extract, train and evaluate."""
    from epalm.config import load_recipe
    from epalm.train.run import Run

    loaded = load_recipe(recipe, overrides)
    stages.check(loaded)
    Run.planned(loaded, overwrite)
    stages.join(loaded)
    stages.extract(loaded)
    with ExitStack() as locks:
        finished, parts = stages.train(loaded, locks, overwrite, max_steps)
        stages.evaluate(finished, parts, finished.weights("best"))


@main.command()
@run_argument
def show(folder: Path) -> None:
    """Print the table of a run's scores."""
    from epalm.evaluate.scores_file import read_scores
    from epalm.evaluate.table import format_table
    from epalm.train.progress import read_progress
    from epalm.train.run import Run

    run = Run.open(folder, trained=False)
    scores = read_scores(run)
    click.echo(format_table(scores))
    for line in scores.get("changes", []):
        click.echo(f"Not as its recipe says: {line}.")
    steps = {read_progress(path).step for path in (run.last, run.best) if path.is_file()}
    if steps and scores.get("step") not in {None, *steps}:
        click.echo(f"of step {scores['step']}, and trained on since: run `evaluate {folder}` again")


@main.command()
@run_argument
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@checkpoint_option
def export(folder: Path, target: Path, checkpoint: str) -> None:
    """Write a run's trained model into a folder that from_pretrained reads."""
    from epalm.store.atomic import writing_into
    from epalm.train.export import export as write
    from epalm.train.run import Run

    run = Run.open(folder)
    with writing_into(target, "export FOLDER"):
        write(run, run.weights(checkpoint), target)
    click.echo(f"export: {target}; load it with AugmentedLM.from_pretrained, or `predict`")


@main.command("import-official")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@recipe_argument
@set_option
@overwrite_option
def import_official(file: Path, recipe: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Make a run of a .pth checkpoint that the authors' code has saved."""
    from epalm.config import load_recipe
    from epalm.train.import_official import import_official as make

    run, notes = make(file, load_recipe(recipe, overrides), overwrite)
    for note in notes:
        click.echo(f"note: {note}")
    click.echo(f"import-official: {run.folder}; next: `extract` with the recipe, then `evaluate`")


@main.command()
@click.argument("file", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option(
    "--together", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Train N runs at once that differ only in seed, learning rates and weight decay.",
)  # fmt: skip
@set_option
def sweep(file: Path, together: int, overrides: tuple[str, ...]) -> None:
    """Extract, train and evaluate every run of a sweep that has no scores yet; compare them."""
    from epalm.commands.sweep import run_sweep

    run_sweep(file, together, overrides)


@main.command("compare")
@click.argument("folders", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--paired", is_flag=True, help="Test whether two runs differ on the same examples.")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="Also draw scores and curves: .png, or .html with the tables.",
)  # fmt: skip
def compare_runs(folders: tuple[Path, ...], paired: bool, out: Path | None) -> None:
    """Print runs' scores side by side."""
    from epalm.evaluate.compare import compare, named, unlike
    from epalm.evaluate.scores_file import read_scores
    from epalm.train.run import Run

    if out:
        from epalm.evaluate.compare_figure import check_ending, draw
        from epalm.store.atomic import writing_into

        check_ending(out)
    runs = [Run.open(folder, trained=False) for folder in folders]
    if paired and len(runs) != 2:
        raise EpalmError(f"compare --paired: takes two runs, not {len(runs)}")
    names, scores = named(runs), [read_scores(run) for run in runs]
    tables = [compare([({"run": n}, each) for n, each in zip(names, scores, strict=True)])]
    tables += filter(None, [unlike(names, scores)])
    if paired:
        from epalm.evaluate.significance import differences, format_differences

        first, second = runs
        found = differences(first, second)
        tables.append(format_differences(names[0], names[1], found))
    click.echo("\n\n".join(tables))
    if out:
        with writing_into(out.parent, "compare --out"):
            draw(runs, tables, out)
        click.echo(f"compare: drawn in {out}")


main.add_command(data)
main.add_command(cache)


def _predict_many(predictor: "Predictor", wanted: "list[Asked]", as_json: bool) -> int:
    """Print answers as they come; how many files could not be used."""
    from epalm.evaluate.predict_many import answer_all

    failed = 0
    for found in answer_all(predictor, wanted):
        if found.error:
            failed += 1
            click.echo(f"{found.asked.name}: {found.error}", err=True)
        for prompt, answer in zip(found.asked.prompts, found.answers, strict=False):
            line = _answer_line(found.asked.name, prompt, answer)
            click.echo(line if as_json else "\t".join((found.asked.name, prompt, answer)))
    return failed


def _answer_line(media: str, prompt: str, answer: str) -> str:
    import json

    return json.dumps({"media": media, "prompt": prompt, "prediction": answer}, ensure_ascii=False)


if __name__ == "__main__":
    main(prog_name="pipeline.py")
