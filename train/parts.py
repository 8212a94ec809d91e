"""Everything a recipe stands for, put together: dataset, features, LM, text, model."""

from dataclasses import dataclass

import torch

from epalm.config import Recipe
from epalm.data import load_dataset
from epalm.data.example import Dataset
from epalm.device import choose_device
from epalm.extract.lookup import FeatureTable, needed_views, open_features
from epalm.model.augmented import AugmentedLM
from epalm.model.load import load_lm, load_tokenizer
from epalm.model.text import TextCodec


@dataclass
class Parts:
    """What training and evaluation work with."""

    recipe: Recipe
    device: torch.device
    dataset: Dataset
    features: FeatureTable
    codec: TextCodec
    model: AugmentedLM

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.trained.parameters())

    @property
    def total_parameters(self) -> int:
        """Encoder, LM and trained parts."""
        ours = sum(p.numel() for p in self.model.parameters())  # a trained LM counts once
        return ours + self.features.spec.encoder_parameters


def assemble(recipe: Recipe) -> Parts:
    """Load all parts; the trained ones are freshly initialised from the recipe's seed.

    Raises:
        EpalmError: whatever is missing or does not fit, data first, since it is cheapest to check.
    """
    device = choose_device(recipe.device)
    features, dataset = open_features(recipe, load_dataset(recipe))
    views = needed_views(dataset, features.views)
    keys = [(media, view) for media, some in views.items() for view in some]
    features.place(keys, recipe.store.placement, device)
    model, codec = build_model(recipe, features.spec.layers, features.spec.dim, device)
    return Parts(recipe, device, dataset, features, codec, model)


def build_model(
    recipe: Recipe, encoder_layers: int, encoder_dim: int, device: torch.device
) -> tuple[AugmentedLM, TextCodec]:
    """The augmented LM and its text codec, for an encoder of this depth and width."""
    wanted = recipe.lm
    if recipe.variant.train_lm and wanted.dtype == "auto":
        wanted = wanted.model_copy(update={"dtype": "float32"})
    lm = load_lm(wanted, device)
    tokenizer = load_tokenizer(recipe.lm, recipe.text, lm.get_input_embeddings().weight.shape[0])
    torch.manual_seed(recipe.seed)
    model = AugmentedLM.from_config(lm, recipe.variant, encoder_layers, encoder_dim)
    return model, TextCodec(tokenizer, recipe.text)
