"""The features that a recipe needs, found in the store and read by media id and view."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.device import send
from epalm.errors import EpalmError, NotHereError
from epalm.extract.columns import column_specs, last_layers
from epalm.extract.encoder import describe
from epalm.extract.placement import FreeMemory
from epalm.extract.report import bad_media_message
from epalm.store.column import Column
from epalm.store.feature_set import Catalogue, FeatureSet, find
from epalm.store.marker import Row
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.stage import Stage


class _Group:
    """Columns that together keep the wanted encoder layers of some views."""

    def __init__(self, features: FeatureSet, wanted: ColumnSpec):
        columns, missing = features.covering(wanted)
        if missing:
            raise EpalmError(
                f"{features.folder}: keeps no {wanted.tokens} tokens of the encoder layers "
                f"{', '.join(map(str, missing))} for this recipe's views; run `extract` with it"
            )
        self.layers = wanted.layers
        self.parts: list[tuple[Column, list[int], list[int]]] = []
        left = set(wanted.layers)
        for column in columns:
            kept = column.column.layers
            taken = [layer for layer in kept if layer in left]
            left -= set(taken)
            self.parts.append(
                (column, [kept.index(t) for t in taken], [self.layers.index(t) for t in taken])
            )

    def __contains__(self, row: Row) -> bool:
        return all(row in column for column, _, _ in self.parts)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(layers, tokens, D)."""
        return (len(self.layers), *self.parts[0][0].row_shape[1:])

    def dtype(self) -> str:
        dtypes = {column.dtype() for column, _, _ in self.parts}
        return "float32" if "float32" in dtypes else dtypes.pop()

    def gather(self, rows: Sequence[Row]) -> NDArray[np.generic]:
        """(n, layers, tokens, D)."""
        column, positions, _ = self.parts[0]
        if len(self.parts) == 1 and positions == list(range(positions[0], positions[-1] + 1)):
            return column.gather(column.rows(rows), slice(positions[0], positions[-1] + 1))
        out = np.empty((len(rows), len(self.layers), *column.row_shape[1:]), self.dtype())
        for column, positions, places in self.parts:
            out[:, places] = column.gather(column.rows(rows))[:, positions]
        return out


