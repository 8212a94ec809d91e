"""The stages of a run as commands take them, and what they say of them."""

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator

    from epalm.config import Recipe
    from epalm.train.loop import Training
    from epalm.train.parts import Parts
    from epalm.train.run import Run


def check(recipe: "Recipe") -> None:
    """What would stop a later stage, before hours are spent.

    Raises:
        EpalmError: something would.
    """
    from epalm.data.sources import load_sources
    from epalm.evaluate.scores import evaluation_examples, evaluation_metrics
    from epalm.train.check import check_training

    dataset = load_sources(recipe)
    check_training(recipe, dataset)
    evaluation_examples(recipe, dataset)
    evaluation_metrics(recipe, dataset)


def extract(recipe: "Recipe", retry_failed: bool = False, planned_only: bool = False) -> None:
    from epalm.data.sources import naming

    for name, alone in recipe.sources().items():
        if recipe.also:
            click.echo(f"source {name}:")
        with naming(name, bool(recipe.also)):
            extract_source(alone, retry_failed, planned_only)


def extract_source(recipe: "Recipe", retry_failed: bool, planned_only: bool) -> None:
    from epalm.data import load_dataset
    from epalm.extract.loop import extract as encode

    if recipe.encoder.online:
        why = "the encoder is trained" if recipe.encoder.train else "encoder.online is true"
        click.echo(f"extract: nothing to cache, {why}; `train` encodes media as it needs them")
        return
    with _writing(recipe):
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
        f"{report.found} were there, {len(report.failed)} failed; in {features.folder}"
    )


def join(recipe: "Recipe") -> "Accelerator":
    """Join the processes that were started together, if any; one of them speaks."""
    from epalm.train.processes import hush, join_processes

    accelerator = join_processes(recipe.device)
    hush(accelerator)
    return accelerator


def train(
    recipe: "Recipe", locks: ExitStack, overwrite: bool = False, max_steps: int | None = None
) -> tuple["Run", "Parts"]:
    """A trained run, and its model; `locks` holds the run until it is closed."""
    from epalm.train.loop import train as fit
    from epalm.train.parts import assemble

    with _writing(recipe):
        training = _training(assemble(recipe), locks, overwrite, max_steps)
        fit(training)
    _say_trained(training)
    return training.run, training.parts


def _train_together(
    recipes: "list[Recipe]", locks: ExitStack
) -> "tuple[list[tuple[Run, Parts]], list[str]]":
    """Those that were trained, and what is wrong with the others."""
    from epalm.train.together import assemble_together, train_together

    with _writing(recipes[0]):
        trainings = [_training(parts, locks) for parts in assemble_together(recipes)]
        stopped = train_together(trainings)
    trained = [training for training in trainings if training not in stopped]
    for training in trained:
        _say_trained(training)
    return [(each.run, each.parts) for each in trained], [*map(str, stopped.values())]


def train_and_evaluate(recipes: "list[Recipe]") -> None:
    """Runs that train together, or one; their models are let go before the next are loaded.

    Raises:
        NotFiniteError: some are not finite any more; the others have been evaluated.
    """
    from epalm.train.guard import NotFiniteError

    wrong: list[str] = []
    with ExitStack() as locks:
        if len(recipes) == 1:
            trained = [train(recipes[0], locks)]
        else:
            trained, wrong = _train_together(recipes, locks)
        for run, parts in trained:
            evaluate(run, parts, run.weights("best"))
    if wrong:
        raise NotFiniteError("\n".join(wrong))


@contextmanager
def _writing(recipe: "Recipe") -> "Iterator[None]":
    """Within it, a folder that cannot be written to is an error of the field that names it."""
    from epalm.store.atomic import writing_into

    store, runs = Path(recipe.store.root), Path(recipe.runs)
    with writing_into(store, "store.root"), writing_into(runs, "runs"):
        yield


