"""TimeSformer on single images: its spatial attention alone, the paper's zero-shot setting.

A model trained on videos sees an image as one frame: no temporal attention, and no time embedding.
These are Hugging Face's `space_only` layers with the divided model's spatial weights; what is left
is a ViT. Weights and numbers are those of `extract.timesformer`, and so is the transform, here of
one image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms.v2 import functional
from transformers import TimesformerConfig

from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.encoder import Encoder
from epalm.extract.pixels import read_image
from epalm.extract.timesformer import (
    Timesformer,
    timesformer_config,
    timesformer_model,
    timesformer_spec,
)
from epalm.extract.video import PixelTransform, pixel_numbers
from epalm.store.spec import FeatureSpec


class TimesformerImage(Timesformer):
    """Layers of (B, 1 + patches, D) from (B, 3, S, S)."""

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        return super().hidden_states(batch[:, None], layers)


class FramePreprocess:
    """See `Preprocess`. An image is treated as a video's only frame; the input is (3, S, S).

    Args:
        numbers: of `image_frame_numbers`.
    """

    def __init__(self, numbers: dict[str, Any], recipe: Recipe):
        self.shape: tuple[int, ...] = (3, numbers["size"], numbers["size"])
        self.upright = numbers["exif"] == "transposed"
        self.transform = PixelTransform(numbers, recipe)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        pixels = functional.pil_to_tensor(read_image(content, self.upright))
        return self.transform(pixels, seed)


def image_frame_numbers(recipe: Recipe, size: int, own: dict[str, Any] | None) -> dict[str, Any]:
    """Every number of view 0 of an image, for `FeatureSpec.preprocess`; see `pixel_numbers`."""
    ignored = recipe.encoder.preprocess == "reference"
    return {
        **pixel_numbers(recipe, size, own),
        "exif": "ignored" if ignored else "transposed",
    }


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    config, own = _space_only(recipe, weights_at_hand)
    numbers = image_frame_numbers(recipe, config.image_size, own)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return timesformer_spec(recipe, config, "image", numbers, tokens, weights_at_hand)


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    config, own = _space_only(recipe)
    model = timesformer_model(recipe, config)
    numbers = image_frame_numbers(recipe, config.image_size, own)
    return TimesformerImage(model, FramePreprocess(numbers, recipe), recipe, device)


def _space_only(
    recipe: Recipe, weights_at_hand: bool = True
) -> tuple[TimesformerConfig, dict[str, Any] | None]:
    if recipe.encoder.frames not in (None, 1):
        raise EpalmError(
            f"encoder.frames: {recipe.encoder.frames}, but timesformer-image sees one; leave it out"
        )
    config, own = timesformer_config(recipe, weights_at_hand)
    config.attention_type, config.num_frames = "space_only", 1
    return config, own
