"""Stops a training whose loss or gradient is no finite number, and keeps the batch that did it.

Whether they are finite is noted on the device at every step, and read only now and then: reading
makes a GPU wait. A batch follows from its step's number, so that it can be made again when its step
is long over. The weights have been spoilt by then; what is saved has not, since the training looks
before it saves or validates anything.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save

from epalm.errors import EpalmError
from epalm.store.atomic import write_atomic
from epalm.train.batches import TrainingBatches
from epalm.train.run import Run
from epalm.train.step import Outcome

_NEVER = -1


class NotFiniteError(EpalmError):
    """A run's loss or gradient is not finite any more."""


class FiniteGuard:
    """Remembers the first step whose loss or gradient norm was not finite."""

    def __init__(self, device: torch.device):
        self._step = torch.full((), _NEVER, device=device)
        self._outcome = torch.zeros(2, device=device)

    def note(self, step: int, outcome: Outcome) -> None:
        """Look at a step's outcome, without waiting for it."""
        pair = torch.stack((outcome.loss.float(), outcome.norm.float()))
        first = ~pair.isfinite().all() & (self._step == _NEVER)
        self._step = torch.where(first, step, self._step)
        self._outcome = torch.where(first, pair, self._outcome)

    def check(self, run: Run, batches: TrainingBatches, accelerator: Accelerator) -> None:
        """Read what was noted; all processes must call it together.

        Raises:
            NotFiniteError: a step was not finite; names the file with its batch.
        """
        mine = (int(self._step), *self._outcome.tolist())
        bad = [note for note in gather_object([mine]) if note[0] != _NEVER]
        if not bad:
            return
        step = min(note[0] for note in bad)
        loss, norm = next(note[1:] for note in bad if note[0] == step)
        path = run.folder / f"not-finite-{step}.json"
        if accelerator.is_main_process:
            _save(path, step, loss, norm, batches)
        accelerator.wait_for_everyone()  # a process that ends early would end the one that writes
        raise NotFiniteError(
            f"{run.folder}: the loss is {loss} and its gradient's norm {norm} at step {step}; "
            f"lower train.lr or set train.clip_norm. The batch is in {path}, and as tensors beside "
            "it; checkpoints so far are kept"
        )


def _save(path: Path, step: int, loss: float, norm: float, batches: TrainingBatches) -> None:
    """The batch for a reader, and beside it what the model got."""
    batch = batches[step]
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch.features, Mapping):
        tensors |= {f"features.{name}": own for name, own in batch.features.items()}
    write_atomic(
        path.with_suffix(".safetensors"),
        save({k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)}),
    )
    examples = [
        {"id": e.id, "media": e.media, "prompt": e.prompt, "answer": answer}
        for e, answer in batches.chosen(step)
    ]
    content = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "examples": examples}
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False))
