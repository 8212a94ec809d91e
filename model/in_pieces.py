"""The products of a linear layer with many rows, in pieces of rows where that is faster.

With AMX and two threads (not with 4 or 8), oneDNN (3.12) leaves a product to one of them if what
comes out is small and about as high as wide. Of half the rows each has a share, and both halves
together take little more than half the time. What comes out may differ by a rounding.
"""

import math

import torch
from torch import nn

from epalm.model.onednn import linear

_THREADS = 2
_COLUMNS = range(256, 1025)  # that such a product has
_LOW, _HIGH, _MOST = 0.9, 2.0, 1400  # its rows are so many for each column, but no more than these


class InPieces:
    """Of a layer with frozen weights (O, I); see `linears.py`."""

    def __init__(self, layer: nn.Linear):
        self._weight, self._bias = layer.weight, layer.bias

    def forward(self, states: torch.Tensor, relu: bool) -> torch.Tensor:
        pieces = _pieces(states.shape[:-1].numel(), len(self._weight))
        if pieces == 1:  # there, bias and ReLU cost nothing
            return linear(states, self._weight, self._bias, relu)
        out = _product(states, self._weight.t(), self._bias, pieces)
        return out.relu_() if relu else out

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        pieces = _pieces(gradient.shape[:-1].numel(), self._weight.shape[1])
        return _product(gradient, self._weight, None, pieces)


def _product(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pieces: int
) -> torch.Tensor:
    """(…, K) times (K, O), and the bias (O,)."""
    out = states.new_empty(*states.shape[:-1], weight.shape[1])
    if not out.numel():
        return out
    rows = states.reshape(-1, states.shape[-1])
    for some, into in zip(rows.chunk(pieces), out.flatten(0, -2).chunk(pieces), strict=True):
        if bias is None:
            torch.mm(some, weight, out=into)
        else:
            torch.addmm(bias, some, weight, out=into)
    return out


def _pieces(rows: int, columns: int) -> int:
    """How many a product with so many rows and columns is made in."""
    one_core = columns in _COLUMNS and _LOW * columns < rows < min(_HIGH * columns, _MOST)
    if not one_core or torch.get_num_threads() != _THREADS:
        return 1
    return math.ceil(rows / (_LOW * columns))
