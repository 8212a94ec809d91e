"""Trained models as folders of their own, apart from run, data and feature store.

FOLDER/
    epalm_config.json          what the model is made of (`AugmentedConfig`)
    epalm_model.safetensors    trained weights, under the names that a run's checkpoints have
    tokenizer.json, …          the LM's tokenizer, special tokens of the text section included

The frozen LM and the encoder are not in it: the config holds their addresses (epalm.address). A
local one that is not absolute is relative to the folder, so that both can be moved together.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from epalm.address import resolve
from epalm.config import (
    MAIN,
    DecodeConfig,
    EncoderConfig,
    LMConfig,
    Recipe,
    Section,
    TextConfig,
    VariantConfig,
)
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.model.load import lm_digest, load_lm, load_lm_config, load_tokenizer
from epalm.model.text import TextCodec
from epalm.model.weights import put_weights, trained_weights

CONFIG = "epalm_config.json"
WEIGHTS = "epalm_model.safetensors"
FORMAT_VERSION = 1

_REMOTE = re.compile(r"(hf|timm|wheel):")


class LMIdentity(Section):
    """Which LM the weights were trained for.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        layers, width: its depth L and the width H of its hidden states.
        digest: of its files (`lm_digest`).
    """

    model_type: str
    layers: int
    width: int
    digest: str

    @classmethod
    def of(cls, config: PreTrainedConfig, digest: str) -> "LMIdentity":
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            digest=digest,
        )


class AugmentedConfig(Section):
    """What a trained model is made of: the sections of its recipe that outlive the training.

    Attributes:
        also: encoders of further sources, by name.
        features: the FeatureSpec of the features it was trained on, as a JSON object; of several
            sources the JointSpec.
        fingerprint: of that spec.
        lm_identity: None until it is saved.
    """

    format_version: int = FORMAT_VERSION
    lm: LMConfig
    lm_identity: LMIdentity | None = None
    encoder: EncoderConfig
    also: dict[str, EncoderConfig] = {}
    features: dict[str, Any]
    fingerprint: str
    variant: VariantConfig
    text: TextConfig
    decode: DecodeConfig

    @field_validator("features")
    @classmethod
    def _has_sizes(cls, features: dict[str, Any]) -> dict[str, Any]:
        for spec in _by_source(features).values():
            missing = [key for key in ("layers", "dim") if not isinstance(spec.get(key), int)]
            if missing:
                raise ValueError(f"says no {' and no '.join(missing)}")
        return features

    @property
    def sizes(self) -> tuple[int, int | dict[str, int]]:
        """Layers that all encoders have, and the width of the only one's tokens, or by source."""
        specs = _by_source(self.features)
        layers = min(spec["layers"] for spec in specs.values())
        dims = {name: spec["dim"] for name, spec in specs.items()}
        return layers, dims if self.also else dims[MAIN]

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, features: dict[str, Any], fingerprint: str
    ) -> "AugmentedConfig":
        return cls(features=features, fingerprint=fingerprint, **cls._sections(recipe))

    def with_sections_of(self, recipe: Recipe) -> "AugmentedConfig":
        """The config with what a recipe says, of the same features and the same LM."""
        return self.model_copy(update=self._sections(recipe))

    @staticmethod
    def _sections(recipe: Recipe) -> dict[str, Any]:
        return {
            "lm": recipe.lm,
            "encoder": recipe.encoder,
            "also": {name: source.encoder for name, source in recipe.also.items()},
            "variant": recipe.variant,
            "text": recipe.text,
            "decode": recipe.decode,
        }

    @classmethod
    def read(cls, folder: Path) -> "AugmentedConfig":
        """The config in a folder, local addresses as seen from here.

        Raises:
            EpalmError: none there, not readable, or of a newer version.
        """
        file = folder / CONFIG
        if not file.is_file():
            raise EpalmError(
                f"{file}: no such file; give a folder made by `export` or save_pretrained"
            )
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            version = int(tree["format_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EpalmError(f"{file}: not a config of a trained model ({error!r})") from None
        if version > FORMAT_VERSION:
            raise EpalmError(
                f"{file}: has format version {version}, this epalm reads up to {FORMAT_VERSION}; "
                "update epalm"
            )
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise EpalmError("\n".join([f"{file}: not valid", *lines])) from None
        return config._with_addresses(lambda path: str(folder / path))

    def write(self, folder: Path) -> None:
        """Write it into a folder, local addresses as seen from there."""
        config = self._with_addresses(lambda path: os.path.relpath(Path(path), folder))
        text = config.model_dump_json(indent=2, exclude=None if self.also else {"also"})
        _replace(folder / CONFIG, lambda file: file.write_text(text))

    def _with_addresses(self, change: Callable[[str], str]) -> "AugmentedConfig":
        """The config with its relative local addresses changed."""

        def changed(section: LMConfig | EncoderConfig) -> Any:
            address = section.weights
            if _REMOTE.match(address) or Path(address).expanduser().is_absolute():
                return section
            return section.model_copy(update={"weights": change(address)})

        also = {name: changed(encoder) for name, encoder in self.also.items()}
        update = {"lm": changed(self.lm), "encoder": changed(self.encoder), "also": also}
        return self.model_copy(update=update)


def _by_source(features: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = features.get("sources", {MAIN: features})
    return found


def write_pretrained(
    folder: Path,
    config: AugmentedConfig,
    lm_config: PreTrainedConfig,
    weights: Mapping[str, torch.Tensor],
    codec: TextCodec,
) -> None:
    """Write a trained model's folder; what an earlier one left in it is replaced.

    Args:
        lm_config: of the LM that it was trained for, which must be at its address still.
        weights: as `trained_weights` gives them.

    Raises:
        EpalmError: the LM is not there.
    """
    if config.lm_identity is None:
        identity = LMIdentity.of(lm_config, lm_digest(config.lm.weights))
        config = config.model_copy(update={"lm_identity": identity})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # written last: with it, the folder is complete
    codec.tokenizer.save_pretrained(folder)
    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    _replace(folder / WEIGHTS, lambda file: save_file(tensors, file))
    config.write(folder)


class PretrainedMixin:
    """`save_pretrained` and `from_pretrained` of the augmented LM.

    Attributes:
        origin: what the model is made of; None for a model made by hand.
        codec: its text codec; None likewise.
    """

    origin: AugmentedConfig | None = None
    codec: TextCodec | None = None
    trained: nn.ModuleDict
    lm: PreTrainedModel
    from_config: ClassVar[Callable[..., Any]]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained weights, the tokenizer and what the model is made of; not the LM.

        Raises:
            EpalmError: the model was made by hand, or its LM is not at its address any more.
        """
        if self.origin is None or self.codec is None:
            raise EpalmError(
                "save_pretrained: this model was not made from a recipe; set model.origin "
                "(AugmentedConfig) and model.codec (TextCodec) first"
            )
        weights = trained_weights(self.trained)
        write_pretrained(Path(folder), self.origin, self.lm.config, weights, self.codec)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        lm: PreTrainedModel | str | None = None,
        device: str = "auto",
        encoder: nn.Module | None = None,
    ) -> Self:
        """A trained model on its frozen LM, with its `codec`, ready to generate.

        Args:
            folder: made by `save_pretrained` or `epalm export`, or its hub address (hf:ORG/NAME).
            lm: the LM where it is loaded already (it stays on its device, and a variant that trains
                the LM overwrites its weights), or another address of it; default: the recorded one.
            device: as in recipes; a named one holds the LM alone, though it was spread over several
                in training.
            encoder: takes the encoder's weights, where it was trained too.

        Raises:
            EpalmError: something is missing or unreadable, or the LM is not the one that the
                weights were trained for. Of an LM that is loaded already only architecture, depth
                and width are compared.
        """
        place = resolve(str(folder))
        return cls.from_origin(place, AugmentedConfig.read(place), lm, device, encoder)

    @classmethod
    def from_origin(
        cls,
        place: Path,
        origin: AugmentedConfig,
        lm: PreTrainedModel | str | None = None,
        device: str = "auto",
        encoder: nn.Module | None = None,
    ) -> Self:
        """`from_pretrained` of a folder that is here, and its config as it was read or changed."""
        if origin.encoder.train and encoder is None:
            raise EpalmError(
                f"{place}: its encoder was trained too; load both with Predictor.from_pretrained"
            )
        if isinstance(lm, str):
            origin = origin.model_copy(update={"lm": origin.lm.model_copy(update={"weights": lm})})
        if isinstance(lm, PreTrainedModel):
            _check_shape(place, origin, lm.config)
            loaded = lm
        else:
            _check_shape(place, origin, load_lm_config(origin.lm.weights))
            _check_digest(place, origin)
            spread = origin.lm.device_map if device == "auto" else None
            config = origin.lm.model_copy(update={"device_map": spread})
            loaded = load_lm(config, choose_device(device), origin.variant.train_lm)
        model: Self = cls.from_config(loaded, origin.variant, *origin.sizes)
        if encoder is not None:
            model.trained["encoder"] = encoder
        put_weights(model.trained, _read_weights(place / WEIGHTS), str(place / WEIGHTS))
        rows = loaded.get_input_embeddings().weight.shape[0]
        model.origin = origin
        model.codec = TextCodec(load_tokenizer(str(place), origin.text, rows), origin.text)
        return model


def _check_shape(folder: Path, origin: AugmentedConfig, found: PreTrainedConfig) -> None:
    wanted = origin.lm_identity
    if wanted is None:
        return
    ours = LMIdentity.of(found, wanted.digest)
    if ours != wanted:
        raise EpalmError(
            f"{folder}: trained for an LM of type {wanted.model_type} with {wanted.layers} layers "
            f"of width {wanted.width}; this one is {ours.model_type} with {ours.layers} layers of "
            f"width {ours.width}. Give the LM it was trained for"
        )


def _check_digest(folder: Path, origin: AugmentedConfig) -> None:
    wanted, address = origin.lm_identity, origin.lm.weights
    if wanted is not None and (found := lm_digest(address)) != wanted.digest:
        raise EpalmError(
            f"{folder}: trained for an LM whose files have the digest {wanted.digest}; those of "
            f"{address} have {found}. Give the LM it was trained for, or load this one yourself "
            "and give it as `lm`"
        )


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise EpalmError(f"{file}: not readable ({error}); copy the folder again") from None


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, then rename over it."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
