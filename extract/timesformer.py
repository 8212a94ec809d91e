"""TimeSformer, the paper's video encoder, as Hugging Face's TimesformerModel.

Its weights are a Hugging Face folder (hf:facebook/timesformer-base-finetuned-k600) or the authors'
own .pyth file. Tokens of a layer: class token, then the patches, place by place and within a place
frame by frame; the final norm on every layer's (convention 11).

`encoder.frames` and `encoder.image_size` may differ from the model's; its tables are resampled.
`encoder.arch` is a JSON object of TimesformerConfig's fields that replace what the weights say, as
'{"num_attention_heads": 4}' for an original file whose heads are not 64 wide. Where the weights are
not at hand, it says what differs from TimeSformer-B, and {} says that nothing does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TimesformerConfig, TimesformerModel

from epalm.address import digest, resolve
from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.encoder import Encoder, weights_file
from epalm.extract.hf_folder import WEIGHTS, check_config
from epalm.extract.timesformer_weights import (
    State,
    original_config,
    read_hugging_face,
    read_original,
    resampled,
)
from epalm.extract.video import VideoPreprocess, video_numbers
from epalm.store.spec import FeatureSpec

DEFAULT = "hf:facebook/timesformer-base-finetuned-k600"
"""Has the architecture of TimesformerConfig's defaults, and the transform `video.TIMESFORMER`."""

_ARGUMENTS = (
    "attention_type",
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_frames",
    "num_hidden_layers",
    "patch_size",
    "qkv_bias",
)
_ATTENTION = ("divided_space_time", "joint_space_time", "space_only")


class Timesformer(Encoder):
    """Layers of (B, 1 + patches * frames, D) from (B, frames, 3, S, S)."""

    prefix = 1

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        # layer by layer: the model's own list would hold all of them, before the norm and after
        state, kept = self.model.embeddings(batch), []
        for number, layer in enumerate(self.model.encoder.layer[: layers[-1] + 1]):
            state = layer(state)[0]
            if number in layers:
                kept.append(self.model.layernorm(state) if self.final_norm else state)
        return kept


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    config, own = timesformer_config(recipe, weights_at_hand)
    _check_video(recipe, config)
    numbers = video_numbers(recipe, config.num_frames, config.image_size, own)
    tokens = 1 + _grid(config) ** 2 * config.num_frames
    return timesformer_spec(recipe, config, "video", numbers, tokens, weights_at_hand)


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    config, own = timesformer_config(recipe)
    _check_video(recipe, config)
    numbers = video_numbers(recipe, config.num_frames, config.image_size, own)
    model = timesformer_model(recipe, config)
    return Timesformer(model, VideoPreprocess(numbers, recipe), recipe, device)


def timesformer_config(
    recipe: Recipe, weights_at_hand: bool = True
) -> tuple[TimesformerConfig, dict[str, Any] | None]:
    """The architecture that a recipe asks for, and the model's own transform of the pixels.

    The transform has the keys of `video.TIMESFORMER`; None: the weights do not say it.

    Raises:
        EpalmError: no TimeSformer, or sizes that it cannot have.
    """
    encoder = recipe.encoder
    changes = _arch(encoder.arch)
    fields: dict[str, Any] = {}
    own = None
    try:
        if weights_at_hand or not (encoder.weights == DEFAULT or encoder.arch):
            fields, own = _said_by(resolve(encoder.weights), changes.get("num_attention_heads"))
        fields = {**fields, **changes, "drop_path_rate": 0}
        if encoder.frames is not None:
            fields["num_frames"] = encoder.frames
        if encoder.image_size is not None:
            fields["image_size"] = encoder.image_size
        config = TimesformerConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise EpalmError(f"encoder.weights: {encoder.weights}: no TimeSformer ({error})") from None
    _check_sizes(config)
    return config, own


def timesformer_model(recipe: Recipe, config: TimesformerConfig) -> TimesformerModel:
    """The model of this configuration with the recipe's weights, its tables resampled to fit.

    Weights of parts that the configuration leaves out (temporal attention) are left out.

    Raises:
        EpalmError: the weights cannot be had, or do not fit.
    """
    found = resolve(recipe.encoder.weights)
    file = weights_file(found, WEIGHTS)
    state: State = read_original(file) if found.is_file() else read_hugging_face(file)
    model = TimesformerModel(config)
    if config.attention_type == "space_only":
        state = {name: value for name, value in state.items() if "temporal" not in name}
        state.pop("embeddings.time_embeddings", None)
    try:
        model.load_state_dict(resampled(state, config.num_frames, _grid(config)))
    except (RuntimeError, KeyError, ValueError) as error:
        raise EpalmError(f"encoder.weights: {file} does not fit: {error}") from None
    return model


