"""A frozen LM's linear layers on a CPU in bfloat16, with weights in oneDNN's own order.

oneDNN computes a product from weights that it has brought into an order of its own, and does so
anew for every product: with few rows, that is most of the work. Here the reordered weights are kept
beside the others. The functions for it are those that torch's own compiler uses; what comes out is
the same to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from epalm.model.in_use import in_use

PREPACKED_ON = {"cpu"}
_MANY = 512  # tokens; from here on it saves a tenth of the time, which is not worth the memory
_FREE = 0.25  # of the machine's memory, to be left by the weights kept here

_linears: WeakKeyDictionary[nn.Module, list[nn.Linear]] = WeakKeyDictionary()
_kept: WeakKeyDictionary[nn.Linear, "_Prepacked"] = WeakKeyDictionary()


@contextmanager
def prepacked(lm: nn.Module, tokens: int) -> Iterator[None]:
    """Within it, the frozen linear layers of an LM compute with reordered weights, where that pays.

    Args:
        tokens: of text, in this pass.
    """
    pays = tokens < _MANY and next(lm.parameters()).device.type in PREPACKED_ON and _supported()
    with in_use(lm):
        if lm not in _linears:
            _linears[lm] = linears_in(lm)
        ours = [linear for linear in _linears[lm] if _can_be(linear)] if pays else []
        for linear in ours:
            vars(linear)["forward"] = _of(linear)
        try:
            yield
        finally:
            for linear in ours:
                del vars(linear)["forward"]


def linears_in(module: nn.Module) -> list[nn.Linear]:
    """Its linear layers; none of a subclass, which may compute otherwise."""
    return [part for part in module.modules() if type(part) is nn.Linear]


class _Prepacked:
    """What stands in for the `forward` of a linear layer with weights (O, I).

    Attributes:
        stamp: of the layer's parameters.
    """

    def __init__(self, linear: nn.Linear):
        self._weight, self._bias = linear.weight, linear.bias
        self.stamp = _stamp(linear)
        self._by_direction: dict[str, torch.Tensor | None] = {}

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(…, I) to (…, O)."""
        if states.requires_grad and torch.is_grad_enabled():
            out: torch.Tensor = _Linear.apply(states, self)
            return out
        return self.forward(states)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self._reordered("forward")
        if weight is None or not states.numel():
            return nn.functional.linear(states, self._weight, self._bias)
        return _product(states, weight, self._bias)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """(…, O) to (…, I)."""
        weight = self._reordered("backward")
        if weight is None or not gradient.numel():
            return gradient @ self._weight
        return _product(gradient, weight, None)

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


class _Linear(torch.autograd.Function):
    """A linear layer with frozen weights."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, linear: _Prepacked) -> torch.Tensor:
        ctx.linear = linear
        return linear.forward(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.linear.backward(gradient), None


def _product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return out


def _of(linear: nn.Linear) -> _Prepacked:
    """What is kept of a layer; new where its weights have changed."""
    found = _kept.get(linear)
    if found is None or found.stamp != _stamp(linear):
        found = _kept[linear] = _Prepacked(linear)
    return found


def _stamp(linear: nn.Linear) -> tuple[int, int, int, int]:
    """Another one where its weights, or the memory that they are in, are others."""
    weight = linear.weight
    return id(linear.bias), id(weight), weight.data_ptr(), weight._version


def _can_be(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and not (weight.requires_grad or weight.is_inference())
        and "forward" not in vars(linear)
    )


@cache
def _supported() -> bool:
    """By this machine, of the only kind on which it was tried, and by this torch, which does not
    document what is used of it."""
    ops = torch.ops.mkldnn
    return (
        torch.cpu.get_capabilities().get("architecture") == "x86_64"
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
        and bool(ops._is_mkldnn_bf16_supported())
    )