def _training(
    parts: "Parts", locks: ExitStack, overwrite: bool = False, max_steps: int | None = None
) -> "Training":
    """Ready to begin or go on; `locks` as in `train`."""
    from epalm.evaluate.scores import evaluation_metrics, validate
    from epalm.train.batches import TrainingBatches
    from epalm.train.check import check_splits
    from epalm.train.loop import Training
    from epalm.train.run import Run
    from epalm.train.step import pieces_of_batch
    from epalm.train.text_states import open_text_states

    recipe = parts.recipe
    check_splits(parts.dataset, recipe)  # before an old run is replaced
    pieces_of_batch(recipe.train, parts.accelerator)
    evaluation_metrics(recipe, parts.dataset)
    examples = parts.dataset.split("train")
    batches = TrainingBatches(examples, parts.features, parts.codec, recipe, parts.device)
    parts.room.check_training(batches.longest())
    batches.text_states = open_text_states(recipe, parts.model, batches.texts)
    target = Run.of(recipe)
    if parts.accelerator.is_main_process:
        locks.enter_context(target.alone())
        Run.create(recipe, overwrite)
    parts.accelerator.wait_for_everyone()
    scored = validate if parts.dataset.split("val") else None
    return Training(target, parts, batches, scored, max_steps)


def _say_trained(training: "Training") -> None:
    progress = training.progress
    best = "none validated yet" if progress.best_step < 0 else f"best at step {progress.best_step}"
    weights = training.run.weights("best")
    click.echo(f"train: {progress.step} steps, {best}; weights in {weights}")


def evaluate(
    run: "Run",
    parts: "Parts",
    weights: Path,
    remarks: "Callable[[dict[str, Any]], list[str]] | None" = None,
) -> None:
    """Score a run; `remarks` says in sentences what is to be added, in the report too.

    Raises:
        EpalmError: it cannot be scored, or its recipe or LM is not the one it was trained by.
        BusyError: another process is evaluating it.
    """
    with _scoring(run, parts):
        _evaluate(run, parts, weights, remarks)


@contextmanager
def _scoring(run: "Run", parts: "Parts") -> "Iterator[None]":
    """Within it, the processes that were started together alone write a folder's scores."""
    from epalm.store.atomic import writing_into

    with writing_into(run.folder, "run folder"), ExitStack() as locks:
        if parts.accelerator.is_main_process:
            locks.enter_context(run.scoring())
        parts.accelerator.wait_for_everyone()
        yield


def _evaluate(
    run: "Run",
    parts: "Parts",
    weights: Path,
    remarks: "Callable[[dict[str, Any]], list[str]] | None",
) -> None:
    from epalm.evaluate.figures import draw_loss
    from epalm.evaluate.report import write_report
    from epalm.evaluate.scores import evaluate as score
    from epalm.evaluate.table import headline
    from epalm.train.checkpoint import load_weights
    from epalm.train.inputs import check_lm
    from epalm.train.run import FREE_TO_SCORE

    run.check_changes(FREE_TO_SCORE)
    check_lm(run, parts.codec)
    progress = load_weights(weights, parts.model)
    said = [f"Not as its recipe says: {line}." for line in run.changes()]
    files = [run.scores]

    def present(scores: "dict[str, Any]") -> None:
        said.extend(remarks(scores) if remarks else [])
        files.append(write_report(run, scores, parts.dataset, parts.features.spec, said))
        if run.metrics.is_file():  # not imported
            files.append(draw_loss(run))

    scores = score(run, parts, progress.step, present)
    if not parts.accelerator.is_main_process:
        return
    click.echo(
        f"evaluate: {headline(scores)} on {scores['examples']} {scores['split']} examples, with "
        f"{weights.name}; written: {', '.join(map(str, files))}"
    )
    for words in said:
        click.echo(words)


def evaluate_on(run: "Run", recipe: Path, overrides: tuple[str, ...], weights: Path) -> None:
    """Evaluate a run on another recipe's data."""
    from epalm.config import load_recipe
    from epalm.evaluate.elsewhere import begin, differences, elsewhere, gap
    from epalm.train.inputs import check_lm
    from epalm.train.parts import assemble
    from epalm.train.run import Run

    other = load_recipe(recipe, overrides)
    there, target = elsewhere(run, other), Run.of(other)
    parts = assemble(there.recipe)
    check_lm(run, parts.codec)
    said = differences(run, parts.features.spec)
    with _scoring(there, parts):
        if parts.accelerator.is_main_process:
            begin(there)
        parts.accelerator.wait_for_everyone()
        _evaluate(there, parts, weights, lambda scores: said + gap(run, target, scores))
