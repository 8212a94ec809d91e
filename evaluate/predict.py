"""Raw media files through encoder and LM."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from epalm.address import resolve
from epalm.config import MAIN, DataConfig, Recipe, StoreConfig, TrainConfig
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.evaluate.generation import generate_texts
from epalm.extract.columns import column_specs, last_layers
from epalm.extract.encoder import Encoder, build, describe
from epalm.extract.workers import describe_error
from epalm.model.augmented import AugmentedLM
from epalm.model.pretrained import AugmentedConfig
from epalm.store.spec import FeatureSpec, JointSpec
from epalm.train.checkpoint import load_weights
from epalm.train.parts import build_model
from epalm.train.run import Run


class Predictor:
    """A trained model and its encoder.

    Attributes:
        decode: how answers are generated, of the recipe; may be replaced.
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
        sources = run.recipe.sources()
        specs = {name: describe(alone) for name, alone in sources.items()}
        source = MAIN if modality is None else _source_of(specs, modality)
        recipe, several = sources[source], bool(run.recipe.also)
        joint = JointSpec(specs) if several else specs[MAIN]
        run.bind_features(joint)
        device = choose_device(recipe.device)
        encoder = build(recipe, device)
        model, _ = build_model(run.recipe, joint, device, encoder)
        load_weights(checkpoint, model)
        return cls(recipe, specs[source], model, encoder, source if several else None)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, lm: PreTrainedModel | str | None = None, device: str = "auto"
    ) -> "Predictor":
        """As `AugmentedLM.from_pretrained`, with the encoder.

        Raises:
            EpalmError: as there; or the encoder is missing, or not the one it was trained with.
        """
        origin = AugmentedConfig.read(resolve(str(folder)))
        recipe = _recipe(origin)
        place = lm.device if isinstance(lm, PreTrainedModel) else choose_device(device)
        encoder = build(recipe, place)
        trained = encoder.model if recipe.encoder.train else None
        model = AugmentedLM.from_pretrained(folder, lm, device, trained)
        spec, trained_on = describe(recipe), origin.features
        if asdict(spec) != asdict(FeatureSpec(**trained_on)):
            lines = "\n".join(f"  {x}" for x in spec.differences(FeatureSpec(**trained_on)))
            raise EpalmError(
                f"{folder}: trained on other features than this encoder makes:\n{lines}"
            )
        return cls(recipe, spec, model, encoder)

    def encode(self, media: Sequence[str | Path]) -> torch.Tensor:
        """Features (M, n, D), or (M, n, t, D) with all tokens, of M image, video or audio files.

        Raises:
            EpalmError: a file that cannot be decoded.
        """
        inputs = torch.stack([self._input(Path(file)) for file in media])
        features = self._encoder.encode(inputs, self._layers).squeeze(2)
        if self._online:
            return features
        return features.to(getattr(torch, self.spec.dtype))  # as the store would have kept them

    def ask(
        self, features: torch.Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None
    ) -> list[str]:
        """Answers to B prompts about M media.

        Args:
            features: of `encode`.
            rows: (B,) which media each prompt is about; default: all about the only one, or in
                order.
        """
        if rows is None:
            rows = [0] * len(prompts) if len(features) == 1 else range(len(prompts))
        assert self.model.codec is not None
        shown = features if self._source is None else {self._source: features}
        return generate_texts(self.model, self.model.codec, prompts, shown, rows, self.decode)

    def _input(self, file: Path) -> torch.Tensor:
        try:
            return self._encoder.preprocess(file.read_bytes(), None)
        except Exception as error:  # whatever a broken file does to its decoder
            raise EpalmError(
                f"{file}: cannot be decoded ({': '.join(describe_error(error))})"
            ) from None


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


def _recipe(origin: AugmentedConfig) -> Recipe:
    """The recipe of a trained model, of which nothing is left to train."""
    return Recipe(
        name="pretrained",
        data=DataConfig(kind="none", path="none"),
        encoder=origin.encoder,
        store=StoreConfig(dtype=origin.features["dtype"]),
        lm=origin.lm,
        variant=origin.variant,
        text=origin.text,
        train=TrainConfig(steps=1),
        decode=origin.decode,
    )
