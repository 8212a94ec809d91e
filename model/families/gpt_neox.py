"""GPT-NeoX, Pythia: rotary positions on a part of each head; prefix and text as in `llama.py`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from epalm.model.cache import CACHE
from epalm.model.families.llama import LlamaFamily


class NeoXLayer(nn.Module):
    """A layer of the LM under the argument names of the other families."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, **call: Any) -> torch.Tensor:
        return self.layer(hidden, layer_past=call.pop(CACHE, None), **call)


class GPTNeoXFamily(LlamaFamily):
    """See `LMFamily`."""

    def __init__(self, lm: PreTrainedModel):
        self.decoder = lm.gpt_neox
        self.head = lm.lm_head
        self.layers = nn.ModuleList(NeoXLayer(layer) for layer in self.decoder.layers)
        self.hidden_size = self.prompt_width = lm.config.hidden_size

    def embed_text(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed_in(ids)

    def attention(self, layer: int) -> nn.Module:
        return self.decoder.layers[layer].attention

    def feed_forward(self, layer: int) -> tuple[nn.Module, nn.Module]:
        mlp = self.decoder.layers[layer].mlp
        return mlp, mlp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder.final_layer_norm(hidden))
