"""Cross-entropy of the text, with logits made only where there is a label."""

import torch
from torch.nn.functional import cross_entropy

from epalm.config import TrainConfig
from epalm.model.augmented import AugmentedLM
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
    )


def example_losses(
    model: AugmentedLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    features: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (B,) and number of labels (B,) of each text.

    Args:
        input_ids, attention_mask, features, rows: as in `AugmentedLM.states`.
        labels: (B, T) the id that follows each token, -100 where it does not count.
    """
    states = model.states(input_ids, attention_mask, features, rows)
    labelled = labels != -100
    logits = model.family.logits(states[labelled])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits, labels[labelled], reduction="none")
    row_of = labelled.nonzero()[:, 0]
    sums = losses.new_zeros(len(labels)).index_add(0, row_of, losses)
    return sums, labelled.sum(dim=1)


def batch_loss(sums: torch.Tensor, counts: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """The scalar that is minimised.

    `answer`: mean over all labels. `all`: sum over labels divided by B, as the official code does
    with a scale of 0.1 (convention 13).
    """
    total = sums.sum() / (counts.sum() if config.loss == "answer" else len(sums))
    return total * config.loss_scale
