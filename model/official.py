"""Trained weights of the official code, under our names, and what they say of the variant.

Its checkpoints (.pth) are dictionaries whose entry `model` holds `connector.*`, `prompt_module.*`
and adapters, the latter under one of two aliases of the LM's layers, or both (convention 31, bug
27). Their entry `config` is the run's YAML file.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epalm.errors import EpalmError, first_line

_LAYERS = r"(?:model_text\.model\.decoder\.layers|transformer)\.(\d+)"
_NAMES = (
    (r"connector\.(\d+)\.(weight|bias)", r"connection.linears.\1.\2"),
    (r"prompt_module\.prefix_embedding\.0\.weight", r"soft_prompt.embedding.weight"),
    (rf"{_LAYERS}\.self_attn\.adapter\.(\d+)\.(weight|bias)",
     r"adapters.attention.\1.layers.\2.\3"),
    (rf"{_LAYERS}\.fc2\.1\.adapter\.(\d+)\.(weight|bias)",
     r"adapters.feed_forward.\1.layers.\2.\3"),
)  # fmt: skip
_MLP_LAYER = re.compile(r"prompt_module\.prefix_embedding\.(\d+)\.(weight|bias)")
# a score among the other entries may be a numpy number; written by numpy 1 or 2
_NUMBER = np.float64(0).__reduce__()[0]
_HARMLESS = [(_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [
    np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int64DType
]  # fmt: skip

State = dict[str, torch.Tensor]


def read_official(file: Path) -> tuple[State, dict[str, Any]]:
    """The entry `model` of an official checkpoint, and its other entries.

    Nothing but tensors, numbers, strings and their containers is unpickled.

    Raises:
        EpalmError: it cannot be read, or not without unpickling more than that, or is no
            checkpoint of the official code.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else first_line(error)
        raise EpalmError(
            f"{file}: holds {what}, which is not unpickled here since it could run any code. Where "
            "you trust the file, save its weights alone: torch.save({'model': torch.load(FILE, "
            "weights_only=False)['model']}, NEW)"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise EpalmError(f"{file}: cannot be read ({first_line(error)})") from None
    others = dict(loaded) if isinstance(loaded, dict) else {}
    model = others.pop("model", None)
    if not isinstance(model, dict) or not all(torch.is_tensor(v) for v in model.values()):
        raise EpalmError(
            f"{file}: holds no `model` entry of tensors; give a checkpoint that the official "
            "training scripts have saved (checkpoint_best.pth)"
        )
    return model, others


def our_name(key: str) -> str | None:
    """Name in `AugmentedLM.trained` of a parameter of the official code; None: we have no such."""
    for theirs, ours in _NAMES:
        found = re.fullmatch(theirs, key)
        if found:
            return found.expand(ours)
    found = _MLP_LAYER.fullmatch(key)
    if found:  # their MLP counts the embedding before it
        return f"soft_prompt.mlp.{int(found[1]) - 1}.{found[2]}"
    return None


def from_official(checkpoint: Mapping[str, torch.Tensor]) -> State:
    """The state of `AugmentedLM.trained`, from the `model` entry of an official checkpoint.

    Raises:
        EpalmError: parameters that no variant of ours has, or aliases that differ.
    """
    unknown = [key for key in checkpoint if our_name(key) is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise EpalmError(
            f"official checkpoint: no variant has {', '.join(unknown[:3])}{more}; give the `model` "
            "entry of a checkpoint that holds the trained parts alone"
        )
    state: State = {}
    for key, value in checkpoint.items():
        name = our_name(key)
        assert name is not None
        if name in state and not torch.equal(state[name], value):
            raise EpalmError(f"official checkpoint: {key} differs from its alias")
        state[name] = value
    return state


def variant_of(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a recipe's `variant` that the weights (`from_official`) tell, dotted.

    One connection serves any number of encoder layers, so these are told by several only. Fields
    that the official code knows nothing of have their defaults.
    """
    linears = sum(re.fullmatch(r"connection\.linears\.\d+\.weight", name) is not None
                  for name in state)  # fmt: skip
    found: dict[str, Any] = {"encoder_layers": linears} if linears > 1 else {}
    found |= {"token_norm": "free", "token_affine": False, "deep_prompt": 0, "train_lm": False}
    found["connection"] = "separate" if linears > 1 else "shared"
    prompt = state.get("soft_prompt.embedding.weight")
    found["prompt_length"] = 0 if prompt is None else len(prompt)
    if prompt is not None:
        found["prompt_mlp"] = "soft_prompt.mlp.0.weight" in state
    for part in ("attention", "feed_forward"):
        layers = f"adapters.{part}.0.layers"
        norm = state.get(f"{layers}.0.weight")
        if norm is None:
            found[f"{part}_adapters.reduction"] = 0
            continue
        found[f"{part}_adapters.placement"] = "sequential"  # the others crash there (bug 11)
        found[f"{part}_adapters.layer_norm"] = norm.ndim == 1
        inner, width = state[f"{layers}.1.weight"].shape if norm.ndim == 1 else norm.shape
        found[f"{part}_adapters.reduction"] = width // inner
    return found
