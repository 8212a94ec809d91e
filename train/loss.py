"""Cross-entropy of the text, with logits made only where there is a label."""

import torch
from torch.nn.functional import cross_entropy

from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Features
from epalm.model.text import Equal
from epalm.train.batches import Batch


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
    states = model.states(input_ids, attention_mask, features, rows, equal, text_states, last)
    if last is not None:
        labels = labels[:, -last:]
    flat = labels.flatten()
    if labelled is None:
        labelled = (flat != -100).nonzero()[:, 0]
    logits = model.family.logits(states.flatten(0, 1)[labelled])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits, flat[labelled], reduction="none")
    row_of = labelled // labels.shape[1]
    sums = losses.new_zeros(len(labels)).index_add(0, row_of, losses)
    return sums, (labels != -100).sum(dim=1)
