"""The LM's number format where a recipe leaves it to the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from epalm.config import LMConfig
from epalm.device import choose_dtype
from epalm.model.load import load_lm

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "auto"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_faster_in_it(
    capabilities: dict[str, Any],
    auto: torch.dtype,
    opt_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But float32 where the LM is trained; a format that is named is kept."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", CPU) == auto
    config = LMConfig(weights=str(opt_folder))
    assert config.dtype == "auto"
    assert load_lm(config, CPU).dtype == auto
    assert load_lm(config, CPU, trained=True).dtype == torch.float32
    for name in ("float32", "bfloat16", "float16"):
        named = config.model_copy(update={"dtype": name})
        assert load_lm(named, CPU, trained=True).dtype == getattr(torch, name)
