"""The Audio Spectrogram Transformer (AST), as Hugging Face's ASTModel.

Its weights are a Hugging Face folder (hf:MIT/ast-finetuned-audioset-10-10-0.4593) or the authors'
own .pth. Tokens of a layer: class token, distillation token, patches, frequency by frequency; the
final norm on every layer's (convention 11). `tokens: cls` keeps the class token alone, as the
official code does; `mean` leaves out both special tokens.

`encoder.arch` is a JSON object of ASTConfig's fields that replace what the weights say, as
'{"max_length": 128}' for an original file that is not AudioSet's. Where the weights are not at
hand, it says what differs from the paper's AST, and {} says that nothing does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

from epalm.address import digest, resolve
from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.ast_weights import (
    ORIGINAL_EPS,
    ast_config,
    original_config,
    read_original,
    to_hf,
)
from epalm.extract.audio import FbankPreprocess, audio_numbers
from epalm.extract.encoder import Encoder, weights_file
from epalm.extract.hf_folder import WEIGHTS, hf_config, hf_extractor, hf_model
from epalm.store.spec import FeatureSpec

DEFAULT = "hf:MIT/ast-finetuned-audioset-10-10-0.4593"
"""Has the architecture of ASTConfig's defaults, and AudioSet's numbers."""

_ARGUMENTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "patch_size",
    "frequency_stride",
    "time_stride",
    "max_length",
    "num_mel_bins",
)


class AST(Encoder):
    """Layers of (B, 2 + patches, D) from (B, frames, mels)."""

    prefix = 2

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        state, kept = self.model.embeddings(batch), []
        for number, layer in enumerate(self.model.layers[: layers[-1] + 1]):
            state = layer(state)
            if number in layers:
                kept.append(self.model.layernorm(state) if self.final_norm else state)
        return kept


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`."""
    config, numbers = _configured(recipe, weights_at_hand)
    with torch.device("meta"):
        model = ASTModel(config)
    return FeatureSpec(
        modality="audio",
        encoder=f"ast/{config.hidden_size}x{config.num_hidden_layers}",
        encoder_arguments={name: getattr(config, name) for name in _ARGUMENTS},
        encoder_parameters=sum(p.numel() for p in model.parameters()),
        weights=digest(_weights(recipe)) if weights_at_hand else "",
        layers=config.num_hidden_layers,
        tokens=model.embeddings.position_embeddings.shape[1],
        dim=config.hidden_size,
        final_norm=recipe.encoder.final_norm,
        compute=recipe.encoder.dtype,
        preprocess=numbers,
        dtype=recipe.store.dtype,
    )


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    config, numbers = _configured(recipe)
    file = _weights(recipe)
    if file.name in WEIGHTS:
        model = hf_model(ASTModel, file.parent, config)
    else:
        model = ASTModel(config)
        try:
            model.load_state_dict(to_hf(read_original(file)))
        except RuntimeError as error:
            raise EpalmError(f"encoder.weights: {file} does not fit: {error}") from None
    return AST(model, FbankPreprocess(numbers, recipe), recipe, device)


def _weights(recipe: Recipe) -> Path:
    """Hugging Face's file, or the authors' own."""
    return weights_file(resolve(recipe.encoder.weights), (*WEIGHTS, "*.pth"))


def _configured(recipe: Recipe, weights_at_hand: bool = True) -> tuple[ASTConfig, dict[str, Any]]:
    """The architecture and the numbers of the preprocessing that a recipe leads to."""
    config, extractor = _architecture(recipe, weights_at_hand)
    if extractor is None:
        return config, audio_numbers(recipe, config.max_length, config.num_mel_bins)
    sizes = (extractor.max_length, extractor.num_mel_bins)
    if sizes != (config.max_length, config.num_mel_bins):
        raise EpalmError(
            f"encoder.weights: preprocessor_config.json in {recipe.encoder.weights} makes {sizes} "
            f"frames and mels, config.json wants {(config.max_length, config.num_mel_bins)}"
        )
    # (x - 0) / (2 * 0.5) leaves x as it is
    mean, std = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
    return config, audio_numbers(recipe, *sizes, extractor.sampling_rate, mean, std)


def _architecture(
    recipe: Recipe, weights_at_hand: bool
) -> tuple[ASTConfig, ASTFeatureExtractor | None]:
    """The model's configuration and feature extractor; None: AudioSet's numbers."""
    encoder = recipe.encoder
    changes = _changes(encoder.arch)
    ast_config({}, changes)  # its types are checked before we reckon with its numbers
    if not weights_at_hand and (encoder.weights == DEFAULT or encoder.arch is not None):
        original = Path(encoder.weights).suffix == ".pth"
        return ast_config({"layer_norm_eps": ORIGINAL_EPS} if original else {}, changes), None
    found = resolve(encoder.weights)
    if found.is_file():
        return original_config(read_original(found), found, changes), None
    config = ast_config(hf_config(ASTConfig, found).to_dict(), changes)
    if encoder.preprocess == "reference":
        return config, None
    return config, hf_extractor(ASTFeatureExtractor, found)


def _changes(arch: str | None) -> dict[str, Any]:
    """The fields in `encoder.arch`."""
    try:
        changes = json.loads(arch or "{}")
    except ValueError:
        changes = None
    if not isinstance(changes, dict) or not changes.keys() <= set(_ARGUMENTS):
        raise EpalmError(
            f"encoder.arch: {arch!r} is not a JSON object of ASTConfig's fields, as in "
            f"'{{\"max_length\": 128}}'; there are {', '.join(_ARGUMENTS)}"
        )
    return changes
