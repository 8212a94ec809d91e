"""Video through an image encoder: each layer's tokens, averaged over the frames (Table 13).

The baseline that knows nothing of time. Any timm encoder will do. View 0 of a frame is the image
encoder's own transform, number for number; the final norm comes before the average.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torchvision.transforms.v2 import functional

from epalm.config import Recipe
from epalm.extract import image
from epalm.extract.encoder import Encoder
from epalm.extract.frames import read_frames
from epalm.extract.pixels import ImagePreprocess
from epalm.extract.video import clip_numbers
from epalm.store.spec import FeatureSpec

FRAMES = 8
"""The official code's, for encoders that have no number of their own (convention 21)."""


class FrameAverage(Encoder):
    """Layers of (B, prefix + N, D) from (B, frames, 3, S, S).

    Args:
        inner: the encoder of the frames.
        frames: taken of a video.
    """

    def __init__(self, inner: Encoder, frames: int, recipe: Recipe, device: torch.device):
        assert isinstance(inner.preprocess, ImagePreprocess)
        preprocess = FramesPreprocess(inner.preprocess, frames)
        super().__init__(inner.model, preprocess, recipe, device)
        self.inner = inner
        self.prefix = inner.prefix

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        clips = batch.shape[:2]
        states = self.inner.hidden_states(batch.flatten(0, 1), layers)
        return [state.unflatten(0, clips).mean(dim=1) for state in states]


class FramesPreprocess:
    """See `Preprocess`. The input is (frames, 3, S, S).

    Args:
        image: what is done to a frame; an augmented view has one crop, flip and RandAugment for
            all frames.
        frames: taken of a video, see `frame_indices`.
    """

    def __init__(self, image: ImagePreprocess, frames: int):
        self.image = image
        self.shape: tuple[int, ...] = (frames, *image.shape)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        frames = read_frames(content, self.shape[0], seed)
        if seed is None:
            return torch.stack([self.image.transform(functional.to_pil_image(f)) for f in frames])
        pixels = self.image.augmentation(frames, seed)
        return functional.normalize(pixels.float() / 255, self.image.mean, self.image.std)


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    spec = image.describe(recipe, weights_at_hand)
    numbers = {key: value for key, value in spec.preprocess.items() if key != "exif"}
    return replace(
        spec,
        modality="video",
        encoder=f"frame-average/{spec.encoder}",
        preprocess={**numbers, **clip_numbers(_frames(recipe))},
    )


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    return FrameAverage(image.build(recipe, device), _frames(recipe), recipe, device)


def _frames(recipe: Recipe) -> int:
    return recipe.encoder.frames or FRAMES