class FeatureTable:
    """Features of a dataset's media: the encoder layers that are used, view 0 and views 1..K.

    They are on the device, in memory or on disk, as `store.placement` says.

    Attributes:
        views: K; the augmented views that training media have.
        tokens: t; tokens of an encoder layer.
        needed: media and views that the dataset's training and evaluation read.
    """

    def __init__(self, recipe: Recipe, features: FeatureSet, catalogue: Catalogue):
        self.spec: FeatureSpec = features.spec
        self.extraction: Stage | None = features.last_extraction()
        self.views = recipe.encoder.views.count
        self._hash_of = {m: entry.content_hash for m, entry in catalogue.media.items()}
        wanted = [
            ColumnSpec(c.tokens, c.token_count, last_layers(recipe, c), c.augmentation)
            for c in column_specs(recipe, features.spec)
        ]
        self.tokens = wanted[0].token_count
        self.needed: list[tuple[str, int]] = []
        self._plain = _Group(features, wanted[0])
        self._augmented = _Group(features, wanted[-1])
        self._placed: torch.Tensor | None = None
        self._place_of: dict[tuple[str, int], int] = {}

    def view_count(self, media: str) -> int:
        """How many augmented views there are of a training media."""
        return self.views

    def content_hash(self, media: str) -> str:
        """SHA-256 of the file that a media's features were made of."""
        return self._hash_of[media]

    def has(self, media: str, view: int) -> bool:
        """The store holds this view of the media."""
        group = self._augmented if view else self._plain
        return Row(self._hash_of.get(media, ""), view) in group

    def fetch(self, media: Sequence[str], views: Sequence[int] | None = None) -> torch.Tensor:
        """(M, n, D), or (M, n, t, D) where t > 1 tokens of a layer are kept, as they are stored.

        Encoder layers ascend.

        Args:
            media: ids; of none, (0, n, D) or (0, n, t, D).
            views: the view of each; default: 0.
        """
        if not media:
            return torch.empty(0, *self._plain.row_shape).squeeze(2)
        keys = list(zip(media, views or [0] * len(media), strict=True))
        if self._placed is not None:
            places = send(torch.tensor([self._place_of[key] for key in keys]), self._placed.device)
            return self._placed.index_select(0, places)
        return self._read(keys)

    def size(self) -> int:
        """Bytes of the features of `needed`."""
        return self._read(self.needed[:1]).nbytes * len(self.needed) if self.needed else 0

    def place(self, placement: str, device: torch.device, free: FreeMemory | None = None) -> None:
        """Bring the features of `needed` to where training will read them.

        Says where they are. `auto` takes the device, else memory, else leaves them on disk, by
        what is free: to be called when the LM is in its place.

        Args:
            free: of which others have had theirs; default: measured now.
        """
        keys = self.needed
        if not keys:
            return
        size = self.size()
        if placement == "auto":
            placement = (free or FreeMemory(device)).take(size)
        words = {"device": f"on {device}", "ram": "in memory", "disk": "on disk, mapped"}
        tqdm.write(
            f"features: {size / 1e6:,.1f} MB of {len(keys):,} media and views {words[placement]}"
        )
        if placement == "disk":
            return
        dtype = getattr(torch, self._joint_dtype())
        table = torch.empty((len(keys), *self._read(keys[:1]).shape[1:]), dtype=dtype)
        for begin in range(0, len(keys), 4096):
            table[begin : begin + 4096] = self._read(keys[begin : begin + 4096])
        self._placed = table.to(device) if placement == "device" else table
        self._place_of = {key: place for place, key in enumerate(keys)}

    def _read(self, keys: Sequence[tuple[str, int]]) -> torch.Tensor:
        rows = [Row(self._hash_of[media], view) for media, view in keys]
        if not any(row.view for row in rows):
            return torch.from_numpy(self._plain.gather(rows)).squeeze(2)
        if all(row.view for row in rows):
            return torch.from_numpy(self._augmented.gather(rows)).squeeze(2)
        found = [(self._augmented if row.view else self._plain).gather([row]) for row in rows]
        return torch.from_numpy(np.concatenate(found).astype(self._joint_dtype())).squeeze(2)

    def _joint_dtype(self) -> str:
        """The number format that holds every view."""
        dtypes = {self._plain.dtype(), self._augmented.dtype()}
        return "float32" if "float32" in dtypes else dtypes.pop()


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
    catalogue = features.catalogue(dataset.name)
    table = FeatureTable(recipe, features, catalogue)
    failed, unknown = _without_features(features, catalogue, dataset, table)
    if unknown:
        raise EpalmError(
            f"{features.folder}: {len(unknown)} media of {dataset.name} are not extracted, or have "
            f"changed since, {unknown[0]} among them; run `extract` with this recipe first"
        )
    if failed and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message(failed, features))
    if failed:
        tqdm.write(f"{len(failed)} media without features are left out, with their examples")
    left = dataset.without_media(failed)
    views = needed_views(left, table.views)
    table.needed = [(media, view) for media, some in views.items() for view in some]
    return table, left


def needed_views(dataset: Dataset, views: int) -> dict[str, list[int]]:
    """By media id, the views that a training with K augmented views reads."""
    training = {e.media for e in dataset.split("train")}
    return {m: [0, *range(1, views + 1)] if m in training else [0] for m in dataset.media}


def _without_features(
    features: FeatureSet, catalogue: Catalogue, dataset: Dataset, table: FeatureTable
) -> tuple[dict[str, str], list[str]]:
    """Media that the ledger explains, with its reasons, and media that `extract` must see.

    The media files may be absent, features travel without them; where a file is there, it must be
    as it was when it was extracted.
    """
    reasons: Mapping[str, str] = {
        row.content_hash: failure.reason
        for column in features.columns
        for row, failure in column.failures.items()
    }
    failed: dict[str, str] = {}
    unknown: list[str] = []
    for media, views in needed_views(dataset, table.views).items():
        entry = catalogue.media.get(media)
        file = dataset.media[media]
        try:
            # a folder of that name, or a file that may not be read, is as good as absent
            version = file.version() if os.access(file.path, os.R_OK) else None
        except OSError:
            version = None
        if version and (entry is None or entry[1:] != version):
            unknown.append(media)
        elif all(table.has(media, view) for view in views):
            continue
        elif entry is not None and entry.content_hash in reasons:
            failed[media] = reasons[entry.content_hash]
        elif entry is None and media in catalogue.unreadable:
            failed[media] = catalogue.unreadable[media].reason
        else:
            unknown.append(media)
    return failed, unknown
