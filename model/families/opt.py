"""OPT, 125M to 66B: learned positions, which the prefix does not take part in (convention 6).

OPT-350M has no final norm and projects in and out of a smaller word-embedding width; the soft
prompt passes through the projection, the perceptual token does not (conventions 4 and 5).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class OPTFamily:
    """See `LMFamily`."""

    prefix_takes_places = False

    def __init__(self, lm: PreTrainedModel):
        self.decoder = lm.model.decoder
        self.head = lm.lm_head
        self.layers = self.decoder.layers
        self.hidden_size = lm.config.hidden_size
        self.prompt_width = lm.config.word_embed_proj_dim

    def embed_text(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        words = self._project_in(self.decoder.embed_tokens(ids))
        table = self.decoder.embed_positions
        return words + table(None, position_ids=positions)

    def embed_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        return self._project_in(prompt)

    def layer_arguments(
        self, hidden: torch.Tensor, prefix_places: torch.Tensor, text_positions: torch.Tensor,
        prefix_length: int,
    ) -> dict[str, Any]:  # fmt: skip
        return {}

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].self_attn

    def feed_forward(self, layer: int) -> tuple[nn.Module, nn.Module]:
        return self.layers[layer].fc1, self.layers[layer].fc2

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        if self.decoder.project_out is not None:
            hidden = self.decoder.project_out(hidden)
        return self.head(hidden)

    def _project_in(self, words: torch.Tensor) -> torch.Tensor:
        return words if self.decoder.project_in is None else self.decoder.project_in(words)
