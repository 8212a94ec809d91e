"""Cross-entropy of the text, with logits made only where there is a label, and not all at once."""

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from epalm.model.attention import own_attention
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Features
from epalm.model.families.base import LMFamily
from epalm.model.linears import own_linears
from epalm.model.relu import lean_relus
from epalm.model.text import Equal
from epalm.train.batches import Batch

_PIECE = 128  # labels whose logits are made at once: few for memory, yet enough for fast products
_ROWS = 32  # of these, whose softmax is made at once, in float32 at least: few for memory


def losses_of(model: AugmentedLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`example_losses` of a training batch."""
    return example_losses(
        model,
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        batch.features,
        batch.rows,
        batch.equal,
        batch.text_states,
        batch.labelled,
        batch.last,
    )


def example_losses(
    model: AugmentedLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    features: Features,
    rows: torch.Tensor | None = None,
    equal: Equal | None = None,
    text_states: torch.Tensor | None = None,
    labelled: torch.Tensor | None = None,
    last: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (B,) and number of labels (B,) of each text.

    Args:
        input_ids, attention_mask, features, rows, equal, text_states, last: as in
            `AugmentedLM.states`.
        labels: (B, T) the id that follows each token, -100 where it does not count; all within the
            last so many tokens where `last` is given.
        labelled: (N,) where in the flat labels of these the others are; None: looked for.
    """
    frozen = "lm" not in model.trained
    if last is not None:
        labels = labels[:, -last:]
    flat = labels.flatten()
    if labelled is None:
        labelled = (flat != -100).nonzero()[:, 0]
    with (
        own_attention(model.lm),
        own_linears(model.lm, input_ids.numel()) as done,
        lean_relus(model.lm, done) if frozen else nullcontext(),
    ):
        states = model.states(input_ids, attention_mask, features, rows, equal, text_states, last)
        states, wanted = states.flatten(0, 1)[labelled], flat[labelled]
        if frozen and states.requires_grad:
            losses = _InPieces.apply(states, wanted, model.family)
        else:
            losses = _losses(states, wanted, model.family)
    row_of = labelled // labels.shape[1]
    sums = losses.new_zeros(len(labels)).index_add(0, row_of, losses)
    return sums, (labels != -100).sum(dim=1)


def _losses(states: torch.Tensor, labels: torch.Tensor, family: LMFamily) -> torch.Tensor:
    """Cross-entropy (N,) of states (N, H) leaving the last layer, and labels (N,)."""
    return cross_entropy(_wide(family.logits(states)), labels, reduction="none")


def _into_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (N,) of logits (N, V) with labels (N,), in float32 at least; where the logits
    were, there is its gradient then."""
    wide, place = _wide(logits), (torch.arange(len(labels), device=labels.device), labels)
    top = wide.amax(dim=1, keepdim=True)
    of_label = wide[place]
    sums = wide.sub_(top).exp_().sum(dim=1, keepdim=True)
    wide.div_(sums)[place] -= 1
    if wide is not logits:
        logits.copy_(wide)
    return (top + sums.log())[:, 0] - of_label


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _InPieces(torch.autograd.Function):
    """`_losses` of a frozen LM: the gradient of each state's loss is made while its logits are at
    hand, and kept (N, H) in place of logits (N, V)."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, labels: torch.Tensor, family: LMFamily
    ) -> torch.Tensor:
        losses, gradients = [], []
        for some, wanted in zip(states.split(_PIECE), labels.split(_PIECE), strict=True):
            some = some.detach().requires_grad_()
            with torch.enable_grad():
                logits = family.logits(some)
            gradient = logits.detach()  # the same memory: for their own graph they are of no use
            for rows in zip(gradient.split(_ROWS), wanted.split(_ROWS), strict=True):
                losses.append(_into_gradient(*rows))
            gradients += torch.autograd.grad(logits, some, gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, factors: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * factors[:, None].to(gradients.dtype), None, None