def timesformer_spec(
    recipe: Recipe,
    config: TimesformerConfig,
    modality: str,
    numbers: dict[str, Any],
    tokens: int,
    weights_at_hand: bool,
) -> FeatureSpec:
    """The spec of what a TimeSformer makes of this input; `tokens` of a layer."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TimesformerModel(config).parameters())
    file = weights_file(resolve(recipe.encoder.weights), WEIGHTS) if weights_at_hand else None
    return FeatureSpec(
        modality=modality,
        encoder=f"{recipe.encoder.kind}/{config.hidden_size}x{config.num_hidden_layers}",
        encoder_arguments={name: getattr(config, name) for name in _ARGUMENTS},
        encoder_parameters=parameters,
        weights=digest(file) if file else "",
        layers=config.num_hidden_layers,
        tokens=tokens,
        dim=config.hidden_size,
        final_norm=recipe.encoder.final_norm,
        compute=recipe.encoder.dtype,
        preprocess=numbers,
        dtype=recipe.store.dtype,
    )


def _arch(text: str | None) -> dict[str, Any]:
    """The fields in `encoder.arch`."""
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    known = TimesformerConfig().to_dict()
    unknown = [name for name in fields if name not in known] if isinstance(fields, dict) else []
    if not isinstance(fields, dict) or unknown:
        raise EpalmError(
            f"encoder.arch: {text!r} is not a JSON object of TimesformerConfig's fields, as in "
            "'{\"num_attention_heads\": 12}'; leave it out where the weights say it"
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    return fields


def _said_by(found: Path, heads: int | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """TimesformerConfig's fields and the transform that a file or folder says."""
    if found.is_file():
        return original_config(read_original(found, "meta"), heads).to_dict(), None
    file = found / "config.json"
    fields = _json(file)
    if fields.get("model_type") != "timesformer":
        raise EpalmError(f"{file}: model_type is {fields.get('model_type')!r}, not 'timesformer'")
    processor = found / "preprocessor_config.json"
    return fields, _own_transform(processor) if processor.is_file() else None


def _own_transform(file: Path) -> dict[str, Any]:
    """What Hugging Face's processor of this model does, with the keys of `video.TIMESFORMER`."""
    fields = _json(file)
    try:
        size, crop = fields["size"], fields["crop_size"]["height"]
        squash = "shortest_edge" not in size
        return {
            "resize": "squash" if squash else "short side",
            "resize_share": (size["height"] if squash else size["shortest_edge"]) / crop,
            "interpolation": {2: "bilinear", 3: "bicubic"}[fields.get("resample", 2)],
            "mean": list(fields["image_mean"]),
            "std": list(fields["image_std"]),
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise EpalmError(
            f"{file}: not the image processor of a TimeSformer ({error!r}); mend it, or delete it "
            "to use TimeSformer's own numbers"
        ) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EpalmError(f"encoder.weights: {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise EpalmError(f"encoder.weights: {file} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise EpalmError(f"encoder.weights: {file} holds no JSON object")
    return fields


def _grid(config: TimesformerConfig) -> int:
    """Patches along one side."""
    return config.image_size // config.patch_size


def _check_sizes(config: TimesformerConfig) -> None:
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int):
        raise EpalmError(
            f"encoder.weights: image_size {size} and patch_size {patch} must be squares"
        )
    check_config(config)
    if config.attention_type not in _ATTENTION:
        raise EpalmError(
            f"encoder.arch: attention_type is {config.attention_type!r}, not one of "
            f"{', '.join(_ATTENTION)}"
        )
    if size % patch:
        raise EpalmError(f"encoder.image_size: {size} is no multiple of the patch size, {patch}")
    if config.num_channels != 3:
        raise EpalmError(f"encoder.weights: {config.num_channels} channels; only RGB is supported")
    if config.hidden_size % config.num_attention_heads:
        raise EpalmError(
            f"encoder.arch: {config.num_attention_heads} attention heads do not divide the width, "
            f"{config.hidden_size}; set num_attention_heads"
        )


def _check_video(recipe: Recipe, config: TimesformerConfig) -> None:
    if config.attention_type == "space_only":
        raise EpalmError(
            f"encoder.kind: {recipe.encoder.weights} attends to space only and sees single images; "
            "use timesformer-image"
        )
