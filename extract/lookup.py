"""The features that a recipe needs, found in the store and read by media id."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.errors import EpalmError, NotHereError
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
    except NotHereError as error:
        spec = describe(recipe, weights_at_hand=False)
        tqdm.write(f"{error}; looking for features made with weights from that address")
    features = find(Path(recipe.store.root), spec, recipe.encoder.weights)
    table = FeatureTable(features, dataset.name, recipe.variant.encoder_layers)
    failed, unknown = _without_features(features, dataset, table)
    if unknown:
        raise EpalmError(
            f"{features.folder}: {len(unknown)} media of {dataset.name} are not extracted, or have "
            f"changed since, {unknown[0]} among them; run `extract` with this recipe first"
        )
    if failed and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message(failed, features))
    if failed:
        tqdm.write(f"{len(failed)} media without features are left out, with their examples")
    return table, dataset.without_media(failed)


def _without_features(
    features: FeatureSet, dataset: Dataset, table: FeatureTable
) -> tuple[dict[str, str], list[str]]:
    """Media that the ledger explains, with its reasons, and media that `extract` must see.

    The media files may be absent, features travel without them; where a file is there, it must be
    as it was when it was extracted.
    """
    ledger = features.failures()
    by_hash = {f["hash"]: f["reason"] for f in ledger if f["hash"]}
    unread = {f["media"]: f["reason"] for f in ledger if not f["hash"]}
    catalogue = features.catalogue(dataset.name)
    failed: dict[str, str] = {}
    unknown: list[str] = []
    for media in dataset.media.values():
        entry = catalogue.get(media.id)
        try:
            stat = media.path.stat()
        except OSError:
            stat = None
        if stat and (entry is None or entry[1:] != (stat.st_size, stat.st_mtime_ns)):
            unknown.append(media.id)
        elif media.id in table:
            continue
        elif entry is not None and entry.content_hash in by_hash:
            failed[media.id] = by_hash[entry.content_hash]
        elif entry is None and media.id in unread:
            failed[media.id] = unread[media.id]
        else:
            unknown.append(media.id)
    return failed, unknown
