"""Encoding a few media: to compare them with what is stored, and to say how long all will take."""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epalm.config import Recipe
from epalm.data.example import Dataset, Media
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs, view_columns
from epalm.extract.encoder import ENCODERS, Encoder, build, describe
from epalm.extract.lookup import needed_views
from epalm.extract.views import view_seed
from epalm.extract.workers import DecodePool, Task, prepare_workers
from epalm.store.column import Column, Row
from epalm.store.feature_set import FeatureSet, find, folder_name, open_set

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
    """Encode a random sample of each of the recipe's columns again.

    Raises:
        EpalmError: no feature set of this recipe, or none of its media files is here unchanged.
    """
    features = find(Path(recipe.store.root), describe(recipe), recipe.encoder.weights)
    media_of = _media_by_hash(features, dataset)
    draw = random.Random(recipe.seed)
    found = []
    with _Small(recipe) as encode:
        columns = dict.fromkeys(c for _, some in view_columns(recipe, features) for c in some)
        for column in columns:
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
    item = np.dtype(spec.dtype).itemsize
    views = needed_views(dataset, recipe.encoder.views.count)
    for number, wanted in enumerate(column_specs(recipe, spec)):
        columns, missing = features.covering(wanted) if features else ([], wanted.layers)
        every = [(m, v) for m, some in views.items() for v in some if bool(v) == bool(number)]
        here = 0
        if not missing:
            here = sum(
                m in known and all(Row(known[m].content_hash, v) in column for column in columns)
                for m, v in every
            )
        rows[wanted.name] = len(every) - here
        row_bytes[wanted.name] = len(wanted.layers) * wanted.token_count * spec.dim * item
    rate = _rate(recipe, dataset, sample) if any(rows.values()) else None
    return Estimate(folder, rows, row_bytes, rate)


def _rate(recipe: Recipe, dataset: Dataset, sample: int) -> float:
    tasks = []
    for media in list(dataset.media.values())[:sample]:
        if media.path.is_file():
            tasks.append(Task.of_file(media.path))
    if not tasks:
        raise EpalmError(f"data: none of the first {sample} media files can be read")
    layers = recipe.encoder.layers
    with _Small(recipe) as encode:
        chosen = layers if layers is not None else tuple(range(describe(recipe).layers))
        encode.tasks(tasks[: recipe.encoder.batch_size], chosen)  # the first one loads and warms up
        start = time.perf_counter()
        encode.tasks(tasks, chosen)
        return len(tasks) / (time.perf_counter() - start)


class _Small:
    """Encodes a few media, with the recipe's own batches."""

    def __init__(self, recipe: Recipe):
        prepare_workers(ENCODERS[recipe.encoder.kind])
        self.seed, self.batch_size = recipe.encoder.views.seed, recipe.encoder.batch_size
        self.encoder: Encoder = build(recipe, choose_device(recipe.device))
        workers = recipe.encoder.workers or min(os.cpu_count() or 1, 8)
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
        tasks = [Task(media_of[h].path, h, view_seed(self.seed, h, view)) for h, view in rows]
        return self.tasks(tasks, column.column.layers)

    def tasks(self, tasks: list[Task], layers: tuple[int, ...]) -> NDArray[np.float32]:
        found = []
        for begin in range(0, len(tasks), self.batch_size):
            some = tasks[begin : begin + self.batch_size]
            batch = self.pool.submit(some)
            for task, future in zip(some, batch.outcomes, strict=True):
                if (error := future.result().error) is not None:
                    raise EpalmError(f"{task.path}: {': '.join(error)}")
            found.append(self.encoder.encode(batch.inputs, layers).numpy())
        return np.concatenate(found)


def _media_by_hash(features: FeatureSet, dataset: Dataset) -> dict[str, Media]:
    """Media whose files are here, unchanged since their extraction."""
    found = {}
    for media, entry in features.catalogue(dataset.name).media.items():
        known = dataset.media.get(media)
        try:
            stat = known.path.stat() if known else None
        except OSError:
            continue
        if known and stat and entry[1:] == (stat.st_size, stat.st_mtime_ns):
            found[entry.content_hash] = known
    return found
