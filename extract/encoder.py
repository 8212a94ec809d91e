"""What an encoder must do, and the table of those there are."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.views import check_views
from epalm.store.spec import FeatureSpec

ENCODERS = {
    "timm": "epalm.extract.image",
    "timesformer": "epalm.extract.timesformer",
    "timesformer-image": "epalm.extract.timesformer_image",
    "frame-average": "epalm.extract.frame_average",
    "ast": "epalm.extract.ast",
    "whisper": "epalm.extract.whisper",
}


class Preprocess(Protocol):
    """One media file to the encoder's input.

    It runs in worker processes: it must be picklable, and know nothing of the model.
    """

    shape: tuple[int, ...]
    """Of one input: (3, S, S) for images, (frames, 3, S, S) for video, (frames, mels) for audio."""

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        """The input, float32 of `shape`.

        Args:
            content: the file's bytes.
            seed: None for view 0; else decides the augmented view, and nothing else does.

        Any exception means that the media cannot be used; it goes into the failure ledger.
        """
        ...


class Encoder(ABC):
    """An encoder, in evaluation mode. A new one is one file and one row of ENCODERS.

    Its weights are frozen, unless the recipe trains them.

    Attributes:
        prefix: class tokens (and distillation tokens) that stand before the patch tokens; 0: none.
    """

    prefix: int

    def __init__(self, model: Any, preprocess: Preprocess, recipe: Recipe, device: torch.device):
        self.model = model.eval().requires_grad_(recipe.encoder.train).to(device)
        self.preprocess = preprocess
        self.final_norm = recipe.encoder.final_norm
        self.tokens = recipe.encoder.tokens
        self.dtype: torch.dtype = getattr(torch, recipe.encoder.dtype)
        self.device = device

    @abstractmethod
    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        """Tokens of these layers, from 0: each (B, prefix + N, D).

        With `final_norm`, the encoder's final norm is applied to each of them (convention 11).

        Args:
            batch: (B, *preprocess.shape) on the encoder's device.
            layers: ascending layer numbers.
        """

    @torch.inference_mode()
    def encode(self, batch: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """The tokens that are kept, float32 on the CPU: (B, len(layers), tokens, D).

        Raises:
            EpalmError: the device's memory is too small for such a batch.
        """
        try:
            return self.features(batch, layers).cpu()
        except torch.OutOfMemoryError:
            raise EpalmError(
                f"encoder.batch_size: the memory of {self.device} is too small for {len(batch)} "
                "media at once; set a smaller one"
            ) from None

    def features(self, batch: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """As `encode`, on the encoder's device, with gradients where its weights are trained."""
        batch = batch.to(self.device)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            states = self.hidden_states(batch, layers)
        return torch.stack([self._kept(state) for state in states], dim=1).float()

    def _kept(self, state: torch.Tensor) -> torch.Tensor:
        if self.tokens == "cls":
            return state[:, :1]
        if self.tokens == "mean":
            return state[:, self.prefix :].mean(dim=1, keepdim=True)
        return state


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """The spec of the features that a recipe needs, without building the encoder.

    With `weights_at_hand` false the weights file is not looked for, and the spec's `weights` is
    empty; the address or `encoder.arch` must then say the architecture.

    Raises:
        EpalmError: unknown encoder or architecture, or tokens, layers and settings that it does not
            have.
        NotHereError: the weights cannot be had.
    """
    spec: FeatureSpec = _module(recipe).describe(recipe, weights_at_hand)
    for name, modalities in (("frames", ("video",)), ("image_size", ("image", "video"))):
        if getattr(recipe.encoder, name) is not None and spec.modality not in modalities:
            raise EpalmError(
                f"encoder.{name}: has no meaning for {spec.modality}, which the kind "
                f"{recipe.encoder.kind} encodes; leave it out"
            )
    check_views(recipe, spec.modality)
    return spec


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """The encoder with its weights; EpalmError when they cannot be had."""
    return _module(recipe).build(recipe, device)


def check_has_class_token(recipe: Recipe, prefix: int, name: str) -> None:
    """EpalmError when a recipe wants the class token of an encoder that has none."""
    if recipe.encoder.tokens == "cls" and prefix == 0:
        raise EpalmError(
            f"encoder.tokens: {name} has no class token; set it to mean, or choose another encoder"
        )


def weights_file(found: Path, patterns: Sequence[str] = ("model.safetensors",)) -> Path:
    """The file with the weights, when `found` is it or the folder that holds it.

    Args:
        patterns: of names in the folder; the first that fits one file alone counts.

    Raises:
        EpalmError: none of them does.
    """
    if found.is_file():
        return found
    for pattern in patterns:
        files = list(found.glob(pattern))
        if len(files) == 1:
            return files[0]
    names = ("neither " if len(patterns) > 1 else "no ") + " nor ".join(patterns)
    raise EpalmError(f"encoder.weights: {found} holds {names}; add it, or give the file itself")


def _module(recipe: Recipe) -> ModuleType:
    kind = recipe.encoder.kind
    if kind not in ENCODERS:
        raise EpalmError(f"encoder.kind: {kind!r} is not one of {', '.join(ENCODERS)}")
    return importlib.import_module(ENCODERS[kind])
