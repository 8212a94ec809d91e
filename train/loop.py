"""The training loop: `train` runs it, `Training` is what happens between its steps."""

from collections.abc import Callable
from types import TracebackType

from epalm.errors import EpalmError
from epalm.train.answer_start import start_from_answers
from epalm.train.batches import TrainingBatches
from epalm.train.checkpoint import load_state, read_weights, save_state, save_weights
from epalm.train.clock import Clock, peak_memory, words_for_rates
from epalm.train.guard import FiniteGuard
from epalm.train.inputs import bind_inputs
from epalm.train.log import Log
from epalm.train.optimiser import learning_rates, make_optimiser
from epalm.train.parts import Parts
from epalm.train.progress import Progress
from epalm.train.run import Run
from epalm.train.step import Outcome, Stepper

Validate = Callable[[Parts], float]
"""Scores the model on the validation split; higher is better."""


def train(training: "Training") -> Progress:
    """Train, or go on with, a run; returns where it ended.

    Safe to interrupt: it resumes from the last checkpoint and then, on a CPU, gives the same
    weights bit for bit as an undisturbed training on the same machine. All processes that were
    started together call it; the main one writes.

    Raises:
        EpalmError: the loss is not finite any more; the last checkpoint is kept.
    """
    if not training.over:
        with training:
            step = training.stepper()
            while not training.over:
                training.after(step(training.progress.step))
    return training.progress


class Training:
    """A run's training between steps: what is logged, validated and saved after each.

    It is to be entered while it takes steps.

    Attributes:
        progress: how far it is.

    Args:
        run: its folder takes checkpoints and metrics; its last checkpoint is loaded.
        parts: dataset, features and model of the run's recipe.
        batches: by step.
        validate: None where the dataset has no validation split; then the last weights are best.
        max_steps: stop after this step of the recipe's, to go on another time.

    Raises:
        EpalmError: the run is of other features, another LM or other examples, a checkpoint cannot
            be read, or its weights were imported.
    """

    def __init__(
        self,
        run: Run,
        parts: Parts,
        batches: TrainingBatches,
        validate: Validate | None,
        max_steps: int | None = None,
    ):
        config, accelerator = run.recipe.train, parts.accelerator
        self.run, self.parts, self.batches, self.validate = run, parts, batches, validate
        run.writes = accelerator.is_main_process
        run.bind_features(parts.features.spec)
        bind_inputs(run, parts)
        if parts.features.extraction is not None:
            run.add_stage("extract", parts.features.extraction)
        self.optimiser = make_optimiser(parts.model, config)
        found = run.last.is_file()
        if run.best.is_file() and not found and not run.metrics.is_file():
            raise EpalmError(
                f"{run.folder}: holds weights that were imported, and a training would replace "
                "them; choose another name (--set name=…), or give them up with --overwrite"
            )
        self.progress = load_state(run.last, parts.model, self.optimiser) if found else Progress()
        if run.writes and self.progress.best_step >= 0:
            read_weights(run.weights("best"))  # no later step would bring them back
        if not found and config.connection_start == "answers":
            run.add_stage("start", start_from_answers(parts, batches.examples))
        accelerator.wait_for_everyone()  # all have read what the main process will replace
        self.first = self.progress.step
        self.end = min(config.steps, max_steps or config.steps)
        self.clock = Clock(run, batches.online.encoding if batches.online is not None else None)
        self._guard = FiniteGuard(parts.device)

    @property
    def over(self) -> bool:
        """It has taken its last step, or has lost patience."""
        return self.progress.step >= self.end or self.progress.is_over(self.run.recipe.train)

    def stepper(self) -> Stepper:
        """Takes its steps."""
        config, accelerator = self.run.recipe.train, self.parts.accelerator
        return Stepper(
            self.parts.model, self.optimiser, self.batches, config, accelerator, self.clock
        )

    def __enter__(self) -> "Training":
        self.log = Log(self.run, self.first, enabled=self.run.writes).__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            progress, say = self.progress, self.log.say
            if progress.step < self.end and progress.is_impatient(self.run.recipe.train):
                say(
                    f"step {progress.step}: no better score in {progress.stale} validations, the "
                    "training ends here (train.patience)"
                )
            rates = words_for_rates(self.clock.total(), peak_memory(self.parts.device))
            steps, seconds = progress.step - self.first, self.clock.training
            say(f"train: {steps} steps in {seconds:.1f} s; {rates}")
        self.log.__exit__(kind, error, trace)
        if error is None:
            self.parts.accelerator.wait_for_everyone()  # the main process has written all

    def after(self, outcome: Outcome) -> None:
        """What follows the step that was taken."""
        config, model, progress = self.run.recipe.train, self.parts.model, self.progress
        self._guard.note(progress.step, outcome)
        progress.step += 1
        self.log.bar.update()

        done, last = progress.step, progress.step == config.steps
        logs = done % config.log_every == 0 or last or done == 1
        validates = self.validate is not None and (
            last or done % (config.val_every or config.steps) == 0
        )
        saves = done == self.end or done % config.checkpoint_every == 0
        if logs or validates or saves:
            with self.clock.running("step"):  # a GPU is waited for here
                self._guard.check(self.run, self.batches, self.parts.accelerator)
        if logs:
            line = {
                "loss": self.parts.accelerator.reduce(outcome.loss, "mean").item(),
                "lr": learning_rates(done - 1, config).connection,
                **self.clock.lap(),
                "peak_memory_bytes": peak_memory(self.parts.device),
            }
            self.log.write(done, line)
            self.log.show(line)
        if validates:
            self._validate()
        if last and self.validate is None:
            progress.best_step = done
            self._save_best()
        if self.run.writes and (saves or progress.is_impatient(config)):
            save_state(self.run.last, model, self.optimiser, progress)
            self.clock.record(done * config.batch_size)

    def _validate(self) -> None:
        assert self.validate is not None
        progress = self.progress
        with self.clock.running("validate"):
            score = self.validate(self.parts)
        self.log.write(progress.step, {"val_score": score})
        self.log.say(f"step {progress.step}: validation score x 100 {100 * score:.1f}")
        progress.stale += 1
        if score > progress.best_score:
            progress.best_score, progress.best_step, progress.stale = score, progress.step, 0
            self._save_best()

    def _save_best(self) -> None:
        if self.run.writes:
            save_weights(self.run.best, self.parts.model, self.progress)
