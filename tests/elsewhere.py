"""A device beside the CPU, made of the CPU: what runs on it would run on a GPU.

    python -m epalm.tests.elsewhere < COMMANDS

Tensors on the device `elsewhere` hold their numbers in a tensor on the CPU. As with a GPU's, an
operation refuses tensors of both devices, and numpy refuses theirs. What the code does for the CPU
alone is not done for them, nor what it does for CUDA alone. COMMANDS is a JSON list of lists of
arguments of `pipeline.py`, which run in this process; printed is a JSON list of [exit code,
output], one for each.

The device is told to torch for the whole process, so tests start one of its own for it.
"""

import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from click.testing import CliRunner
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from epalm.pipeline import main

NAME = "elsewhere"
_BOTH = {"copy_", "_to_copy"}  # may be given tensors of two devices
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # indices may be on the CPU


class Elsewhere(torch.Tensor):
    """A tensor on the device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            dispatch_sizes_strides_policy="sizes",
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), named: Any = None
    ) -> Any:
        return _call(function, args, named or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    # safetensors asks which tensors share memory before it takes them to the CPU
    def storage(self) -> Any:
        return self.held.storage()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


def _call(function: Any, args: Any, named: dict[str, Any]) -> Any:
    """An operation on the tensors held, its result on the device where it belongs there."""
    name = function.overloadpacket.__name__
    if name == "to":
        return function.decompose(*args, **named)
    given = [x for x in tree_leaves((args, named)) if isinstance(x, torch.Tensor)]
    ours = [x for x in given if isinstance(x, Elsewhere)]
    if ours and name not in _BOTH:
        _check(name, args, given)
    device = named.get("device")
    there = bool(ours) if device is None else torch.device(device).type == NAME
    if device is not None:
        named = {**named, "device": torch.device("cpu")}
    args, named = tree_map(_held, args), tree_map(_held, named)
    out = function(*args, **named)
    if name == "_local_scalar_dense" or not there:
        return out
    known = {id(x.held): x for x in ours}
    normal = any(not x.is_inference() for x in ours)  # a view of a normal tensor is one, too

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
            return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree_map(wrapped, out)


def _check(name: str, args: Any, given: list[torch.Tensor]) -> None:
    """RuntimeError for tensors of both devices, but for numbers."""
    if name in _INDEXED:
        given = [x for x in (args[0], *args[2:]) if isinstance(x, torch.Tensor)]
    both = {type(x) for x in given if type(x) is Elsewhere or x.dim()}
    if len(both) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


class _Module:
    """What torch asks of `torch.elsewhere`."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=0: torch.set_rng_state(state))


class _ThroughTheCPU(TorchFunctionMode):
    """`torch.tensor` makes nothing on a device in Python by itself."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        device = named.get("device")
        ours = device is not None and torch.device(device).type == NAME
        if ours and function in (torch.tensor, torch.as_tensor):
            return function(*args, **{**named, "device": "cpu"}).to(device)
        return function(*args, **named)


def _keeping_ties(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`nn.Module.to` makes new parameters of such a device: tied ones would come apart."""

    @functools.wraps(to)
    def moved(*args: Any, **named: Any) -> nn.Module:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return to(*args, **named)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return moved


def register() -> torch.library.Library:
    """Make the device known to torch; it is for as long as what is returned."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda function, *args, **named: _call(function, args, named), "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    nn.Module.to = _keeping_ties(nn.Module.to)
    _ThroughTheCPU().__enter__()
    return library


if __name__ == "__main__":
    registered = register()
    results = [CliRunner().invoke(main, command) for command in json.load(sys.stdin)]
    for result in results:
        if result.exc_info and not isinstance(result.exception, SystemExit):
            traceback.print_exception(*result.exc_info)
    print(json.dumps([[result.exit_code, result.output] for result in results]))
