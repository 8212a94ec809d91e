"""All runs of a sweep, one after the other or some together."""

from pathlib import Path

import click

from epalm.commands.stages import check, extract, join, train_and_evaluate
from epalm.errors import EpalmError
from epalm.evaluate.compare import compare, is_scored
from epalm.evaluate.scores_file import read_scores
from epalm.sweep import load_sweep
from epalm.train.guard import NotFiniteError
from epalm.train.run import BusyError, Run
from epalm.train.together import groups


def run_sweep(file: Path, together: int, overrides: tuple[str, ...]) -> None:
    """Extract, train and evaluate every run that has no scores yet; print their comparison.

    One whose loss is not finite, or that another process is training, leaves the others.

    Raises:
        EpalmError: nothing can begin; or, when all that can be is done, some runs are missing.
    """
    runs = load_sweep(file, overrides)
    accelerator = join(runs[0].recipe)
    for planned in runs:
        if planned.seed == runs[0].seed:  # the others differ in nothing that is checked
            check(planned.recipe)
    targets = [Run.of(planned.recipe) for planned in runs]
    for run in targets:  # what is written is written by whoever holds the run
        Run.planned(run.recipe, remedy="change the sweep's `name`, or delete that folder")
    left = [number for number, run in enumerate(targets) if not is_scored(run)]
    click.echo(f"{len(runs)} runs, {len(runs) - len(left)} of them done")
    for group in groups([targets[number].recipe for number in left], together):
        chosen = [targets[left[place]] for place in group]
        if accelerator.num_processes == 1:  # another sweep may have done some meanwhile
            chosen = [run for run in chosen if not is_scored(run)]
        if not chosen:
            continue
        for run in chosen:
            click.echo(f"{1 + targets.index(run)} of {len(runs)}: {run.folder}")
            extract(run.recipe)
        try:
            train_and_evaluate([run.recipe for run in chosen])
        except (NotFiniteError, BusyError) as error:
            if accelerator.num_processes > 1:  # the others may wait for this one
                raise
            click.echo(f"error: {error}", err=True)
    if accelerator.is_main_process:  # the others have nobody's scores
        pairs = zip(runs, targets, strict=True)
        done = [(planned.labels, read_scores(run)) for planned, run in pairs if is_scored(run)]
        if done:
            click.echo(compare(done))
        if len(done) < len(runs):
            raise EpalmError(
                f"{len(runs) - len(done)} of the {len(runs)} runs are not in the table, for what "
                "is said above; the same command tries them again"
            )
