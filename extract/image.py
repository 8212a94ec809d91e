"""Image encoders: any timm ViT, and timm's staged encoders (Hiera, ConvNeXt, Swin, ResNet).

The tokens of every layer after the final norm (convention 11). A ViT has equal layers. A staged
encoder has feature maps of growing width, no class token and no norm that fits them all: its
positions are the tokens, each padded with zeros to the widest stage, which a linear connection
cannot tell from the narrow one.
"""

import difflib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import timm
import timm.data
import torch
from safetensors import SafetensorError
from timm.layers import to_2tuple

from epalm.address import digest, resolve
from epalm.config import Recipe
from epalm.errors import EpalmError, first_line
from epalm.extract.encoder import Encoder, Preprocess, check_has_class_token, weights_file
from epalm.extract.onnx_weights import read_dinov2
from epalm.extract.pixels import REFERENCE, ImagePreprocess
from epalm.store.spec import FeatureSpec


class TimmViT(Encoder):
    """A timm ViT: layers of (B, prefix + patches, D)."""

    def __init__(self, model: Any, preprocess: Preprocess, recipe: Recipe, device: torch.device):
        super().__init__(model, preprocess, recipe, device)
        self.prefix = model.num_prefix_tokens

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        found = self.model.forward_intermediates(
            batch,
            indices=list(layers),
            norm=self.final_norm,
            stop_early=True,
            return_prefix_tokens=self.prefix > 0,  # without any, some of timm's models would stop
            output_fmt="NLC",
            intermediates_only=True,
        )
        # with prefix tokens, timm gives (patches, prefix) for each layer
        return [torch.cat(f[::-1], dim=1) if isinstance(f, tuple) else f for f in found]


class TimmStages(Encoder):
    """A timm encoder of feature maps: layers of (B, positions, widest D)."""

    prefix = 0

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        maps = self.model.forward_intermediates(
            batch,
            indices=list(layers),
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        width = _widest(self.model)
        tokens = [m.flatten(2).transpose(1, 2) for m in maps]
        return [torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tokens]


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    arch, pretrained, model_args = _architecture(recipe)
    numbers = image_numbers(recipe, pretrained)
    with torch.device("meta"):
        model = create(recipe, arch, **model_args)
        try:
            layers, tokens, dim = _sizes(model.eval(), numbers["input_size"])
        except (RuntimeError, ValueError, AssertionError) as error:
            raise EpalmError(
                f"encoder.image_size: {arch} cannot see {numbers['input_size'][-1]} pixels "
                f"({first_line(error)}); set another, or choose another encoder"
            ) from None
    if recipe.encoder.final_norm:
        _check_final_norm(model, arch)
    weights = digest(weights_file(resolve(recipe.encoder.weights))) if weights_at_hand else ""
    return FeatureSpec(
        modality="image",
        encoder=f"timm/{arch}",
        encoder_arguments={key: _plain(value) for key, value in model_args.items()},
        encoder_parameters=sum(p.numel() for p in model.parameters()),
        weights=weights,
        layers=layers,
        tokens=tokens,
        dim=dim,
        final_norm=recipe.encoder.final_norm,
        compute=recipe.encoder.dtype,
        preprocess=numbers,
        dtype=recipe.store.dtype,
    )


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    model, numbers = load_timm(recipe)
    preprocess = ImagePreprocess(numbers, recipe)
    kind = TimmViT if is_vit(model) else TimmStages
    return kind(model, preprocess, recipe, device)


def load_timm(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The recipe's timm model with its weights, and the numbers of its preprocessing."""
    arch, pretrained, model_args = _architecture(recipe)
    file = weights_file(resolve(recipe.encoder.weights))
    source = {"state_dict": read_dinov2(file)} if file.suffix == ".onnx" else {"file": str(file)}
    try:
        # timm's own loading resamples the position grid and drops the classifier
        model = create(
            recipe,
            arch,
            **model_args,
            pretrained=True,
            pretrained_cfg_overlay={**source, "custom_load": False, "hf_hub_id": None, "url": ""},
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        some = "\n".join(str(error).splitlines()[:4])  # of a line for each tensor
        raise EpalmError(f"encoder.weights: {file} does not fit {arch}: {some}") from None
    return model, image_numbers(recipe, pretrained)


def create(recipe: Recipe, arch: str, **kwargs: Any) -> Any:
    """The timm model of this architecture; EpalmError when it is no encoder we can use."""
    try:
        model = timm.create_model(arch, num_classes=0, **{**kwargs, **_sized(recipe, arch)})
    except TypeError as error:
        raise EpalmError(f"encoder.arch: {arch} cannot be built so ({error})") from None
    if not hasattr(model, "forward_intermediates"):
        raise EpalmError(f"encoder.arch: {arch} does not give its layers; choose another encoder")
    check_has_class_token(recipe, model.num_prefix_tokens if is_vit(model) else 0, arch)
    return model


def image_numbers(recipe: Recipe, pretrained: dict[str, Any]) -> dict[str, Any]:
    """Every number of the preprocessing, resolved from the model's data configuration."""
    size = recipe.encoder.image_size
    args = {} if size is None else {"input_size": (3, size, size)}
    config = timm.data.resolve_data_config(args, pretrained_cfg=pretrained)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    numbers = {key: _plain(config[key]) for key in keys}
    if recipe.encoder.preprocess == "reference":
        return {**numbers, **REFERENCE, "colour": "RGB", "exif": "ignored"}
    return {**numbers, "colour": "RGB", "exif": "transposed"}


def is_vit(model: Any) -> bool:
    """Its layers are token sequences of one width."""
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _check_final_norm(model: Any, arch: str) -> None:
    """EpalmError when no norm of the model is meant for every token of a layer."""
    reason = None
    if not is_vit(model):
        reason = f"{arch} has stages, no norm fits them all"
    elif isinstance(getattr(model, "norm", None), torch.nn.Identity | None):
        reason = f"{arch} has no norm of single tokens; what norm it may have is of their mean"
    if reason is not None:
        raise EpalmError(f"encoder.final_norm: {reason}; set it to false")


def _sized(recipe: Recipe, arch: str) -> dict[str, Any]:
    """The argument for the image size, where the architecture has a fixed one."""
    size = recipe.encoder.image_size
    takes_size = timm.get_pretrained_cfg(arch).fixed_input_size
    return {"img_size": size} if size is not None and takes_size else {}


def _sizes(model: Any, input_size: Sequence[int]) -> tuple[int, int, int]:
    """Layers, tokens per layer (of the last one) and width of a model on the meta device."""
    image = torch.zeros(1, *input_size)
    if is_vit(model):
        found = model.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
        return len(found), model.num_prefix_tokens + found[-1].shape[1], model.embed_dim
    found = model.forward_intermediates(
        image, norm=False, output_fmt="NCHW", intermediates_only=True
    )
    return len(found), found[-1].shape[2:].numel(), _widest(model)


def _widest(model: Any) -> int:
    """Channels of the widest stage; what follows the stages may have fewer or more."""
    return max(stage["num_chs"] for stage in model.feature_info)


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
    if "img_size" in args:  # timm before 1.0.31 saved the architecture's usual size beside it
        channels = pretrained.get("input_size", (3,))[0]
        pretrained = {**pretrained, "input_size": [channels, *to_2tuple(args["img_size"])]}
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
