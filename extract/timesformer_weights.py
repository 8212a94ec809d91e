"""TimeSformer's weights under Hugging Face's names, from either kind of checkpoint.

Original checkpoints (facebookresearch/TimeSformer, .pyth) are read without their classifier. Their
shapes say the architecture, all but the number of heads: 64 wide in every published model.

The two tables of embeddings are resampled to other frames and image sizes by nearest neighbour, as
the original forward pass does.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TimesformerConfig

from epalm.errors import EpalmError, first_line

POSITIONS = "embeddings.position_embeddings"
TIMES = "embeddings.time_embeddings"

_OUTER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": POSITIONS,
    "time_embed": TIMES,
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_INNER = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "temporal_norm1": "temporal_layernorm",
    "temporal_attn.qkv": "temporal_attention.attention.qkv",
    "temporal_attn.proj": "temporal_attention.output.dense",
    "temporal_fc": "temporal_dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HEAD_WIDTH = 64

State = dict[str, torch.Tensor]


def read_original(file: Path, device: str = "cpu") -> State:
    """Weights of an original checkpoint under Hugging Face's names.

    Args:
        file: a .pyth file: a dictionary with `model_state`, or the state dict itself.
        device: `meta` reads the shapes only.

    Raises:
        EpalmError: it is something else.
    """
    loaded = _torch_load(file, device)
    state = loaded.get("model_state", loaded) if isinstance(loaded, dict) else {}
    try:
        converted = converted_names(state)
        original_config(converted)
    except (KeyError, ValueError, AttributeError, IndexError):
        raise EpalmError(
            f"encoder.weights: {file} is not a checkpoint of TimeSformer's authors; give one of "
            "theirs (.pyth), or a folder in Hugging Face's format"
        ) from None
    return converted


def read_hugging_face(file: Path) -> State:
    """Weights of a Hugging Face folder's model.safetensors or pytorch_model.bin, less the head.

    Raises:
        EpalmError: it cannot be read.
    """
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise EpalmError(f"encoder.weights: {file} cannot be read ({error})") from None
    else:
        state = _torch_load(file, "cpu")
    return {
        name.removeprefix("timesformer."): value
        for name, value in state.items()
        if not name.startswith("classifier.")
    }


def converted_names(state: Mapping[str, torch.Tensor]) -> State:
    """Original names, with or without `model.`, to Hugging Face's; the classifier is left out.

    Raises:
        KeyError, ValueError: a name that TimeSformer does not have.
    """
    converted = {}
    for full, value in state.items():
        name = full.removeprefix("model.")
        if name.startswith("head."):
            continue
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            converted[f"encoder.layer.{number}.{_INNER[part]}.{kind}"] = value
        elif name in _OUTER:
            converted[_OUTER[name]] = value
        else:
            part, kind = name.rsplit(".", 1)
            converted[f"{_OUTER[part]}.{kind}"] = value
    return converted


def original_config(
    state: Mapping[str, torch.Tensor], heads: int | None = None
) -> TimesformerConfig:
    """The architecture of an original checkpoint, from its shapes.

    Args:
        state: of `converted_names`; may lie on the meta device.
        heads: attention heads, which shapes do not tell; default: one per 64 of the width.
    """
    dim, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    grid = _grid(state[POSITIONS])
    first = "encoder.layer.0."
    if TIMES not in state:
        attention = "space_only"
    elif first + "temporal_dense.weight" in state:
        attention = "divided_space_time"
    else:
        attention = "joint_space_time"
    return TimesformerConfig(
        image_size=grid * patch,
        patch_size=patch,
        num_frames=state[TIMES].shape[1] if TIMES in state else 1,
        hidden_size=dim,
        num_hidden_layers=len({n.split(".")[2] for n in state if n.startswith("encoder.layer.")}),
        num_attention_heads=heads or max(1, dim // _HEAD_WIDTH),
        intermediate_size=state[first + "intermediate.dense.weight"].shape[0],
        qkv_bias=first + "attention.attention.qkv.bias" in state,
        attention_type=attention,
    )


def resampled(state: State, frames: int, grid: int) -> State:
    """The state with its tables for `frames` frames and grid x grid patches, by nearest."""
    state = dict(state)
    if TIMES in state and state[TIMES].shape[1] != frames:
        rows = state[TIMES].transpose(1, 2)
        state[TIMES] = torch.nn.functional.interpolate(rows, frames).transpose(1, 2)
    if (old := _grid(state[POSITIONS])) != grid:
        cls, patches = state[POSITIONS][:, :1], state[POSITIONS][:, 1:]
        square = patches.transpose(1, 2).unflatten(2, (old, old))
        patches = torch.nn.functional.interpolate(square, (grid, grid)).flatten(2).transpose(1, 2)
        state[POSITIONS] = torch.cat((cls, patches), dim=1)
    return state


def _grid(positions: torch.Tensor) -> int:
    patches = positions.shape[1] - 1
    grid = int(patches**0.5)
    if grid * grid != patches:
        raise ValueError(f"{patches} patches are no square")
    return grid


def _torch_load(file: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise EpalmError(f"encoder.weights: {file} cannot be read ({first_line(error)})") from None
