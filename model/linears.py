"""A frozen LM's linear layers on a CPU in bfloat16: the same sums, otherwise computed.

With few tokens from weights in oneDNN's own order (`prepacked.py`), with many in pieces of rows
where one product would leave a core idle (`in_pieces.py`); with the ReLU that follows. Both use the
functions for oneDNN that torch's own compiler does.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from epalm.model.in_pieces import InPieces
from epalm.model.in_use import in_use
from epalm.model.prepacked import Prepacked
from epalm.model.relu import relus_of_linears

OWN_LINEARS_ON = {"cpu"}
_MANY = 512  # tokens; from here on, prepacked weights save too little for the memory they need

_linears: WeakKeyDictionary[nn.Module, list[nn.Linear]] = WeakKeyDictionary()
_kept: WeakKeyDictionary[nn.Linear, dict["_Kind", "_Kept"]] = WeakKeyDictionary()


class _Products(Protocol):
    """The products of a linear layer with weights (O, I)."""

    def forward(self, states: torch.Tensor, relu: bool) -> torch.Tensor:
        """(…, I) to (…, O); with `relu`, of it the ReLU."""

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """(…, O) to (…, I)."""


_Kind = Callable[[nn.Linear], _Products]


class _Kept(NamedTuple):
    """A layer's products, and the stamp of the parameters that they are made from."""

    products: _Products
    stamp: tuple[int, int, int, int]


@contextmanager
def own_linears(lm: nn.Module, tokens: int) -> Iterator[Set[nn.Module]]:
    """Within it, the frozen linear layers of an LM compute as above, where that pays.

    Args:
        tokens: of text, in this pass.

    Yields:
        The ReLUs that find nothing left to do.
    """
    on_cpu = next(lm.parameters()).device.type in OWN_LINEARS_ON
    kind = _kind(tokens) if on_cpu else None
    with in_use(lm):
        ours, done = [], set()
        if kind is not None:
            relus = relus_of_linears(lm)
            ours = [linear for linear in _all_of(lm) if _can_be(linear)]
            done = {relus[linear] for linear in ours if linear in relus}
            for linear in ours:
                vars(linear)["forward"] = _forward(_of(linear, kind), linear in relus)
        try:
            yield done
        finally:
            for linear in ours:
                del vars(linear)["forward"]


def linears_in(module: nn.Module) -> list[nn.Linear]:
    """Its linear layers; none of a subclass, which may compute otherwise."""
    return [part for part in module.modules() if type(part) is nn.Linear]


def _all_of(lm: nn.Module) -> list[nn.Linear]:
    """`linears_in`, looked for once."""
    if lm not in _linears:
        _linears[lm] = linears_in(lm)
    return _linears[lm]


def _kind(tokens: int) -> _Kind | None:
    """How linear layers compute in a pass of so many tokens; None: as they are."""
    if not _supported():
        return None
    if tokens < _MANY:
        return Prepacked
    return InPieces if _has_tiles() else None


class _Linear(torch.autograd.Function):
    """A linear layer with frozen weights."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, products: _Products, relu: bool) -> torch.Tensor:
        ctx.products = products
        return products.forward(states, relu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.products.backward(gradient), None, None


def _forward(products: _Products, relu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands in for the `forward` of a linear layer; `relu`: the module after it is a ReLU,
    which is done here and there needs only its gradient."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            out: torch.Tensor = _Linear.apply(states, products, relu)
            return out
        return products.forward(states, relu)

    return forward


def _of(linear: nn.Linear, kind: _Kind) -> _Products:
    """What is kept of a layer; new where its weights have changed."""
    kinds, stamp = _kept.setdefault(linear, {}), _stamp(linear)
    if kind not in kinds or kinds[kind].stamp != stamp:
        kinds[kind] = _Kept(kind(linear), stamp)
    return kinds[kind].products


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


@cache
def _has_tiles() -> bool:
    """Whether this processor has AMX, with which all that is not a product weighs twice as much."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
