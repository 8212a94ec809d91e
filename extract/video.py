"""Video files to an encoder's input: chosen frames, resized, cropped, normalised.

`preprocess: model` resizes the short side and crops the centre, as TimeSformer's own test transform
does (one centre crop; its three crops per clip are not made). `preprocess: reference` squashes the
frames to a square with bicubic resize and normalises by CLIP's numbers (convention 21, bug 23).
Frames are always resized with antialias, as torchvision does by default since 0.17 and did not when
the official code was written (bug 24).
"""

from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torchvision.transforms.v2 import InterpolationMode, functional

from epalm.config import Recipe
from epalm.extract.frames import DECODER, FRAME_RULE, read_frames
from epalm.extract.pixels import check_length
from epalm.extract.views import SpatialAugmentation

TIMESFORMER: dict[str, Any] = {
    "resize": "short side",
    "resize_share": 1.0,
    "interpolation": "bilinear",
    "mean": [0.45, 0.45, 0.45],
    "std": [0.225, 0.225, 0.225],
}
"""TimeSformer's own transform; `resize_share` is the short side's length over the crop's."""

REFERENCE: dict[str, Any] = {
    "resize": "squash",
    "resize_share": 1.0,
    "interpolation": "bicubic",
    "mean": list(OPENAI_CLIP_MEAN),
    "std": list(OPENAI_CLIP_STD),
}
"""What the official code does to frames, whatever the encoder (convention 21)."""


def pixel_numbers(recipe: Recipe, size: int, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every number of what `PixelTransform` does to frames.

    Args:
        recipe: says whose transform is taken, `encoder.preprocess`.
        size: S, pixels of the encoder's square input.
        own: the model's transform, with the keys of TIMESFORMER; default: that.
    """
    chosen = REFERENCE if recipe.encoder.preprocess == "reference" else own or TIMESFORMER
    numbers = {key: value for key, value in chosen.items() if key != "resize_share"}
    resized = round(size * chosen["resize_share"])
    return {**numbers, "size": size, "resize_to": resized, "antialias": True, "colour": "RGB"}


def clip_numbers(frames: int) -> dict[str, Any]:
    """Every number of how frames are taken from a video file."""
    return {
        "frames": frames,
        "frame_rule": FRAME_RULE,
        "decoder": DECODER,
        "rotation": "applied",
    }


def video_numbers(
    recipe: Recipe, frames: int, size: int, own: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Every number of view 0 of a video, for `FeatureSpec.preprocess`; see `pixel_numbers`."""
    return {**clip_numbers(frames), **pixel_numbers(recipe, size, own)}


class PixelTransform:
    """Frames of any size to normalised squares; all frames of a clip are treated alike.

    Args:
        numbers: of `pixel_numbers`; other keys are not looked at.
    """

    def __init__(self, numbers: dict[str, Any], recipe: Recipe):
        self.size, self.resize_to = numbers["size"], numbers["resize_to"]
        self.squash = numbers["resize"] == "squash"
        self.interpolation = InterpolationMode(numbers["interpolation"])
        self.antialias = numbers["antialias"]
        self.mean, self.std = numbers["mean"], numbers["std"]
        self.augmentation = SpatialAugmentation(recipe, self.size)

    def __call__(self, frames: torch.Tensor, seed: int | None) -> torch.Tensor:
        """uint8 (..., 3, height, width) to float32 (..., 3, S, S); `seed` as in `Preprocess`."""
        pixels = self._resized(frames) if seed is None else self.augmentation(frames, seed)
        return functional.normalize(pixels.float() / 255, self.mean, self.std)

    def _resized(self, frames: torch.Tensor) -> torch.Tensor:
        target = [self.resize_to, self.resize_to] if self.squash else [self.resize_to]
        if not self.squash:
            check_length((frames.shape[-1], frames.shape[-2]), self.resize_to)
        # in float32: torchvision's uint8 kernel rounds and clips between the two axes, too
        resized = functional.resize(
            frames.float(), target, self.interpolation, None, self.antialias
        )
        return functional.center_crop(resized.round().clamp(0, 255), [self.size, self.size])


class VideoPreprocess:
    """See `Preprocess`. The input is (frames, 3, S, S).

    View 0 takes the middle frames, an augmented view random ones (`frame_indices`), and one random
    crop, flip and RandAugment for all of them.

    Args:
        numbers: of `video_numbers`.
    """

    def __init__(self, numbers: dict[str, Any], recipe: Recipe):
        self.shape: tuple[int, ...] = (numbers["frames"], 3, numbers["size"], numbers["size"])
        self.transform = PixelTransform(numbers, recipe)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        return self.transform(read_frames(content, self.shape[0], seed), seed)
