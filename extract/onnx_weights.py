"""A DINOv2 ViT inside an ONNX graph, as a timm state dict.

The exporter kept Hugging Face's names for everything but the linear weights: each of these is the
MatMul initialiser that feeds its bias's Add, stored transposed. The position embedding stands as
two unnamed constants, the class token's (1, 1, D) and the patch grid's (1, N, D).
"""

from pathlib import Path

import onnx
import torch
from onnx.numpy_helper import to_array

from epalm.errors import EpalmError

_PREFIX = "backbone."
_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INNER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_dinov2(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights under timm's names; EpalmError when the graph holds none."""
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf raises its own, unexported kinds
        raise EpalmError(f"encoder.weights: {path} is not an ONNX file ({error})") from None
    tensors = {i.name: torch.from_numpy(to_array(i).copy()) for i in graph.initializer}
    named = {
        name.removeprefix(_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(_PREFIX)
    }
    if "embeddings.cls_token" not in named:
        raise EpalmError(f"encoder.weights: {path} holds no DINOv2 backbone")
    named |= _linear_weights(graph, tensors)
    state = {timm: named[hf] for hf, timm in _OUTER.items()}
    state["pos_embed"] = torch.cat(_positions(tensors, state["cls_token"].shape[-1]), dim=1)
    depth = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layer."))
    for index in range(depth):
        state |= _block(named, f"encoder.layer.{index}.", f"blocks.{index}.")
    return state


def _block(named: dict[str, torch.Tensor], hf: str, timm: str) -> dict[str, torch.Tensor]:
    block = {}
    for kind in ("weight", "bias"):
        qkv = [
            named[f"{hf}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")
        ]
        block[f"{timm}attn.qkv.{kind}"] = torch.cat(qkv)
        for ours, theirs in _INNER.items():
            block[f"{timm}{theirs}.{kind}"] = named[f"{hf}{ours}.{kind}"]
    for number in (1, 2):
        block[f"{timm}ls{number}.gamma"] = named[f"{hf}layer_scale{number}.lambda1"]
    return block


def _linear_weights(
    graph: onnx.GraphProto, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    weight_of_output = {
        node.output[0]: tensors[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    weights = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [i for i in node.input if i.startswith(_PREFIX) and i.endswith(".bias")]
        products = [weight_of_output[i] for i in node.input if i in weight_of_output]
        if biases and products:
            name = biases[0].removeprefix(_PREFIX).removesuffix(".bias") + ".weight"
            weights[name] = products[0].T.contiguous()
    return weights


def _positions(tensors: dict[str, torch.Tensor], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = [
        value
        for name, value in tensors.items()
        if name.startswith("onnx::") and value.ndim == 3 and value.shape[::2] == (1, dim)
    ]
    cls_position, grid = sorted(found, key=lambda value: value.shape[1])
    return cls_position, grid
