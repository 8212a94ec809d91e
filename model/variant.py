"""The trained parts that a recipe's variant asks for, freshly initialised."""

from collections.abc import Mapping
from math import nan

import torch
from torch import nn
from transformers import PreTrainedModel

from epalm.config import VariantConfig
from epalm.errors import EpalmError
from epalm.model.adapters import Adapters
from epalm.model.connection import Connection, Connections
from epalm.model.deep_prompt import DeepPrompt
from epalm.model.families import family_of
from epalm.model.families.base import LMFamily
from epalm.model.soft_prompt import SoftPrompt

_AT_ONCE = 4096  # words


def make_connection(
    variant: VariantConfig, lm: PreTrainedModel, dim: int | Mapping[str, int]
) -> Connection | Connections:
    """The connection from an encoder of this width, or one for each source by name.

    Raises:
        EpalmError: a source's name that PyTorch has taken.
    """
    if not isinstance(dim, int):
        for name in dim:
            if hasattr(nn.ModuleDict(), name):
                raise EpalmError(f"also.{name}: this name is taken by PyTorch; rename the source")
        return Connections({name: _connection(variant, lm, own) for name, own in dim.items()})
    return _connection(variant, lm, dim)


def _connection(variant: VariantConfig, lm: PreTrainedModel, dim: int) -> Connection:
    hidden = family_of(lm).hidden_size
    norm = None
    if variant.token_norm != "free":
        norm = word_norm(lm) if variant.token_norm == "lm" else hidden**0.5
    return Connection(
        variant.encoder_layers,
        dim,
        hidden,
        shared=variant.connection == "shared",
        norm=norm,
        affine=variant.token_affine,
    )


def make_prompt(variant: VariantConfig, family: LMFamily) -> SoftPrompt | DeepPrompt | None:
    """The soft prompt, or the deep prompts in its place."""
    if variant.deep_prompt:
        layers, width = len(family.layers), family.hidden_size
        return DeepPrompt(layers, variant.deep_prompt, width, variant.prompt_mlp)
    if variant.prompt_length:
        return SoftPrompt(variant.prompt_length, family.prompt_width, variant.prompt_mlp)
    return None


def make_adapters(variant: VariantConfig, family: LMFamily) -> Adapters | None:
    """The adapters, where there are any."""
    attention, feed_forward = variant.attention_adapters, variant.feed_forward_adapters
    if attention.reduction or feed_forward.reduction:
        return Adapters(family, attention, feed_forward)
    return None


def trains_lm(variant: VariantConfig, lm: PreTrainedModel) -> bool:
    """Whether the LM is trained; EpalmError when its number format does not allow it."""
    if variant.train_lm and lm.dtype in (torch.bfloat16, torch.float16):
        raise EpalmError(
            f"lm.dtype: {lm.dtype} is too coarse for the small steps that train the LM; set it to "
            "float32, or variant.train_lm to false"
        )
    return variant.train_lm


@torch.no_grad()
def word_norm(lm: PreTrainedModel) -> float:
    """Mean length of the LM's words as they enter layer 0, each as the first of its text.

    Over all rows of the embedding, those that no token uses included. Not a number where the LM
    has shapes alone.
    """
    if lm.device.type == "meta":
        return nan
    family = family_of(lm)
    rows = lm.get_input_embeddings().weight.shape[0]
    total = 0.0
    for ids in torch.arange(rows, device=lm.device).split(_AT_ONCE):
        states = family.embed_text(ids[None], torch.zeros_like(ids)[None])
        total += float(states.float().norm(dim=-1).sum())
    return total / rows
