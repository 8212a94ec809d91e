"""Llama-like LMs, such as Mistral and Qwen: rotary positions.

Only distances count there, so the text may start anywhere: t perceptual tokens and P prompt tokens
take the places before it, in their order from 0, and the text follows at t + P. Distances within
the text are what they would be without them. Below the first injection layer the first t places are
empty.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class LlamaFamily:
    """See `LMFamily`."""

    prefix_takes_places = True

    def __init__(self, lm: PreTrainedModel):
        self.decoder = lm.model
        self.head = lm.lm_head
        self.layers = self.decoder.layers
        self.hidden_size = self.prompt_width = lm.config.hidden_size

    def embed_text(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed_tokens(ids)

    def embed_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt

    def layer_arguments(
        self, hidden: torch.Tensor, prefix_places: torch.Tensor, text_positions: torch.Tensor,
        prefix_length: int,
    ) -> dict[str, Any]:  # fmt: skip
        rows = text_positions.shape[0]
        places = torch.cat(
            (
                prefix_places.expand(rows, -1),
                (text_positions + prefix_length).clamp(min=0),
            ),
            dim=1,
        )
        return {"position_embeddings": self.decoder.rotary_emb(hidden, position_ids=places)}

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].self_attn

    def feed_forward(self, layer: int) -> tuple[nn.Module, nn.Module]:
        mlp = self.layers[layer].mlp
        return mlp, mlp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder.norm(hidden))
