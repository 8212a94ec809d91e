"""What the augmented LM needs to know of a decoder-only LM family."""

from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel


class LMFamily(Protocol):
    """Where the parts of a Hugging Face causal LM are. The LM itself is never changed.

    A new family is one file and one row of FAMILIES. Each of `layers` is called with states
    (B, S, H), `attention_mask`, the cache under the name that `model.cache.CACHE` has, `use_cache`
    and what `layer_arguments` gives, and returns states; one that names them otherwise is wrapped
    (`gpt_neox.py`). It must find its attention by Hugging Face's `AttentionInterface` and hand on
    to it what it does not know (`packing`), as the models that come with transformers do. The
    LM's config must know `num_hidden_layers`, `hidden_size`, `vocab_size` and
    `max_position_embeddings`.
    """

    layers: nn.ModuleList
    hidden_size: int
    """Width of the hidden states, H."""
    prompt_width: int
    """Width of the word embeddings, E, in which the soft prompt lives."""
    prefix_takes_places: bool
    """Perceptual and prompt tokens take positions from the text: its room is smaller by them."""

    def __init__(self, lm: PreTrainedModel): ...

    def embed_text(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """States (B, T, H) entering layer 0, of token ids (B, T).

        `positions` (B, T) count the real tokens of each row from 0, as without any prompt; pads
        have -1.
        """
        ...

    def embed_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        """States (P, H) entering layer 0, of a soft prompt (P, E)."""
        ...

    def layer_arguments(
        self, hidden: torch.Tensor, prefix_places: torch.Tensor, text_positions: torch.Tensor,
        prefix_length: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Further keyword arguments of a layer call on states (B, S, H) = prefix, then text.

        Args:
            hidden: the states, for dtype and device.
            prefix_places: (S - T,) place of each prefix state in [perceptual tokens | prompt].
            text_positions: (B, T) as in `embed_text`; T may be 0.
            prefix_length: t + P, the places that come before the text.
        """
        ...

    def attention(self, layer: int) -> nn.Module:
        """A layer's attention sub-layer: its first argument, or `hidden_states`, are states (B, S,
        H); so is its output, or the first of a tuple. The norm and the residual are outside."""
        ...

    def feed_forward(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The first and the last module of a layer's feed-forward sub-layer, often the same: states
        (..., H) enter the one and leave the other. The norm and the residual are outside."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (..., H) leaving the last layer to logits (..., V), final norm included."""
        ...
