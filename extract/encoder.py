"""What an encoder must do, and the table of those there are."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.store.spec import FeatureSpec


class Encoder(Protocol):
    """A frozen encoder with its preprocessing. A new one is one file and one row of ENCODERS."""

    def preprocess(self, content: bytes) -> torch.Tensor:
        """One media file's bytes to the encoder's input, (3, height, width) for images.

        Any exception means that the media cannot be used; it goes into the failure ledger.
        """
        ...

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Tokens of every layer, float32 on the CPU: (B, L, tokens, D)."""
        ...


ENCODERS = {"timm": "epalm.extract.image"}


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """The spec of the features that a recipe needs, without building the encoder.

    With `weights_at_hand` false the weights file is not looked for, and the spec's `weights` is
    empty; the address or `encoder.arch` must then say the architecture.

    Raises:
        EpalmError: unknown encoder or architecture.
        NotHereError: the weights cannot be had.
    """
    return _module(recipe).describe(recipe, weights_at_hand)


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """The encoder with its weights; EpalmError when they cannot be had."""
    return _module(recipe).build(recipe, device)


def weights_file(found: Path) -> Path:
    """The file with the weights, when `found` is it or the folder that holds it."""
    if found.is_file():
        return found
    file = found / "model.safetensors"
    if not file.is_file():
        raise EpalmError(f"encoder.weights: {found} holds no model.safetensors")
    return file


def _module(recipe: Recipe) -> ModuleType:
    kind = recipe.encoder.kind
    if kind not in ENCODERS:
        raise EpalmError(f"encoder.kind: {kind!r} is not one of {', '.join(ENCODERS)}")
    return importlib.import_module(ENCODERS[kind])
