"""The command line: a thin table of commands, each of which imports its stage inside itself.

extract RECIPE          run the frozen encoder once, fill the feature store
train RECIPE            fit connections and soft prompt on the features
evaluate RUN            generate, score, and control with shuffled media
predict RUN             one file, one prompt, one answer
run RECIPE              extract, train and evaluate, one after the other
show RUN                the table of a run's scores
cache COMMAND           ls, info, verify, diff, repair, gc, convert, estimate: the feature store
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
    from collections.abc import Callable, Iterable

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
@click.option("--retry-failed", is_flag=True, help="Try media again that failed before.")
def extract(recipe: Path, overrides: tuple[str, ...], retry_failed: bool) -> None:
    """Encode the recipe's media that the feature store does not hold yet."""
    from epalm.config import load_recipe

    _extract(load_recipe(recipe, overrides), retry_failed)


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
@click.option(
    "--image", "--video", "--audio", "media", metavar="FILE", required=True,
    type=click.Path(path_type=Path), help="The file that is asked about.",
)  # fmt: skip
@click.option("--ask", required=True, metavar="TEXT", help="The prompt, as in the dataset.")
@set_option
@checkpoint_option
def predict(
    folder: Path, media: Path, ask: str, overrides: tuple[str, ...], checkpoint: str
) -> None:
    """Answer a question about an image, video or audio file."""
    from epalm.evaluate.predict import predict as answer
    from epalm.train.run import Run

    run = Run.open(folder, overrides)
    click.echo(answer(run, getattr(run, checkpoint), media, ask))


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


@main.group()
def cache() -> None:
    """Look at feature sets, check them, and look after them."""


set_argument = click.argument("target", metavar="SET", type=click.Path(path_type=Path))


def sample_option(default: int, words: str) -> "Callable[[Any], Any]":
    """How much of something to look at."""
    count = click.IntRange(min=1)
    return click.option("--sample", type=count, default=default, show_default=True, help=words)


@cache.command("ls")
@click.argument("root", default="features", type=click.Path(path_type=Path))
def cache_ls(root: Path) -> None:
    """List the feature sets in a folder."""
    from epalm.store.listing import table_of_sets

    click.echo(table_of_sets(root))


@cache.command("info")
@set_argument
@set_option
def cache_info(target: Path, overrides: tuple[str, ...]) -> None:
    """Print all that is known of a feature set, given its folder or a recipe."""
    from epalm.extract.compare import feature_set
    from epalm.store.listing import page_of_set

    click.echo(page_of_set(feature_set(target, overrides)))


@cache.command("verify")
@set_argument
@click.option("--deep", is_flag=True, help="Also encode a random sample again; SET is a recipe.")
@sample_option(16, "Rows of each column to encode.")
@set_option
def cache_verify(target: Path, deep: bool, sample: int, overrides: tuple[str, ...]) -> None:
    """Compare every shard with its checksum."""
    from epalm.extract.compare import feature_set
    from epalm.store.maintenance import verify

    if deep and target.is_dir():
        raise EpalmError(f"{target}: --deep needs the recipe instead of the set, to find the media")
    features = feature_set(target, overrides)
    problems = verify(features, _bar("verify"))
    if problems:
        lines = [f"  {p.column.folder.name}, shard {p.shard}: {p.what}" for p in problems]
        raise EpalmError(
            "\n".join(
                [f"{features.folder}: {len(problems)} broken shards", *lines]
                + ["run `cache repair` with the recipe"]
            )
        )
    shards = sum(len(column.markers) for column in features.columns)
    click.echo(f"{features.folder}: {shards} shards, all as they were written")
    if deep:
        _verify_deep(target, overrides, sample)


@cache.command("diff")
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
def cache_diff(one: Path, other: Path) -> None:
    """Print in which fields two specs differ; each is a feature set's folder or a recipe."""
    from epalm.extract.compare import differences

    lines = differences(one, other)
    click.echo("\n".join(lines) or "the same features")


