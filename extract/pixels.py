"""Image files to pixels, and pixels to the encoder's input."""

import io
import warnings
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import ExifTags, Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torchvision.transforms.v2 import functional

from epalm.config import Recipe
from epalm.extract.views import SpatialAugmentation

REFERENCE = {
    "interpolation": "bicubic",
    "mean": list(OPENAI_CLIP_MEAN),
    "std": list(OPENAI_CLIP_STD),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
"""What the official code does to images, whatever the encoder (convention 20, bug 23)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; Pillow's own function would rewrite all the
other tags, too, and fail at broken ones."""
_MOST_PIXELS = 178_956_970  # from which on Pillow refuses to open an image


class ImagePreprocess:
    """See `Preprocess`. View 0 is timm's evaluation transform; the input is (3, S, S).

    Args:
        numbers: what timm's `create_transform` takes: input_size, interpolation, mean, std,
            crop_pct, crop_mode; `exif` says whether the file's orientation is applied.
    """

    def __init__(self, numbers: dict[str, Any], recipe: Recipe):
        known = {key: value for key, value in numbers.items() if key not in ("exif", "colour")}
        self.shape = tuple(numbers["input_size"])
        self.upright = numbers["exif"] == "transposed"
        self.mean, self.std = numbers["mean"], numbers["std"]
        self.transform = timm.data.create_transform(**known)
        # what the short side becomes, where the other one follows it
        follows = numbers["crop_mode"] == "center"
        self.enlarged = int(self.shape[-1] / numbers["crop_pct"]) if follows else None
        self.augmentation = SpatialAugmentation(recipe, self.shape[-1])

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        image = read_image(content, self.upright)
        if seed is None:
            if self.enlarged is not None:
                check_length(image.size, self.enlarged)
            return self.transform(image)
        pixels = self.augmentation(functional.pil_to_tensor(image), seed)
        return functional.normalize(pixels.float() / 255, self.mean, self.std)


def check_length(size: tuple[int, int], enlarged: int) -> None:
    """ValueError for an image whose long side would take all memory once the short one is resized.

    Nothing of that side is seen but the middle, so the limit is the one for images as they are.
    """
    pixels = enlarged * enlarged * max(size) // min(size)
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"{size[0]} x {size[1]} is too long and narrow: resized, it would have {pixels} pixels"
        )


def read_image(content: bytes, upright: bool = True) -> Image.Image:
    """An RGB image from a file's bytes: its first frame, transparency dropped.

    Images of 16 bits a channel keep their upper eight. A float image has no defined white, and
    is refused.

    Raises:
        Exception: whatever Pillow makes of a broken file.
    """
    with warnings.catch_warnings():
        # Pillow warns from 90 million pixels on and refuses from 180 million on
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(content))
    with opened as image:
        turned = _made_upright(image) if upright else image
        if turned.mode.startswith("I"):
            sixteen = np.asarray(turned).astype(np.int64)
            turned = Image.fromarray((sixteen >> 8).clip(0, 255).astype(np.uint8))
        elif turned.mode == "F":
            raise ValueError("a floating point image has no defined range of brightness")
        elif turned.mode == "P" and "transparency" in turned.info:
            turned = turned.convert("RGBA")
        return turned.convert("RGB")


def _made_upright(image: Image.Image) -> Image.Image:
    image.load()  # finds a tag that stands behind the pixels; turns a TIFF, and drops its tag
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)
