"""Keys and values of the prefix and the text after it."""

import torch
from transformers import DynamicCache

from epalm.model.text import Equal


class PrefixCache(DynamicCache):
    """Keys and values of the prefix, then of the text; its length counts the text alone.

    Attributes:
        perceptual: t, the number of perceptual tokens. Layers below the first injection layer hold
            P prefix states, the others t + P.
        prefix_in_first_layer: one of these two.
        equal: which of the texts are, until the first of them is run; None: all differ.
    """

    perceptual = 0
    prefix_in_first_layer = 0
    equal: Equal | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx != 0:
            raise ValueError("only the first layer's text length is defined")
        return super().get_seq_length(0) - self.prefix_in_first_layer

    def take(self, layers: range, rows: torch.Tensor) -> None:
        """In these layers, let row b become what row `rows[b]` was."""
        for layer in self.layers[layers.start : layers.stop]:
            if layer.is_initialized:
                layer.keys = layer.keys.index_select(0, rows)
                layer.values = layer.values.index_select(0, rows)
