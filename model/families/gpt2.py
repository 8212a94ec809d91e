"""GPT-2 and DistilGPT2: learned positions, which the prefix does not take part in, as for OPT.

Text counts from 0 as without any prompt, so the table's rows (1024) all remain for the text.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class GPT2Family:
    """See `LMFamily`."""

    prefix_takes_places = False

    def __init__(self, lm: PreTrainedModel):
        self.decoder = lm.transformer
        self.head = lm.lm_head
        self.layers = self.decoder.h
        self.hidden_size = self.prompt_width = lm.config.hidden_size

    def embed_text(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        places = positions.clamp(min=0)  # a pad is never seen; any row serves
        return self.decoder.wte(ids) + self.decoder.wpe(places)

    def embed_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt

    def layer_arguments(
        self, hidden: torch.Tensor, prefix_places: torch.Tensor, text_positions: torch.Tensor,
        prefix_length: int,
    ) -> dict[str, Any]:  # fmt: skip
        return {}

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].attn

    def feed_forward(self, layer: int) -> tuple[nn.Module, nn.Module]:
        mlp = self.layers[layer].mlp
        return mlp, mlp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder.ln_f(hidden))
