"""The training loop, top to bottom."""

from collections.abc import Callable

from epalm.errors import EpalmError
from epalm.train.batches import TrainingBatches
from epalm.train.checkpoint import Progress, load_state, save_state, save_weights
from epalm.train.clock import Clock, peak_memory, words_for_rates
from epalm.train.guard import FiniteGuard
from epalm.train.log import Log
from epalm.train.optimiser import learning_rates, make_optimiser
from epalm.train.parts import Parts
from epalm.train.run import Run
from epalm.train.step import Stepper

Validate = Callable[[Parts], float]
"""Scores the model on the validation split; higher is better."""


def train(
    run: Run,
    parts: Parts,
    batches: TrainingBatches,
    validate: Validate | None,
    max_steps: int | None = None,
) -> Progress:
    """Train, or go on with, a run; returns where it ended.

    Safe to interrupt: it resumes from the last checkpoint and then, on a CPU, gives the same
    weights bit for bit as an undisturbed training on the same machine. All processes that were
    started together call it; the main one writes.

    Args:
        run: its folder takes checkpoints and metrics.
        parts: dataset, features and model of the run's recipe.
        batches: by step.
        validate: None where the dataset has no validation split; then the last weights are best.
        max_steps: stop after this step of the recipe's, to go on another time.

    Raises:
        EpalmError: the loss is not finite any more; the last checkpoint is kept.
    """
    config, model, accelerator = run.recipe.train, parts.model, parts.accelerator
    if config.patience is not None and validate is None:
        raise EpalmError("train.patience: the dataset has no val split to lose patience with")
    main = run.writes = accelerator.is_main_process
    run.bind_features(parts.features.spec)
    if parts.features.extraction is not None:
        run.add_stage("extract", parts.features.extraction)
    optimiser = make_optimiser(model, config)
    progress = load_state(run.last, model, optimiser) if run.last.is_file() else Progress()
    accelerator.wait_for_everyone()  # all have read what the main process will replace
    end = min(config.steps, max_steps or config.steps)
    if progress.step >= end or lost_patience(progress, config.patience):
        return progress

    first = progress.step
    clock = Clock(run, batches.online.encoding if batches.online is not None else None)
    guard = FiniteGuard(parts.device)
    step = Stepper(model, optimiser, batches, config, accelerator, clock)
    with Log(run, first, enabled=main) as log:
        while progress.step < end and not lost_patience(progress, config.patience):
            outcome = step(progress.step)
            guard.note(progress.step, outcome)
            progress.step += 1
            log.bar.update()

            done, last = progress.step, progress.step == config.steps
            logs = done % config.log_every == 0 or last or done == 1
            validates = validate is not None and (
                last or done % (config.val_every or config.steps) == 0
            )
            saves = done == end or done % config.checkpoint_every == 0
            if logs or validates or saves:
                with clock.running("step"):  # a GPU is waited for here
                    guard.check(run, batches, accelerator)
            if logs:
                line = {
                    "loss": accelerator.reduce(outcome.loss, "mean").item(),
                    "lr": learning_rates(done - 1, config).connection,
                    **clock.lap(),
                    "peak_memory_bytes": peak_memory(parts.device),
                }
                log.write(done, line)
                log.show(line)
            if validate is not None and validates:
                with clock.running("validate"):
                    score = validate(parts)
                log.write(done, {"val_accuracy": score})
                log.say(f"step {done}: val accuracy {score:.1%}")
                progress.stale += 1
                if score > progress.best_score:
                    progress.best_score, progress.best_step, progress.stale = score, done, 0
                    if main:
                        save_weights(run.best, model, progress)
            if last and validate is None:
                progress.best_step = done
                if main:
                    save_weights(run.best, model, progress)
            if main and (saves or lost_patience(progress, config.patience)):
                save_state(run.last, model, optimiser, progress)
                clock.record(done * config.batch_size)
        if progress.step < end:
            log.say(
                f"step {progress.step}: no better score in {progress.stale} validations, the "
                "training ends here (train.patience)"
            )
        rates = words_for_rates(clock.total(), peak_memory(parts.device))
        log.say(f"train: {progress.step - first} steps in {clock.training:.1f} s; {rates}")
    accelerator.wait_for_everyone()  # the main process has written all
    return progress


def lost_patience(progress: Progress, patience: int | None) -> bool:
    """Whether so many validations in a row were not better than the best before."""
    return patience is not None and progress.stale >= patience
