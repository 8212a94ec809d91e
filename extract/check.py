"""Encoding a few media: to compare them with what is stored, and to say how long all will take."""

import itertools
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.data.grouping import chunks
from epalm.data.media import Media
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs, existing_columns
from epalm.extract.encoder import ENCODERS, Encoder, build, describe
from epalm.extract.lookup import needed_views
from epalm.extract.views import view_seed
from epalm.extract.workers import DecodePool, Task, prepare_workers
from epalm.store.column import Column
from epalm.store.feature_set import CatalogueEntry, FeatureSet, find, folder_name, open_set
from epalm.store.marker import Row

NOISE_STEPS = 4
"""Steps of the stored or computed number format that two batches may differ by."""


@dataclass
class Comparison:
    """Stored features beside freshly encoded ones.

    Attributes:
        column: folder name.
        rows: compared.
        largest_difference: between a stored and a fresh value.
        largest_value: magnitude.
        bound: what batched arithmetic and rounding explain.
    """

    column: str
    rows: int
    largest_difference: float
    largest_value: float
    bound: float


def verify_deep(recipe: Recipe, dataset: Dataset, sample: int) -> list[Comparison]:
    """Encode a random sample of each of the recipe's columns again; another one at each call.

    Raises:
        EpalmError: no feature set of this recipe, or none of its media files is here unchanged.
    """
    features = find(Path(recipe.store.root), describe(recipe), recipe.encoder.weights)
    media_of = _media_by_hash(features, dataset)
    draw = random.SystemRandom()
    found = []
    with _Small(recipe) as encode:
        for column in existing_columns(recipe, features):
            known = [
                row
                for marker in column.markers.values()
                for row in marker.rows
                if row in column and row.content_hash in media_of
            ]
            if not known:
                continue
            rows = draw.sample(known, min(sample, len(known)))
            fresh = encode(column, rows, media_of)
            stored = column.gather(column.rows(rows)).astype(np.float32)
            largest = float(np.abs(stored).max())
            formats = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}
            step = max(formats[features.spec.compute], formats[features.spec.dtype])
            difference = float(np.abs(fresh - stored).max())
            bound = NOISE_STEPS * step * max(largest, 1.0)
            found.append(Comparison(column.folder.name, len(rows), difference, largest, bound))
    if not found:
        raise EpalmError(
            f"{features.folder}: none of {dataset.name}'s media files is here as it was extracted"
        )
    return found


@dataclass
class Estimate:
    """What an extraction would add.

    Attributes:
        folder: of the set.
        rows: still to be encoded, by column.
        row_bytes: by column.
        rate: rows per second, measured on the first few media; None when nothing is to be done.
    """

    folder: Path
    rows: dict[str, int]
    row_bytes: dict[str, int]
    rate: float | None

    @property
    def bytes(self) -> int:
        return sum(count * self.row_bytes[name] for name, count in self.rows.items())

    @property
    def seconds(self) -> float:
        return sum(self.rows.values()) / self.rate if self.rate else 0.0


def estimate(recipe: Recipe, dataset: Dataset, sample: int) -> Estimate:
    """Count what is missing, and time the first few media; nothing is written.

    Media whose content was extracted under another name or dataset are counted as missing: their
    files are not hashed here.
    """
    spec = describe(recipe)
    folder = Path(recipe.store.root) / folder_name(spec)
    features = open_set(folder) if (folder / "layout.json").is_file() else None
    known = features.catalogue(dataset.name).media if features else {}
    rows: dict[str, int] = {}
    row_bytes: dict[str, int] = {}
    views = needed_views(dataset, recipe.encoder.views.count)
    for number, wanted in enumerate(column_specs(recipe, spec)):
        columns, missing = features.covering(wanted) if features else ([], wanted.layers)
        every = [(m, v) for m, some in views.items() for v in some if bool(v) == bool(number)]
        new = replace(wanted, layers=missing) if missing else None
        for kept, column in [*((c.column, c) for c in columns), *([(new, None)] if new else [])]:
            done = sum(_is_done(column, known.get(m), v) for m, v in every) if column else 0
            rows[kept.name] = len(every) - done
            size = np.dtype(spec.dtype).itemsize
            row_bytes[kept.name] = len(kept.layers) * kept.token_count * spec.dim * size
    rate = _rate(recipe, dataset, sample) if any(rows.values()) else None
    return Estimate(folder, rows, row_bytes, rate)


def _is_done(column: Column, entry: CatalogueEntry | None, view: int) -> bool:
    """The row is there, or was tried and failed."""
    if entry is None:
        return False
    row = Row(entry.content_hash, view)
    return row in column or row in column.failures


def _rate(recipe: Recipe, dataset: Dataset, sample: int) -> float:
    """Rows a second, of view 0 of the first media that can be used."""
    media = (m for m in dataset.media.values() if m.exists())
    tasks = [Task.of_media(m) for m in itertools.islice(media, sample)]
    layers = recipe.encoder.layers
    chosen = layers if layers is not None else tuple(range(describe(recipe).layers))
    with _Small(recipe) as encode:
        encode.tasks(tasks[: recipe.encoder.batch_size], chosen)  # the first one loads and warms up
        start = time.perf_counter()
        count = len(encode.tasks(tasks, chosen))
        if not count:
            raise EpalmError(f"data: none of the first {sample} media files can be decoded")
        return count / (time.perf_counter() - start)


class _Small:
    """Encodes a few media, with the recipe's own batches."""

    def __init__(self, recipe: Recipe):
        prepare_workers(ENCODERS[recipe.encoder.kind])
        self.seed, self.batch_size = recipe.encoder.views.seed, recipe.encoder.batch_size
        self.encoder: Encoder = build(recipe, choose_device(recipe.device))
        workers = recipe.encoder.worker_count
        self.pool = DecodePool(
            self.encoder.preprocess, workers, recipe.encoder.decode_timeout, self.batch_size
        )

    def __enter__(self) -> "_Small":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def __call__(
        self, column: Column, rows: list[Row], media_of: dict[str, Media]
    ) -> NDArray[np.float32]:
        """Fresh features of these rows of a column."""
        tasks = [Task(media_of[h], h, view_seed(self.seed, h, view)) for h, view in rows]
        found = self.tasks(tasks, column.column.layers)
        if len(found) < len(rows):
            raise EpalmError(f"{column.folder}: media that were encoded cannot be decoded any more")
        return found

    def tasks(self, tasks: list[Task], layers: tuple[int, ...]) -> NDArray[np.float32]:
        """Features of those that can be decoded."""
        found = []
        for some in chunks(tasks, self.batch_size):
            batch = self.pool.submit(some)
            good = [i for i, f in enumerate(batch.outcomes) if f.result().error is None]
            if good:
                found.append(self.encoder.encode(batch.inputs[good], layers).numpy())
        return np.concatenate(found) if found else np.empty((0, len(layers)), np.float32)


def _media_by_hash(features: FeatureSet, dataset: Dataset) -> dict[str, Media]:
    """Media whose files are here, unchanged since their extraction."""
    found = {}
    for media, entry in features.catalogue(dataset.name).media.items():
        known = dataset.media.get(media)
        try:
            version = known.version() if known else None
        except OSError:
            continue
        if known and entry[1:] == version:
            found[entry.content_hash] = known
    return found
