"""Trained weights of the official code, under our names.

Its checkpoints hold `connector.*`, `prompt_module.*` and adapters, the latter under one of two
aliases of the LM's layers, or both (convention 31, bug 27).
"""

import re
from collections.abc import Mapping

import torch

from epalm.errors import EpalmError

_LAYERS = r"(?:model_text\.model\.decoder\.layers|transformer)\.(\d+)"
_NAMES = (
    (r"connector\.(\d+)\.(weight|bias)", r"connection.linears.\1.\2"),
    (r"prompt_module\.prefix_embedding\.0\.weight", r"soft_prompt.embedding.weight"),
    (rf"{_LAYERS}\.self_attn\.adapter\.(\d+)\.(weight|bias)",
     r"adapters.attention.\1.layers.\2.\3"),
    (rf"{_LAYERS}\.fc2\.1\.adapter\.(\d+)\.(weight|bias)",
     r"adapters.feed_forward.\1.layers.\2.\3"),
)  # fmt: skip
_MLP = re.compile(r"prompt_module\.prefix_embedding\.(\d+)\.(weight|bias)")


def our_name(key: str) -> str | None:
    """Name in `AugmentedLM.trained` of a parameter of the official code; None: we have no such."""
    for theirs, ours in _NAMES:
        found = re.fullmatch(theirs, key)
        if found:
            return found.expand(ours)
    found = _MLP.fullmatch(key)
    if found:  # their MLP counts the embedding before it
        return f"soft_prompt.mlp.{int(found[1]) - 1}.{found[2]}"
    return None


def from_official(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of `AugmentedLM.trained`, from the `model` entry of an official checkpoint.

    Raises:
        EpalmError: parameters that no variant of ours has, or aliases that differ.
    """
    unknown = [key for key in checkpoint if our_name(key) is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise EpalmError(
            f"official checkpoint: no variant has {', '.join(unknown[:3])}{more}; give the `model` "
            "entry of a checkpoint that holds the trained parts alone"
        )
    state: dict[str, torch.Tensor] = {}
    for key, value in checkpoint.items():
        name = our_name(key)
        assert name is not None
        if name in state and not torch.equal(state[name], value):
            raise EpalmError(f"official checkpoint: {key} differs from its alias")
        state[name] = value
    return state