@cache.command("repair")
@recipe_argument
@set_option
def cache_repair(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Drop the broken shards of the recipe's columns, and make these again, in their places."""
    from epalm.config import load_recipe
    from epalm.extract.columns import existing_columns
    from epalm.extract.compare import set_of_recipe
    from epalm.store.maintenance import give_up, verify

    loaded = load_recipe(recipe, overrides)
    features = set_of_recipe(recipe, overrides)
    ours = existing_columns(loaded, features)
    problems = verify(features, _bar("verify"))
    mended = [p for p in problems if p.column in ours]
    give_up(mended)
    click.echo(f"{features.folder}: {len(mended)} broken shards")
    for name in sorted({p.column.folder.name for p in problems if p.column not in ours}):
        click.echo(f"  {name} has broken shards too; repair it with a recipe that keeps it")
    if mended:
        _extract(loaded, planned_only=True)


@cache.command("gc")
@set_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--removed", is_flag=True, help="Also forget media whose files are gone.")
@set_option
def cache_gc(target: Path, dry_run: bool, removed: bool, overrides: tuple[str, ...]) -> None:
    """Delete what nothing in a feature set refers to any more."""
    from epalm.extract.compare import feature_set
    from epalm.store.listing import words_for_bytes
    from epalm.store.maintenance import collect, garbage, removed_media

    features = feature_set(target, overrides)
    gone = {d: removed_media(features, d) for d in features.datasets()} if removed else {}
    if dry_run:
        found = [(path, path.stat().st_size) for path in garbage(features, gone)]
    else:
        found = collect(features, gone)
    verb = "would be" if dry_run else "are"
    for dataset, media in gone.items():
        click.echo(f"{dataset}: {len(media)} media {verb} forgotten")
    for path, _ in found:
        click.echo(f"  {path.relative_to(features.folder)}")
    size = words_for_bytes(sum(size for _, size in found))
    click.echo(f"{len(found)} files, {size}, {verb} deleted")


@cache.command("convert")
@set_argument
@click.option("--to", "backend", required=True, help="zarr or hdf5")
@set_option
def cache_convert(target: Path, backend: str, overrides: tuple[str, ...]) -> None:
    """Move a feature set to another backend; no training may be reading it."""
    from epalm.extract.compare import feature_set
    from epalm.store.conversion import convert

    features = feature_set(target, overrides)
    if features.layout.backend == backend:
        click.echo(f"{features.folder}: is {backend} already")
        return
    click.echo(f"{convert(features, backend, _bar('convert')).folder}: {backend}")


@cache.command("estimate")
@recipe_argument
@sample_option(32, "Media to measure the rate on.")
@set_option
def cache_estimate(recipe: Path, sample: int, overrides: tuple[str, ...]) -> None:
    """Say what an extraction would add, and how long it would take."""
    from epalm.config import load_recipe
    from epalm.data import load_dataset
    from epalm.extract.check import estimate
    from epalm.store.listing import words_for_bytes

    loaded = load_recipe(recipe, overrides)
    found = estimate(loaded, load_dataset(loaded), sample)
    for name, rows in found.rows.items():
        click.echo(f"{name}: {rows:,} rows of {words_for_bytes(found.row_bytes[name])}")
    if found.rate is None:
        click.echo(f"nothing to do; all is in {found.folder}")
        return
    click.echo(
        f"{words_for_bytes(found.bytes)} into {found.folder}; about {found.seconds / 60:.1f} min "
        f"at {found.rate:.1f} rows/s, measured here on view 0"
    )


def _bar(label: str) -> "Callable[[Iterable[Any]], Iterable[Any]]":
    """Shows a bar over shards."""
    from tqdm import tqdm

    return lambda shards: tqdm(list(shards), label, unit="shard")


def _verify_deep(recipe: Path, overrides: tuple[str, ...], sample: int) -> None:
    from epalm.config import load_recipe
    from epalm.data import load_dataset
    from epalm.extract.check import verify_deep

    loaded = load_recipe(recipe, overrides)
    different = []
    for c in verify_deep(loaded, load_dataset(loaded), sample):
        click.echo(
            f"{c.column}: {c.rows} rows encoded again, largest difference "
            f"{c.largest_difference:.2g} (values up to {c.largest_value:.3g}, arithmetic explains "
            f"{c.bound:.2g})"
        )
        if c.largest_difference > c.bound:
            different.append(c.column)
    if different:
        raise EpalmError(
            f"{', '.join(different)}: other features than the encoder makes now; if weights and "
            "libraries are those of the extraction, delete the column and extract again"
        )


def _extract(recipe: "Recipe", retry_failed: bool = False, planned_only: bool = False) -> None:
    from epalm.data import load_dataset
    from epalm.extract.loop import extract as encode

    report = encode(recipe, load_dataset(recipe), retry_failed, planned_only)
    features = report.features
    if report.removed:
        click.echo(
            f"extract: {len(report.removed)} media that were extracted before are gone, "
            f"{report.removed[0]} among them; their features stay (see `cache gc`)"
        )
    if not report.encoded:
        failed = f" but {len(report.failed)} that cannot be used" if report.failed else ""
        click.echo(
            f"extract: all {report.found} media{failed} are in {features.folder}, nothing to do"
        )
        return
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    click.echo(
        f"extract: {report.encoded} media in {report.total_seconds:.1f} s ({stages}), "
        f"{report.found} found, {len(report.failed)} failed; in {features.folder}"
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
