"""Adapters in the LM's layers (paper, section 4 and appendices A, B: eP-ALM_ada; convention 9).

They are attached to the frozen modules by hooks, for as long as our model runs its layers: the LM
used alone is as it was.

With f the sub-layer (attention or feed-forward), x its input (after the norm, where the norm comes
first) and A the adapter, what is added to the residual stream is
    sequential  f(x) + A(f(x))     Houlsby et al., arXiv 1902.00751; the paper's
    parallel    f(x) + A(x)        He et al., arXiv 2110.04366; MAGMA
    scaled      f(x) + s A(x)      the same, with a trained scale s, one number that starts as 1
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from epalm.config import AdapterConfig
from epalm.errors import EpalmError
from epalm.model.families.base import LMFamily

_STD = 1e-3
_HALF = (torch.bfloat16, torch.float16)


class Adapter(nn.Module):
    """A: optional LayerNorm, Linear H to H // r, ReLU, Linear H // r to H.

    Weights and biases of the linear layers are N(0, 1e-3), clamped to two deviations. All its
    parameters are trained.
    """

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        inner = width // config.reduction
        if inner < 1:
            raise EpalmError(
                f"variant: adapters with reduction {config.reduction} leave nothing of the LM's "
                f"width {width}; lower it"
            )
        linears = nn.Linear(width, inner), nn.Linear(inner, width)
        for linear in linears:
            for parameter in linear.parameters():
                parameter.data.normal_(std=_STD).clamp_(-2 * _STD, 2 * _STD)
        norm = [nn.LayerNorm(width)] if config.layer_norm else []
        self.layers = nn.Sequential(*norm, linears[0], nn.ReLU(), linears[1])
        self.scale = nn.Parameter(torch.ones(1)) if config.placement == "scaled" else None
        self.sequential = config.placement == "sequential"

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., H) to what is added, (..., H); in the arithmetic of the states."""
        with torch.autocast(states.device.type, states.dtype, enabled=states.dtype in _HALF):
            added = self.layers(states)
            if self.scale is not None:
                added = added * self.scale
        return added.to(states.dtype)


class Adapters(nn.Module):
    """The adapters by LM layer; a reduction of 0 says that a sub-layer has none.

    Raises:
        EpalmError: they would start above the LM's last layer.
    """

    def __init__(self, family: LMFamily, attention: AdapterConfig, feed_forward: AdapterConfig):
        super().__init__()
        count = len(family.layers)
        for config in (attention, feed_forward):
            if config.reduction and config.start >= count:
                raise EpalmError(
                    f"variant: adapters that start at LM layer {config.start} wanted, there are "
                    f"0 to {count - 1}"
                )
        self.attention, self.feed_forward = (
            nn.ModuleDict(
                {
                    str(layer): Adapter(family.hidden_size, config)
                    for layer in range(config.start, count if config.reduction else 0)
                }
            )
            for config in (attention, feed_forward)
        )

    @property
    def start(self) -> int:
        """The first LM layer that has any."""
        return min(int(layer) for layer in (*self.attention, *self.feed_forward))

    def attached(self, family: LMFamily, layers: range) -> AbstractContextManager[None]:
        """Within it, these layers of the LM run with their adapters."""
        return attached(family, layers, self.attention, self.feed_forward)


@contextmanager
def attached(
    family: LMFamily, layers: range, attention: nn.ModuleDict, feed_forward: nn.ModuleDict
) -> Iterator[None]:
    """Within it, these layers of the LM run with adapters.

    Args:
        attention: its adapters by the LM's layers; those that are not there have none.
        feed_forward: likewise.
    """
    with ExitStack() as stack:
        for index in layers:
            if (layer := str(index)) in attention:
                module = family.attention(index)
                stack.enter_context(_attached(attention[layer], module, module))
            if layer in feed_forward:
                stack.enter_context(_attached(feed_forward[layer], *family.feed_forward(index)))
        yield


@contextmanager
def _attached(adapter: nn.Module, first: nn.Module, last: nn.Module) -> Iterator[None]:
    """Within it, what leaves `last` has been through the adapter; x is what enters `first`."""
    entered: list[torch.Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered[:] = [args[0] if args else named["hidden_states"]]

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)
        states = states + adapter(states if adapter.sequential else entered.pop())
        return (states, *others) if isinstance(output, tuple) else states

    handles = [last.register_forward_hook(leave)]
    if not adapter.sequential:
        handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
