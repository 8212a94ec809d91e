"""The products of a linear layer from weights that are kept in oneDNN's own order.

oneDNN computes a product from weights that it has brought into an order of its own, and does so
anew for every product: with few rows, that is most of the work. Here the reordered weights are kept
beside the others. What comes out is the same to the last bit.
"""

import psutil
import torch
from torch import nn

from epalm.model.onednn import linear

_FREE = 0.25  # of the machine's memory, to be left by the weights kept here


class Prepacked:
    """Of a layer with frozen weights (O, I); see `linears.py`."""

    def __init__(self, layer: nn.Linear):
        self._weight, self._bias = layer.weight, layer.bias
        self._by_direction: dict[str, torch.Tensor | None] = {}

    def forward(self, states: torch.Tensor, relu: bool) -> torch.Tensor:
        weight = self._reordered("forward")
        if weight is None or not states.numel():
            out = nn.functional.linear(states, self._weight, self._bias)
            return out.relu_() if relu else out
        return linear(states, weight, self._bias, relu)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        weight = self._reordered("backward")
        if weight is None or not gradient.numel():
            return gradient @ self._weight
        return linear(gradient, weight, None)

    def _reordered(self, direction: str) -> torch.Tensor | None:
        """The weights for products in this direction; None: there is no memory for them."""
        if direction not in self._by_direction:
            found = None
            memory = psutil.virtual_memory()
            if memory.available - self._weight.nbytes > _FREE * memory.total:
                plain = self._weight.detach()
                plain = plain if direction == "forward" else plain.t().contiguous()
                found = torch.ops.mkldnn._reorder_linear_weight(plain)
            self._by_direction[direction] = found
        return self._by_direction[direction]
