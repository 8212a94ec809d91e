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
    from epalm.evaluate.predict import Predictor
    from epalm.evaluate.predict_inputs import Asked
    from epalm.train.loop import Training
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


max_steps_option = click.option(
    "--max-steps", type=click.IntRange(min=1), metavar="N",
    help="Stop after step N of the recipe's; the same command without it goes on.",
)  # fmt: skip


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
@max_steps_option
def train(recipe: Path, overrides: tuple[str, ...], overwrite: bool, max_steps: int | None) -> None:
    """Train on cached features, or resume the recipe's run."""
    from epalm.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    _join(loaded)
    _train(loaded, overwrite, max_steps)


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
    _join(run.recipe)
    if on is None:
        _evaluate(run, assemble(run.recipe), run.weights(checkpoint))
    else:
        _evaluate_on(run, on, overrides, run.weights(checkpoint))


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

    PATH is a file, a folder of them, or a .jsonl file with `media` and `prompt` in each line. Of a
    run with several sources, the one of that modality is asked. Of many files, those that cannot be
    used get a line on standard error each, and the exit code is 2.
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
        if overrides or checkpoint != "best":
            raise EpalmError(f"{folder}: an exported model takes no --set and no --checkpoint")
        predictor = Predictor.from_pretrained(folder, modality=modality)
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
    from epalm.data.sources import load_sources
    from epalm.evaluate.scores import evaluation_examples, evaluation_metrics

    loaded = load_recipe(recipe, overrides)
    dataset = load_sources(loaded)
    evaluation_examples(loaded, dataset)  # before hours are spent
    evaluation_metrics(loaded, dataset)
    _join(loaded)
    _extract(loaded)
    finished, parts = _train(loaded, overwrite, max_steps)
    _evaluate(finished, parts, finished.weights("best"))


@main.command()
@run_argument
def show(folder: Path) -> None:
    """Print the table of a run's scores."""
    import json

    from epalm.evaluate.table import format_table
    from epalm.train.run import Run

    scores = Run.open(folder, trained=False).scores
    if not scores.is_file():
        raise EpalmError(f"{scores}: not there; run `evaluate` first")
    click.echo(format_table(json.loads(scores.read_text(encoding="utf-8"))))


@main.command()
@run_argument
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@checkpoint_option
def export(folder: Path, target: Path, checkpoint: str) -> None:
    """Write a run's trained model into a folder that from_pretrained reads."""
    from epalm.train.export import export as write
    from epalm.train.run import Run

    run = Run.open(folder)
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


@main.group()
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


