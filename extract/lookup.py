"""The features that a recipe needs, found in the store and read by media id."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.errors import EpalmError
from epalm.extract.encoder import describe
from epalm.extract.loop import bad_media_message
from epalm.store.feature_set import FeatureSet, find


class FeatureTable:
    """Features of a dataset's media, the last n encoder layers of each."""

    def __init__(self, features: FeatureSet, dataset: str, layers: int):
        self.spec = features.spec
        self.extraction = features.last_extraction()
        self._features = features
        self._layers = slice(features.spec.layers - layers, None)
        self._hash_of = {m: entry.content_hash for m, entry in features.catalogue(dataset).items()}

    def __contains__(self, media: str) -> bool:
        return self._hash_of.get(media, "") in self._features

    def fetch(self, media: Sequence[str]) -> torch.Tensor:
        """(M, n, D) in the stored number format, ascending encoder layers."""
        rows = self._features.rows([self._hash_of[m] for m in media])
        return torch.from_numpy(self._features.gather(rows, self._layers)[:, :, 0])


def open_features(recipe: Recipe, dataset: Dataset) -> tuple[FeatureTable, Dataset]:
    """The recipe's features, and the dataset without media that could not be encoded.

    The encoder's weights need not be on this machine.

    Raises:
        EpalmError: no fitting feature set, media not extracted yet, or bad media that the recipe
            does not accept.
    """
    try:
        spec = describe(recipe)
    except EpalmError:
        spec = describe(recipe, weights_at_hand=False)
    features = find(Path(recipe.store.root), spec)
    if recipe.variant.encoder_layers > spec.layers:
        raise EpalmError(
            f"variant.encoder_layers: {recipe.variant.encoder_layers} wanted, the encoder has "
            f"{spec.layers}"
        )
    table = FeatureTable(features, dataset.name, recipe.variant.encoder_layers)
    missing = [media for media in dataset.media if media not in table]
    reasons = {f["media"]: f["reason"] for f in features.failures() if f["dataset"] == dataset.name}
    unknown = [media for media in missing if media not in reasons]
    if unknown:
        raise EpalmError(
            f"{features.folder}: {len(unknown)} media of {dataset.name} are not extracted, "
            f"{unknown[0]} among them; run `extract` with this recipe first"
        )
    if missing and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message({m: reasons[m] for m in missing}, features))
    if missing:
        tqdm.write(f"{len(missing)} media without features are left out, with their examples")
    return table, dataset.without_media(missing)
