"""One optimiser step: the batch in pieces, over all processes and one after the other.

The pieces are weighted so that their sum is the loss of the whole batch: how it is cut changes
neither loss nor gradient, but for the order in which floats are added. The weight is put on the
gradients of what is trained, in float32: through the LM go those of each label's loss, which a
float16 LM would lose if they were as small as a long batch's mean makes them.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from epalm.config import TrainConfig
from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.train.batches import Batch, TrainingBatches
from epalm.train.clock import Clock
from epalm.train.loss import losses_of
from epalm.train.online import OnlineFeatures
from epalm.train.optimiser import set_learning_rates


class Outcome(NamedTuple):
    """Of a step, on the device; to read them waits for it.

    Attributes:
        loss: () this process's share; the batch's loss is the mean over processes.
        norm: () length of the batch's gradient, before clipping.
    """

    loss: torch.Tensor
    norm: torch.Tensor


class PieceLoss(nn.Module):
    """The summed loss of a piece of a batch.

    Its parameters are those that are trained, and processes keep these alike; the frozen LM is each
    process's own.

    Args:
        online: what encodes the media of a batch, where that holds no features.
    """

    def __init__(self, model: AugmentedLM, online: OnlineFeatures | None = None):
        super().__init__()
        self.trained = model.trained
        self._whole = (model,)  # in a tuple it is no part of this module
        self._online = online

    def forward(self, batch: Batch) -> torch.Tensor:
        """() sum over the labels of the piece."""
        if self._online is not None:
            assert isinstance(batch.features, torch.Tensor)  # of one source
            batch = replace(batch, features=self._online.encode(batch.features))
        sums, _ = losses_of(self._whole[0], batch)
        return sums.sum()


class Stepper:
    """Takes optimiser steps by number.

    Args:
        model, optimiser: what is trained, and by what.
        batches: by step, and by piece.
        accelerator: of this process.
        clock: takes the time of data and step.
    """

    def __init__(
        self,
        model: AugmentedLM,
        optimiser: torch.optim.AdamW,
        batches: TrainingBatches,
        config: TrainConfig,
        accelerator: Accelerator,
        clock: Clock,
    ):
        self.pieces = pieces_of_batch(config, accelerator)
        self.optimiser, self.batches, self.config = optimiser, batches, config
        self.accelerator, self.clock = accelerator, clock
        self.parameters = [p for p in model.trained.parameters() if p.requires_grad]
        self.piece_loss = accelerator.prepare_model(
            PieceLoss(model, batches.online), device_placement=False
        )

    def __call__(self, step: int) -> Outcome:
        """Learn from the batch of a step, from 0."""
        factor = self.begin(step)
        total = torch.zeros((), device=self.batches.device)
        for index in range(self.config.accumulate):
            batch = self.piece(step, index)
            with self.clock.running("step"):
                if index < self.config.accumulate - 1:
                    with self.accelerator.no_sync(self.piece_loss):
                        total += self._learn_from(batch, factor)
                else:
                    total += self._learn_from(batch, factor)
        return Outcome(total, self.end(factor))

    def begin(self, step: int) -> float:
        """Forget the step before; the factor on the summed loss of each piece, and its gradient."""
        config = self.config
        set_learning_rates(self.optimiser, step, config)
        self.optimiser.zero_grad(set_to_none=True)
        whole = self.batches.size(step)
        self.clock.count_batch(whole)
        # processes average their gradients, so that each has to give its share as many times
        factor = config.loss_scale * self.accelerator.num_processes
        return factor / (whole.labels if config.loss == "answer" else whole.examples)

    def piece(self, step: int, index: int) -> Batch:
        """Piece `index` of this process's share of a batch."""
        count = self.config.accumulate
        with self.clock.running("data"):
            piece = self.accelerator.process_index * count + index
            batch = self.batches.piece(step, piece, self.pieces)
            size = self.batches.size(step, piece, self.pieces)
            self.clock.count_piece(size, batch.input_ids.numel())
            if index < count - 1:
                self.batches.prepare(step, piece + 1, self.pieces)
            elif step + 1 < self.config.steps:
                self.batches.prepare(step + 1, piece + 1 - count, self.pieces)
        return batch

    def end(self, factor: float) -> torch.Tensor:
        """Change the parameters; the gradient's length before it was clipped."""
        with self.clock.running("step"):
            norm = self._weigh_and_clip(factor)
            self.optimiser.step()
        return norm

    def _learn_from(self, batch: Batch, factor: float) -> torch.Tensor:
        loss = self.piece_loss(batch)
        loss.backward()
        return loss.detach() * factor

    def _weigh_and_clip(self, factor: float) -> torch.Tensor:
        """The gradient's length, before it is cut down to `clip_norm`."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        return norm


def pieces_of_batch(config: TrainConfig, accelerator: Accelerator) -> int:
    """How many pieces a batch is cut into; EpalmError when it cannot be cut so."""
    pieces = accelerator.num_processes * config.accumulate
    if config.batch_size % pieces:
        raise EpalmError(
            f"train.batch_size: {config.batch_size} examples cannot be shared by "
            f"{accelerator.num_processes} processes with train.accumulate {config.accumulate}; "
            f"make it divisible by {pieces}"
        )
    return pieces
