"""The training loop, top to bottom."""

import json
from collections.abc import Callable

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from epalm.errors import EpalmError
from epalm.train.batches import TrainingBatches
from epalm.train.checkpoint import Progress, load_state, save_state, save_weights
from epalm.train.clock import Clock
from epalm.train.loss import batch_loss, losses_of
from epalm.train.optimiser import learning_rates, make_optimiser, set_learning_rates
from epalm.train.parts import Parts
from epalm.train.run import Run

Validate = Callable[[Parts], float]
"""Scores the model on the validation split; higher is better."""


def train(run: Run, parts: Parts, batches: TrainingBatches, validate: Validate | None) -> Progress:
    """Train, or go on with, a run; returns where it ended.

    Safe to interrupt: it resumes from the last checkpoint and then, on a CPU, gives the same
    weights bit for bit as an undisturbed training on the same machine.

    Args:
        run: its folder takes checkpoints and metrics.
        parts: dataset, features and model of the run's recipe.
        batches: by step.
        validate: None where the dataset has no validation split; then the last weights are best.

    Raises:
        EpalmError: the loss is not finite any more; the last checkpoint is kept.
    """
    config, model = run.recipe.train, parts.model
    run.bind_features(parts.features.spec)
    if parts.features.extraction is not None:
        run.add_stage("extract", parts.features.extraction)
    optimiser = make_optimiser(model, config)
    progress = load_state(run.last, model, optimiser) if run.last.is_file() else Progress()
    if progress.step >= config.steps:
        return progress
    run.truncate_metrics(progress.step)

    first, tokens = progress.step, 0
    clock = Clock(run)
    with (
        SummaryWriter(str(run.folder / "tensorboard"), purge_step=first + 1) as board,
        run.metrics.open("a", encoding="utf-8") as metrics,
        tqdm(total=config.steps, initial=first, desc="train", unit="step") as bar,
    ):

        def log(line: dict[str, float]) -> None:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            for name, value in line.items():
                board.add_scalar(name, value, int(line["step"]))

        while progress.step < config.steps:
            with clock.running("data"):
                batch = batches[progress.step]
                tokens += int(batch.attention_mask.sum())

            with clock.running("step"):
                set_learning_rates(optimiser, progress.step, config)
                sums, counts = losses_of(model, batch)
                loss = batch_loss(sums, counts, config)
                if not torch.isfinite(loss):
                    raise EpalmError(
                        f"{run.folder}: the loss is {loss.item()} at step {progress.step}; lower "
                        "train.lr or set train.clip_norm (checkpoints so far are kept)"
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if config.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.trained.parameters(), config.clip_norm)
                optimiser.step()
            progress.step += 1
            bar.update()

            done, last = progress.step, progress.step == config.steps
            if done % config.log_every == 0 or last or done == 1:
                seconds = clock.spent["data"] + clock.spent["step"]
                log(
                    {
                        "step": done,
                        "loss": loss.item(),
                        "lr": learning_rates(done - 1, config).connection,
                        "examples_per_second": config.batch_size * (done - first) / seconds,
                        "tokens_per_second": tokens / seconds,
                        "data_wait_share": clock.spent["data"] / seconds,
                    }
                )
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if validate is not None and (last or done % (config.val_every or config.steps) == 0):
                with clock.running("validate"):
                    score = validate(parts)
                log({"step": done, "val_accuracy": score})
                tqdm.write(f"step {done}: val accuracy {score:.1%}")
                if score > progress.best_score:
                    progress.best_score, progress.best_step = score, done
                    save_weights(run.best, model, progress)
            if last and validate is None:
                progress.best_step = done
                save_weights(run.best, model, progress)
            if last or done % config.checkpoint_every == 0:
                save_state(run.last, model, optimiser, progress)
                clock.record(done * config.batch_size)
    return progress
