"""Which device to compute on, and in which number format."""

from collections.abc import Mapping
from typing import Any

import torch

from epalm.errors import EpalmError, first_line


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes a GPU when there is one."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EpalmError(
            f"device: {name!r} cannot be used here ({first_line(error)}); try auto"
        ) from None
    return device


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device. A GPU is not waited for: it copies when what it does now is done."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The LM's number format; `auto` is bfloat16 where the device multiplies faster in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        faster = _faster_on_cpu(torch.cpu.get_capabilities())
    else:
        faster = True
    return torch.bfloat16 if faster else torch.float32


def _faster_on_cpu(capabilities: Mapping[str, Any]) -> bool:
    """Without bf16 instructions, bfloat16 is emulated, about eight times slower than float32. With
    those of AVX-512 alone, it is 2.4 times faster than float32 on AMD's processors, but takes twice
    as long on Intel's: there, AMX is made for it, which a virtual machine may not have been given.
    """
    has = [name for name, value in capabilities.items() if "bf16" in name and value]
    return bool(has) and (has != ["avx512_bf16"] or "Intel" not in capabilities["cpu_name"])
