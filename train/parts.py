"""Everything a recipe stands for, put together: dataset, features, LM, text, model."""

from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from epalm.config import Recipe
from epalm.data import load_dataset
from epalm.data.example import Dataset
from epalm.errors import EpalmError
from epalm.extract.encoder import Encoder, build
from epalm.extract.lookup import FeatureTable
from epalm.extract.sources import SourceTables, open_sources
from epalm.model.augmented import AugmentedLM
from epalm.model.load import load_lm, load_tokenizer
from epalm.model.pretrained import AugmentedConfig
from epalm.model.room import Room
from epalm.model.text import TextCodec
from epalm.store.spec import FeatureSpec, JointSpec
from epalm.train.online import OnlineFeatures, open_online
from epalm.train.processes import device_of, join_processes


@dataclass
class Parts:
    """What training and evaluation work with."""

    recipe: Recipe
    device: torch.device
    dataset: Dataset
    features: FeatureTable | SourceTables | OnlineFeatures
    codec: TextCodec
    model: AugmentedLM
    accelerator: Accelerator

    @property
    def room(self) -> Room:
        """Places for text in the LM."""
        return room_of(self.recipe, self.model, self.features.spec)

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.trained.parameters())

    @property
    def total_parameters(self) -> int:
        """Encoders, LM and trained parts."""
        ours = sum(p.numel() for p in self.model.parameters())  # a trained LM counts once
        trained = "encoder" in self.model.trained
        return ours + (0 if trained else self.features.spec.encoder_parameters)


def assemble(recipe: Recipe) -> Parts:
    """Load all parts; the trained ones are freshly initialised from the recipe's seed.

    Each of several processes loads its own, onto its own device.

    Raises:
        EpalmError: whatever is missing or does not fit, data first, since it is cheapest to check.
    """
    accelerator = join_processes(recipe.device)
    if recipe.lm.device_map and accelerator.num_processes > 1:
        raise EpalmError(
            "lm.device_map: one process has all devices; start it without accelerate launch, or "
            "set it to null"
        )
    device = device_of(accelerator, recipe.device)
    features: FeatureTable | SourceTables | OnlineFeatures
    if recipe.encoder.online:
        features, dataset = open_online(recipe, load_dataset(recipe), device, accelerator)
        model, codec = build_model(recipe, features.spec, device, features.encoder)
    else:
        features, dataset = open_sources(recipe)
        model, codec = build_model(recipe, features.spec, device)
        if recipe.lm.device_map:
            device = model.device
        features.place(recipe.store.placement, device)
    parts = Parts(recipe, device, dataset, features, codec, model, accelerator)
    check_prompts(recipe, dataset, parts.room, codec)
    return parts


def room_of(recipe: Recipe, model: AugmentedLM, spec: FeatureSpec | JointSpec) -> Room:
    """Places for text in the LM behind the recipe's perceptual tokens."""
    return model.room(spec.tokens if recipe.encoder.tokens == "all" else 1)


def check_prompts(recipe: Recipe, dataset: Dataset, room: Room, codec: TextCodec) -> None:
    """EpalmError when a prompt that will be answered has no room."""
    answered = [e.prompt for e in dataset.examples if e.split in ("val", recipe.evaluate.split)]
    room.check_prompts(codec, answered, recipe.decode.max_new_tokens)


def build_model(
    recipe: Recipe,
    spec: FeatureSpec | JointSpec,
    device: torch.device,
    encoder: Encoder | None = None,
) -> tuple[AugmentedLM, TextCodec]:
    """The augmented LM and its text codec, for features of this spec, or of these sources.

    Args:
        encoder: becomes a trained part where the recipe trains it; not needed elsewhere.
    """
    lm = load_lm(recipe.lm, device, recipe.variant.train_lm)
    rows = lm.get_input_embeddings().weight.shape[0]
    codec = TextCodec(load_tokenizer(recipe.lm.weights, recipe.text, rows), recipe.text)
    model = augment(lm, codec, recipe, spec)
    if recipe.encoder.train:
        model.trained["encoder"] = (encoder or build(recipe, device)).model
    return model, codec


def augment(
    lm: PreTrainedModel, codec: TextCodec, recipe: Recipe, spec: FeatureSpec | JointSpec
) -> AugmentedLM:
    """A recipe's variant on an LM, its trained parts freshly initialised from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = AugmentedLM.from_config(lm, recipe.variant, spec.layers, spec.dim)
    model.origin = AugmentedConfig.of_recipe(recipe, asdict(spec), spec.fingerprint)
    model.codec = codec
    return model
