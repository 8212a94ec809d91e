"""Raw media files through encoder and LM."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from epalm.address import resolve
from epalm.config import (
    MAIN,
    DataConfig,
    Recipe,
    Source,
    StoreConfig,
    TrainConfig,
    differences,
    override_recipe,
)
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.evaluate.generation import generate_texts
from epalm.evaluate.stream import AnswerStreamer
from epalm.extract.columns import column_specs, last_layers
from epalm.extract.encoder import Encoder, Preprocess, build, describe
from epalm.extract.workers import describe_error
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Features
from epalm.model.pretrained import AugmentedConfig
from epalm.store.spec import FeatureSpec, JointSpec, read_spec
from epalm.train.checkpoint import load_weights
from epalm.train.inputs import check_lm
from epalm.train.parts import build_model
from epalm.train.run import Run

_FREE = {
    "device", "lm.weights", "lm.dtype", "lm.device_map", "encoder.weights",
    "encoder.decode_timeout", "decode", "text.max_prompt_tokens",
}  # fmt: skip
"""Recipe fields that may be others than in an exported folder. What is at an address is compared
with what was there."""


class Predictor:
    """A trained model and its encoder.

    Attributes:
        decode: how answers are generated, of the recipe; may be replaced.
        decode_timeout: seconds that decoding a file may take; where it is done by a process.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: FeatureSpec,
        model: AugmentedLM,
        encoder: Encoder,
        source: str | None = None,
    ):
        """
        Args:
            recipe: its encoder and decode sections count; of several sources, that of one alone.
            spec: of the features that its encoder makes.
            model: with a codec.
            encoder: the recipe's, on the model's device.
            source: name of the source, where the model has several.
        """
        self._source = source
        self.model, self.spec, self.decode = model, spec, recipe.decode
        self.decode_timeout = recipe.encoder.decode_timeout
        self._encoder, self._online = encoder, recipe.encoder.online
        self._layers = last_layers(recipe, column_specs(recipe, spec)[0])

    @classmethod
    def from_run(cls, run: Run, checkpoint: Path, modality: str | None = None) -> "Predictor":
        """A run with one of its checkpoints.

        Args:
            modality: image, video or audio; of several sources, the one of this modality. None: the
                main one.

        Raises:
            EpalmError: anything of it is missing, or no or more than one source fits.
        """
        source, spec = _described(run.recipe, modality)
        alone = run.recipe.sources()[source]
        run.bind_features(spec)
        device = choose_device(alone.device)
        encoder = build(alone, device)
        model, codec = build_model(run.recipe, spec, device, encoder)
        check_lm(run, codec)
        load_weights(checkpoint, model)
        return cls._of_source(alone, source, spec, model, encoder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        lm: PreTrainedModel | str | None = None,
        device: str = "auto",
        modality: str | None = None,
        overrides: tuple[str, ...] = (),
    ) -> "Predictor":
        """As `AugmentedLM.from_pretrained`, with the encoder.

        Args:
            modality: as in `from_run`.
            overrides: of recipe fields, as in `load_recipe`: device, decode, addresses, and so on.

        Raises:
            EpalmError: as there; or the encoder is missing, or not the one it was trained with; or
                an override is of something that the training has settled.
        """
        place = resolve(str(folder))
        origin = AugmentedConfig.read(place)
        recipe = _overridden(_recipe(origin, device), overrides, place)
        source, spec = _described(recipe, modality)
        alone = recipe.sources()[source]
        at = lm.device if isinstance(lm, PreTrainedModel) else choose_device(recipe.device)
        encoder = build(alone, at)
        trained = encoder.model if recipe.encoder.train else None
        changed = origin.with_sections_of(recipe)
        model = AugmentedLM.from_origin(place, changed, lm, recipe.device, trained)
        trained_on = read_spec(json.dumps(origin.features))
        if spec.canonical() != trained_on.canonical():
            lines = "\n".join(f"  {x}" for x in spec.differences(trained_on))
            raise EpalmError(
                f"{folder}: trained on other features than this encoder makes:\n{lines}"
            )
        return cls._of_source(alone, source, spec, model, encoder)

    @classmethod
    def _of_source(
        cls,
        recipe: Recipe,
        source: str,
        spec: FeatureSpec | JointSpec,
        model: AugmentedLM,
        encoder: Encoder,
    ) -> "Predictor":
        if isinstance(spec, JointSpec):
            return cls(recipe, spec.sources[source], model, encoder, source)
        return cls(recipe, spec, model, encoder)

    def encode(self, media: Sequence[str | Path]) -> torch.Tensor:
        """Features (M, n, D), or (M, n, t, D) with all tokens, of M image, video or audio files.

        Raises:
            EpalmError: a file that cannot be decoded.
        """
        return self.encode_inputs(torch.stack([self._input(Path(file)) for file in media]))

    def encode_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same of what `preprocess` made of the files: (M, *preprocess.shape) float32."""
        features = self._encoder.encode(inputs, self._layers).squeeze(2)
        if self._online:
            return features
        return features.to(getattr(torch, self.spec.dtype))  # as the store would have kept them

    @property
    def preprocess(self) -> Preprocess:
        """From a file's bytes to the encoder's input."""
        return self._encoder.preprocess

    def stream(self, features: torch.Tensor, prompt: str, write: Callable[[str], object]) -> None:
        """Answer one prompt about one media, word by word; as `ask` does, but without beams."""
        assert self.model.codec is not None
        streamer = AnswerStreamer(self.model.codec, write)
        generate_texts(
            self.model, self.model.codec, [prompt], self._shown(features), [0],
            self.decode.model_copy(update={"num_beams": 1}), streamer=streamer,
        )  # fmt: skip

    def ask(
        self, features: torch.Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None
    ) -> list[str]:
        """Answers to B prompts about M media.

        Args:
            features: of `encode`.
            rows: (B,) which media each prompt is about; default: all about the only one, or in
                order.

        Raises:
            EpalmError: `rows` names media that are not there, or a prompt has no room.
        """
        if rows is None:
            rows = [0] * len(prompts) if len(features) == 1 else range(len(prompts))
        assert self.model.codec is not None
        shown = self._shown(features)
        return generate_texts(self.model, self.model.codec, prompts, shown, rows, self.decode)

    def _shown(self, features: torch.Tensor) -> Features:
        return features if self._source is None else {self._source: features}

    def _input(self, file: Path) -> torch.Tensor:
        try:
            return self.preprocess(file.read_bytes(), None)
        except Exception as error:  # whatever a broken file does to its decoder
            raise EpalmError(
                f"{file}: cannot be decoded ({': '.join(describe_error(error))})"
            ) from None


def _described(recipe: Recipe, modality: str | None) -> tuple[str, FeatureSpec | JointSpec]:
    """The source of a modality, or the main one, and the spec of all there are."""
    specs = {name: describe(alone) for name, alone in recipe.sources().items()}
    source = MAIN if modality is None else _source_of(specs, modality)
    return source, JointSpec(specs) if recipe.also else specs[MAIN]


def _source_of(specs: Mapping[str, FeatureSpec], modality: str) -> str:
    """The name of the only source of a modality."""
    fitting = [name for name, spec in specs.items() if spec.modality == modality]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise EpalmError(
            f"predict: {', '.join(fitting)} are all sources of {modality}; only one of a modality "
            "can be asked"
        )
    known = ", ".join(sorted({spec.modality for spec in specs.values()}))
    raise EpalmError(f"predict: the run has no source of {modality}, only of {known}")


def _overridden(recipe: Recipe, overrides: tuple[str, ...], folder: Path) -> Recipe:
    """EpalmError where one is of a field that is not free."""
    changed = override_recipe(recipe, overrides, f"{folder}, with --set")
    if found := differences(recipe, changed, _FREE):
        lines = "\n".join(f"  {line}" for line in found)
        free = ", ".join(sorted(_FREE))
        raise EpalmError(
            f"{folder}: --set has no effect on an exported model, or makes another of it:\n"
            f"{lines}\nwhat may be set: {free}"
        )
    return changed


def _recipe(origin: AugmentedConfig, device: str) -> Recipe:
    """The recipe of a trained model, of which nothing is left to train."""
    nothing = DataConfig(kind="none", path="none")
    specs = origin.features.get("sources", {MAIN: origin.features})
    dtype = specs[MAIN]["dtype"]  # that of all
    return Recipe(
        name="pretrained",
        device=device,
        data=nothing,
        encoder=origin.encoder,
        also={name: Source(data=nothing, encoder=own) for name, own in origin.also.items()},
        store=StoreConfig(dtype=dtype),
        lm=origin.lm,
        variant=origin.variant,
        text=origin.text,
        train=TrainConfig(steps=1),
        decode=origin.decode,
    )
