"""Views: what augments media, and the seeds that make a view depend on nothing but itself."""

import hashlib
from typing import Any

import torch
from torchvision.transforms import v2

from epalm.config import Recipe
from epalm.errors import EpalmError

_SPATIAL = ("crop_scale", "flip", "randaugment_ops", "randaugment_magnitude")
_FIELDS = {
    "image": _SPATIAL,
    "video": _SPATIAL,
    "audio": ("frequency_mask", "time_mask"),
}


def augmentation(recipe: Recipe, modality: str) -> dict[str, Any]:
    """Everything that decides views 1..K of a modality, for the column's spec."""
    views = recipe.encoder.views.model_dump(mode="json")
    return {"seed": views["seed"], **{name: views[name] for name in _FIELDS[modality]}}


def check_views(recipe: Recipe, modality: str) -> None:
    """EpalmError for a number of another modality's views: it would change nothing."""
    for name in recipe.encoder.views.changed():
        if name not in ("count", "seed", *_FIELDS[modality]):
            raise EpalmError(f"encoder.views.{name}: has no meaning for {modality}; leave it out")


def view_seed(seed: int, content_hash: str, view: int) -> int | None:
    """What `Preprocess` is given for a view: None for view 0, else a 63-bit seed."""
    if view == 0:
        return None
    text = f"{seed} {content_hash} {view}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class SpatialAugmentation:
    """RandomResizedCrop, flip and RandAugment, alike for all frames of a video.

    torchvision's RandAugment stands for the official code's ten-operation variant of it, which
    does each operation half of the time, with a magnitude that is of 10, not of 30
    (conventions 20, 21).
    """

    def __init__(self, recipe: Recipe, size: int):
        views = recipe.encoder.views
        if views.crop_scale[0] > views.crop_scale[1]:
            raise EpalmError("encoder.views.crop_scale: the first number must be the smaller one")
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=views.crop_scale, interpolation=v2.InterpolationMode.BICUBIC
                ),
                v2.RandomHorizontalFlip(views.flip),
                v2.RandAugment(views.randaugment_ops, views.randaugment_magnitude),
            ]
        )

    def __call__(self, frames: torch.Tensor, seed: int) -> torch.Tensor:
        """(..., 3, height, width) uint8 to (..., 3, size, size) uint8."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(frames)