@main.command()
@click.argument("file", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option(
    "--together", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Train N runs at once that differ only in seed, learning rates and weight decay.",
)  # fmt: skip
@set_option
def sweep(file: Path, together: int, overrides: tuple[str, ...]) -> None:
    """Extract, train and evaluate every run of a sweep that has no scores yet; compare them."""
    from epalm.evaluate.compare import compare, read_scores
    from epalm.sweep import load_sweep
    from epalm.train.run import Run
    from epalm.train.together import groups

    runs = load_sweep(file, overrides)
    targets = [Run.create(planned.recipe) for planned in runs]
    left = [number for number, run in enumerate(targets) if not run.scores.is_file()]
    click.echo(f"{len(runs)} runs, {len(runs) - len(left)} of them done")
    for group in groups([targets[number].recipe for number in left], together):
        chosen = [targets[left[place]] for place in group]
        for run in chosen:
            click.echo(f"{1 + targets.index(run)} of {len(runs)}: {run.folder}")
            _extract(run.recipe)
        recipes = [run.recipe for run in chosen]
        alone = len(recipes) == 1
        for trained in [_train(recipes[0], False, None)] if alone else _train_together(recipes):
            _evaluate(*trained, trained[0].weights("best"))
    done = [(r.labels, read_scores(Run.of(r.recipe))) for r in runs]
    click.echo(compare(done))


@main.command("compare")
@click.argument("folders", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--paired", is_flag=True, help="Test whether two runs differ on the same examples.")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="Also draw scores and curves: .png, or .html with the tables.",
)  # fmt: skip
def compare_runs(folders: tuple[Path, ...], paired: bool, out: Path | None) -> None:
    """Print runs' scores side by side."""
    from epalm.evaluate.compare import compare, read_scores
    from epalm.train.run import Run

    runs = [Run.open(folder, trained=False) for folder in folders]
    if paired and len(runs) != 2:
        raise EpalmError(f"compare --paired: takes two runs, not {len(runs)}")
    tables = [compare([({"run": run.recipe.name}, read_scores(run)) for run in runs])]
    if paired:
        from epalm.evaluate.significance import differences, format_differences

        first, second = runs
        found = differences(first, second)
        tables.append(format_differences(first.recipe.name, second.recipe.name, found))
    click.echo("\n\n".join(tables))
    if out:
        from epalm.evaluate.compare_figure import draw

        draw(runs, tables, out)
        click.echo(f"compare: drawn in {out}")


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
        _extract_source(loaded, False, True)


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
    from epalm.data.sources import naming

    for name, alone in recipe.sources().items():
        if recipe.also:
            click.echo(f"source {name}:")
        with naming(name, bool(recipe.also)):
            _extract_source(alone, retry_failed, planned_only)


def _extract_source(recipe: "Recipe", retry_failed: bool, planned_only: bool) -> None:
    from epalm.data import load_dataset
    from epalm.extract.loop import extract as encode

    if recipe.encoder.online:
        why = "the encoder is trained" if recipe.encoder.train else "encoder.online is true"
        click.echo(f"extract: nothing to cache, {why}; `train` encodes media as it needs them")
        return
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


def _join(recipe: "Recipe") -> None:
    """Join the processes that were started together, if any; one of them speaks."""
    from epalm.train.processes import hush, join_processes

    hush(join_processes(recipe.device))


def _train(recipe: "Recipe", overwrite: bool, max_steps: int | None) -> tuple["Run", "Parts"]:
    from epalm.train.loop import train as fit
    from epalm.train.parts import assemble

    training = _training(assemble(recipe), overwrite, max_steps)
    fit(training)
    _say_trained(training)
    return training.run, training.parts


def _train_together(recipes: "list[Recipe]") -> "list[tuple[Run, Parts]]":
    from epalm.train.together import assemble_together, train_together

    trainings = [_training(parts, False, None) for parts in assemble_together(recipes)]
    train_together(trainings)
    for training in trainings:
        _say_trained(training)
    return [(training.run, training.parts) for training in trainings]


def _training(parts: "Parts", overwrite: bool, max_steps: int | None) -> "Training":
    from epalm.evaluate.scores import evaluation_metrics, validate
    from epalm.train.batches import TrainingBatches
    from epalm.train.loop import Training
    from epalm.train.run import Run
    from epalm.train.step import pieces_of_batch
    from epalm.train.text_states import open_text_states

    recipe = parts.recipe
    pieces_of_batch(recipe.train, parts.accelerator)  # before an old run is replaced
    evaluation_metrics(recipe, parts.dataset)
    examples = parts.dataset.split("train")
    batches = TrainingBatches(examples, parts.features, parts.codec, recipe, parts.device)
    texts = batches.texts()
    parts.room.check_training(max(map(len, texts)))
    batches.text_states = open_text_states(recipe, parts.model, texts)
    main_process = parts.accelerator.is_main_process
    target = Run.create(recipe, overwrite) if main_process else Run.of(recipe)
    parts.accelerator.wait_for_everyone()
    scored = validate if parts.dataset.split("val") else None
    return Training(target, parts, batches, scored, max_steps)


def _say_trained(training: "Training") -> None:
    progress = training.progress
    best = "none validated yet" if progress.best_step < 0 else f"best at step {progress.best_step}"
    weights = training.run.weights("best")
    click.echo(f"train: {progress.step} steps, {best}; weights in {weights}")


def _evaluate(
    run: "Run",
    parts: "Parts",
    weights: Path,
    remarks: "Callable[[dict[str, Any]], list[str]] | None" = None,
) -> None:
    """Score a run; `remarks` says in sentences what is to be added, in the report too."""
    from epalm.evaluate.figures import draw_loss
    from epalm.evaluate.report import write_report
    from epalm.evaluate.scores import evaluate as score
    from epalm.evaluate.table import headline
    from epalm.train.checkpoint import load_weights

    load_weights(weights, parts.model)
    scores = score(run, parts)
    if not parts.accelerator.is_main_process:
        return
    said = remarks(scores) if remarks else []
    files = [run.scores, write_report(run, parts.dataset, parts.features.spec, said)]
    if run.metrics.is_file():  # not imported
        files.append(draw_loss(run))
    click.echo(
        f"evaluate: {headline(scores)} on {scores['examples']} {scores['split']} examples, with "
        f"{weights.name}; written: {', '.join(map(str, files))}"
    )
    for words in said:
        click.echo(words)


def _evaluate_on(run: "Run", recipe: Path, overrides: tuple[str, ...], weights: Path) -> None:
    """Evaluate a run on another recipe's data."""
    from epalm.config import load_recipe
    from epalm.evaluate.elsewhere import begin, differences, elsewhere, gap
    from epalm.train.parts import assemble
    from epalm.train.run import Run

    other = load_recipe(recipe, overrides)
    there, target = elsewhere(run, other), Run.of(other)
    parts = assemble(there.recipe)
    said = differences(run, parts.features.spec)
    if parts.accelerator.is_main_process:
        begin(there)
    parts.accelerator.wait_for_everyone()
    _evaluate(there, parts, weights, lambda scores: said + gap(run, target, scores))


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
