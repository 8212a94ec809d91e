"""The trained weights of an augmented LM by name, as files hold them: `trained.NAME`."""

from collections.abc import Mapping

import torch
from torch import nn

from epalm.errors import EpalmError

_PREFIX = "trained."


def trained_weights(trained: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """Every parameter of `AugmentedLM.trained` once, tied weights of a trained LM too."""
    return {_PREFIX + name: value for name, value in trained.named_parameters()}


def put_weights(trained: nn.ModuleDict, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Put what `trained_weights` gave into a model of the same variant.

    Args:
        tensors: those of other names are passed over.
        source: names the file in messages.

    Raises:
        EpalmError: weights of another variant, of another LM or of another encoder.
    """
    weights = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    wanted = dict(trained.named_parameters())
    for name in sorted(wanted.keys() ^ weights.keys()):
        state = "is missing" if name in wanted else "has no place"
        raise EpalmError(f"{source}: does not fit the recipe's variant: {name} {state}")
    try:
        trained.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise EpalmError(f"{source}: does not fit the recipe's variant: {error}") from None
