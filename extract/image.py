"""Image encoder: any timm ViT with a class token, the [CLS] of every layer (convention 11)."""

import difflib
import io
import json
from typing import Any

import timm
import timm.data
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError

from epalm.address import digest, resolve
from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.encoder import weights_file
from epalm.extract.onnx_weights import read_dinov2
from epalm.store.spec import FeatureSpec


class TimmViT:
    """See `Encoder`. Features are (L, 1, D): one class token a layer."""

    def __init__(
        self, model: Any, preprocess: dict[str, Any], recipe: Recipe, device: torch.device
    ):
        self.model = model.eval().requires_grad_(False).to(device)
        self.final_norm = recipe.encoder.final_norm
        self.dtype = getattr(torch, recipe.encoder.dtype)
        self.device = device
        self.transform = timm.data.create_transform(**preprocess)

    def preprocess(self, content: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return self.transform(upright)

    @torch.inference_mode()
    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self.device)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            layers = self.model.forward_intermediates(
                batch,
                norm=self.final_norm,
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        # each layer: (patches (B, N, D), prefix tokens (B, 1 or more, D)); [CLS] is the first
        return torch.stack([prefix[:, :1] for _, prefix in layers], dim=1).float().cpu()


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    arch, pretrained, model_args = _architecture(recipe)
    with torch.device("meta"):
        model = _create(recipe, arch, **model_args)
    weights = digest(weights_file(resolve(recipe.encoder.weights))) if weights_at_hand else ""
    return FeatureSpec(
        modality="image",
        encoder=f"timm/{arch}",
        encoder_arguments={key: _plain(value) for key, value in model_args.items()},
        encoder_parameters=sum(p.numel() for p in model.parameters()),
        weights=weights,
        layers=len(model.blocks),
        tokens="cls",
        dim=model.embed_dim,
        final_norm=recipe.encoder.final_norm,
        compute=recipe.encoder.dtype,
        preprocess={**_preprocess(recipe, pretrained), "colour": "RGB", "exif": "transposed"},
        view=0,
        dtype=recipe.store.dtype,
    )


def build(recipe: Recipe, device: torch.device) -> TimmViT:
    """See `extract.encoder.build`."""
    arch, pretrained, model_args = _architecture(recipe)
    file = weights_file(resolve(recipe.encoder.weights))
    source = {"state_dict": read_dinov2(file)} if file.suffix == ".onnx" else {"file": str(file)}
    try:
        # timm's own loading resamples the position grid and drops the classifier
        model = _create(
            recipe,
            arch,
            **model_args,
            pretrained=True,
            pretrained_cfg_overlay={**source, "custom_load": False, "hf_hub_id": None, "url": ""},
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise EpalmError(f"encoder.weights: {file} does not fit {arch}: {error}") from None
    return TimmViT(model, _preprocess(recipe, pretrained), recipe, device)


def _architecture(recipe: Recipe) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """timm architecture, pretrained configuration and model arguments an address leads to."""
    encoder = recipe.encoder
    if encoder.weights.startswith("timm:"):
        name = encoder.weights.removeprefix("timm:")
        return name.split(".")[0], _pretrained_cfg(name, encoder.weights), {}
    if encoder.arch is not None:
        return encoder.arch, _pretrained_cfg(encoder.arch, f"encoder.arch: {encoder.arch}"), {}
    config = resolve(encoder.weights) / "config.json"
    if not config.is_file():
        raise EpalmError(
            f"encoder.arch: {encoder.weights} does not say its architecture; set encoder.arch to "
            "timm's name for it"
        )
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        args = {k: v for k, v in fields.get("model_args", {}).items() if k != "num_classes"}
        arch, pretrained = fields["architecture"], fields.get("pretrained_cfg", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EpalmError(f"{config}: not timm's model configuration ({error!r})") from None
    if not timm.is_model(arch):
        raise EpalmError(f"{config}: timm does not know the architecture {arch!r}")
    return arch, pretrained, args


def _pretrained_cfg(name: str, where: str) -> dict[str, Any]:
    try:
        found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        found = None
    if found is None:
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise EpalmError(f"{where}: timm does not know it; near: {', '.join(near) or 'none'}")
    return dict(found.to_dict())


def _create(recipe: Recipe, arch: str, **kwargs: Any) -> Any:
    if recipe.encoder.image_size is not None:
        kwargs["img_size"] = recipe.encoder.image_size
    try:
        model = timm.create_model(arch, num_classes=0, **kwargs)
    except TypeError as error:
        raise EpalmError(f"encoder.arch: {arch} cannot be built as a ViT ({error})") from None
    if getattr(model, "cls_token", None) is None or not hasattr(model, "forward_intermediates"):
        raise EpalmError(f"encoder.arch: {arch} has no class token; choose a ViT that has one")
    return model


def _preprocess(recipe: Recipe, pretrained: dict[str, Any]) -> dict[str, Any]:
    size = recipe.encoder.image_size
    args = {} if size is None else {"input_size": (3, size, size)}
    config = timm.data.resolve_data_config(args, pretrained_cfg=pretrained)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {key: _plain(config[key]) for key in keys}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
