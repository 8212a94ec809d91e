"""Whisper's encoder, out of a Hugging Face folder of a whole Whisper (hf:openai/whisper-base).

It has no class token: keep the mean over its tokens, or all of them. It always hears 30 s; the
silence that fills up a short sound counts in the mean. The paper has no such encoder.
docs/adding-an-encoder.md walks through this file.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from epalm.address import digest, resolve
from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.audio import SpectrogramMasking, read_audio
from epalm.extract.encoder import Encoder, check_has_class_token, weights_file
from epalm.extract.hf_folder import WEIGHTS, hf_config, hf_extractor, hf_model
from epalm.store.spec import FeatureSpec

_SHAPE = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
          "activation_function", "num_mel_bins", "max_source_positions")  # fmt: skip
_SOUND = ("sampling_rate", "n_fft", "hop_length", "chunk_length", "feature_size", "padding_value")


class WhisperPreprocess:
    """The input is (frames, mels) of log-mel; views mask it with zeros, as HF's Whisper does."""

    def __init__(self, extractor: WhisperFeatureExtractor, recipe: Recipe):
        self.extractor = extractor
        self.shape: tuple[int, ...] = (extractor.nb_max_frames, extractor.feature_size)
        self.masking = SpectrogramMasking(recipe, *self.shape)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        rate, seconds = self.extractor.sampling_rate, self.extractor.chunk_length + 0.1
        mono = read_audio(content, rate, seconds)[0].mean(0)
        found = self.extractor(mono.numpy(), sampling_rate=rate, return_tensors="pt")
        spectrogram = found["input_features"][0].T
        return spectrogram if seed is None else self.masking(spectrogram, seed)


class Whisper(Encoder):
    """Layers of (B, frames / 2, D) from (B, frames, mels)."""

    prefix = 0

    def hidden_states(self, batch: torch.Tensor, layers: Sequence[int]) -> Sequence[torch.Tensor]:
        found: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for n in layers:
                hook = self.model.layers[n].register_forward_hook(lambda _, __, x: found.append(x))
                hooks.enter_context(hook)
            self.model(batch.transpose(1, 2))
        return [self.model.layer_norm(f) for f in found] if self.final_norm else found


def describe(recipe: Recipe, weights_at_hand: bool = True) -> FeatureSpec:
    """See `extract.encoder.describe`; the folder's two JSON files must be there in any case."""
    config, extractor = _configured(recipe)
    folder = resolve(recipe.encoder.weights)
    with torch.device("meta"):
        model = WhisperEncoder(config)
    return FeatureSpec(
        modality="audio",
        encoder=f"whisper/{config.d_model}x{config.encoder_layers}",
        encoder_arguments={name: getattr(config, name) for name in _SHAPE},
        encoder_parameters=sum(p.numel() for p in model.parameters()),
        weights=digest(weights_file(folder, WEIGHTS)) if weights_at_hand else "",
        layers=config.encoder_layers,
        tokens=config.max_source_positions,
        dim=config.d_model,
        final_norm=recipe.encoder.final_norm,
        compute=recipe.encoder.dtype,
        preprocess={"channels": "mean", **{name: getattr(extractor, name) for name in _SOUND}},
        dtype=recipe.store.dtype,
    )


def build(recipe: Recipe, device: torch.device) -> Encoder:
    """See `extract.encoder.build`."""
    config, extractor = _configured(recipe)
    model = hf_model(WhisperModel, resolve(recipe.encoder.weights), config, part="encoder.")
    return Whisper(model.encoder, WhisperPreprocess(extractor, recipe), recipe, device)


def _configured(recipe: Recipe) -> tuple[Any, WhisperFeatureExtractor]:
    check_has_class_token(recipe, Whisper.prefix, "Whisper")
    if recipe.encoder.preprocess == "reference":
        raise EpalmError("encoder.preprocess: the official code has no Whisper; set it to model")
    folder = resolve(recipe.encoder.weights)
    config = hf_config(WhisperConfig, folder)
    # dither is noise: with it, no second run would make the same features
    extractor = hf_extractor(WhisperFeatureExtractor, folder, dither=0.0)
    made = (extractor.nb_max_frames, extractor.feature_size)
    if made != (2 * config.max_source_positions, config.num_mel_bins):
        raise EpalmError(f"encoder.weights: {folder}: config.json takes no {made} frames and mels")
    return config, extractor
