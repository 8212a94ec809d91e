"""AST checkpoints as its authors publish them, under Hugging Face's names.

The original checkpoint (github.com/YuanGongND/ast, a .pth) is a timm DeiT under `module.v.`: names
are mapped to Hugging Face's, and each `qkv` is split into its three parts. Nothing is unpickled.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ASTConfig

from epalm.errors import EpalmError, first_line
from epalm.extract.hf_folder import check_config

ORIGINAL_EPS = 1e-6
"""LayerNorm's, in timm; Hugging Face's configuration of the same weights says 1e-12."""

_OUTER = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_INNER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SHAPES = {
    "cls_token",
    "dist_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.mlp.fc1.weight",
}
_HEADS = ("mlp_head.", "head.", "head_dist.")


def read_original(file: Path) -> dict[str, torch.Tensor]:
    """An original checkpoint's weights under timm's names, without its classifiers."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        named = {
            name.removeprefix("module.").removeprefix("v."): value.float()
            for name, value in state.items()
        }
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise EpalmError(
            f"encoder.weights: {file} is not a checkpoint of tensors ({first_line(error)})"
        ) from None
    named = {name: value for name, value in named.items() if not name.startswith(_HEADS)}
    if missing := sorted(_SHAPES - named.keys()):
        raise EpalmError(f"encoder.weights: {file} holds no AST: {', '.join(missing)} missing")
    return named


def ast_config(fields: dict[str, Any], changes: dict[str, Any]) -> ASTConfig:
    """ASTConfig of these fields, some of them changed by `encoder.arch`."""
    try:
        config = ASTConfig(**(fields | changes))
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise EpalmError(f"encoder.arch: {changes} makes no AST ({reason})") from None
    check_config(config)
    return config


def original_config(
    state: dict[str, torch.Tensor], file: Path, changes: dict[str, Any]
) -> ASTConfig:
    """The architecture that an original checkpoint's shapes tell.

    They do not tell everything: unless `changes` say otherwise, heads are 64 wide as in all DeiTs,
    the input is 1024 frames of 128 mels as in the AudioSet models, and the stride is the one that
    gives as many patches as there are positions.

    Raises:
        EpalmError: no stride does.
    """
    width, positions = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 2
    patch = state["patch_embed.proj.weight"].shape[-1]
    frames, mels = changes.get("max_length", 1024), changes.get("num_mel_bins", 128)
    heads = changes.get("num_attention_heads", width // 64)
    strides = [
        s
        for s in range(1, patch + 1)
        if ((mels - patch) // s + 1) * ((frames - patch) // s + 1) == positions
    ]
    if not heads or width % heads or not strides:
        raise EpalmError(
            f"encoder.weights: {file} has {positions} positions of width {width}, which do not fit "
            f"{frames} frames of {mels} mels and {heads} heads; set encoder.arch to the model's "
            'own numbers, as in \'{"max_length": 128, "num_attention_heads": 3}\''
        )
    said = {
        "hidden_size": width,
        "num_hidden_layers": len({n.split(".")[1] for n in state if n.startswith("blocks.")}),
        "num_attention_heads": heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": ORIGINAL_EPS,
        "patch_size": patch,
        "frequency_stride": strides[0],
        "time_stride": strides[0],
    }
    return ast_config(said, changes)


def to_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names to those of Hugging Face's ASTModel; names it does not know stay as they are."""
    converted = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            stem = name.removesuffix(".weight").removesuffix(".bias")
            converted[name.replace(stem, _OUTER.get(stem, stem))] = value
            continue
        _, number, rest = name.split(".", 2)
        stem, kind = rest.rsplit(".", 1)
        layer = f"layers.{number}."
        if stem == "attn.qkv":
            for part, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}attention.{part}_proj.{kind}"] = third
        else:
            converted[f"{layer}{_INNER.get(stem, stem)}.{kind}"] = value
    return converted
