"""The extraction loop: hash, then read, decode, encode and write, one shard at a time.

A shard's media are fixed before it begins and encoded in the same batches each time, so that a
shard redone after an interruption holds the same bytes. Several processes, on machines that share
a disk, may extract into one set: each claims the shards it makes.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.data.media import Media
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.columns import view_columns
from epalm.extract.encoder import ENCODERS, build, describe
from epalm.extract.hashing import hash_media, removed_media
from epalm.extract.report import Report, bad_media_message
from epalm.extract.shards import ShardMaker
from epalm.extract.workers import DecodePool, prepare_workers
from epalm.store.column import Column
from epalm.store.feature_set import CatalogueEntry, FeatureSet, Layout
from epalm.store.marker import Row
from epalm.store.stage import Stage
from epalm.store.writer import ColumnWriter

POLL_SECONDS = 0.5  # between looks at shards that other processes are making


def extract(
    recipe: Recipe, dataset: Dataset, retry_failed: bool = False, planned_only: bool = False
) -> Report:
    """Encode every media of the dataset that its feature set does not hold yet.

    Safe to interrupt and to repeat: whole shards stay, the rest is done at the next call.

    Args:
        recipe: what to make.
        dataset: whose media.
        retry_failed: try media again that stand in the failure ledger.
        planned_only: make only shards that are planned already: those given up by a repair.

    Raises:
        EpalmError: weights that cannot be used, or bad media. These are written to the set's
            ledger, and all others are encoded first; `data.bad_media: skip` accepts them.
    """
    start = time.perf_counter()
    spec = describe(recipe)
    layout = Layout(recipe.store.backend, recipe.store.shard_rows, recipe.encoder.weights)
    features = FeatureSet.create(Path(recipe.store.root), spec, layout)
    report = Report(features)
    begin = time.perf_counter()
    found = hash_media(dataset, features)
    entries = found.media
    report.failed.update({m: failure.reason for m, failure in found.unreadable.items()})
    report.removed = removed_media(dataset, features)
    report.seconds["hash"] = time.perf_counter() - begin
    media_of = {entry.content_hash: dataset.media[m] for m, entry in entries.items()}
    training = {e.media for e in dataset.split("train")}
    augmented = [e.content_hash for m, e in entries.items() if m in training]
    wanted = _wanted_rows(recipe, features, list(media_of), dict.fromkeys(augmented))
    todo: list[_Todo] = []
    for column, rows in wanted.items():
        writer = ColumnWriter(column)
        _mend(writer)
        report.found += sum(row in column for row in rows)
        if planned_only:
            planned = writer.planned()
            rows = [row for row in rows if row in planned]
        elif not retry_failed:
            rows = [row for row in rows if row not in column.failures]
        if pending := writer.plan(rows):
            todo.append(_Todo(writer, rows, pending))
    if todo:
        _encode_all(recipe, media_of, todo, report)
    report.total_seconds = time.perf_counter() - start
    rate = f"{report.encoded / report.total_seconds:.1f} media/s"
    if not report.encoded:
        rate = f"skipped, {report.found} media found in the store"
    try:
        features.record_extraction(Stage(round(report.total_seconds, 2), rate))
    except OSError:
        if report.encoded:  # else nothing had to be written, and the store may be read-only
            raise
    _collect_failures(report, entries, wanted)
    _find_absent(report, dataset, recipe, features)
    if report.failed and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message(report.failed, features))
    return report


def _mend(writer: ColumnWriter) -> None:
    """Truncated or missing shards are made again, in their places."""
    if damaged := writer.column.damaged:
        tqdm.write(f"{writer.column.folder}: {len(damaged)} damaged shards are made again")
        writer.plan_again(marker.shard for marker in damaged)


def _collect_failures(
    report: Report,
    entries: dict[str, CatalogueEntry],
    wanted: dict[Column, list[Row]],
) -> None:
    reasons = {
        row.content_hash: column.failures[row].reason
        for column, rows in wanted.items()
        for row in rows
        if row in column.failures
    }
    for media, entry in entries.items():
        if entry.content_hash in reasons:
            report.failed[media] = reasons[entry.content_hash]


def _find_absent(report: Report, dataset: Dataset, recipe: Recipe, features: FeatureSet) -> None:
    """Media whose files are not here, but whose features are, are found and have not failed."""
    known = features.catalogue(dataset.name).media
    plain = view_columns(recipe, features)[0][1]
    for media in list(report.failed):
        row = Row(known[media].content_hash, 0) if media in known else None
        if row is not None and all(row in column for column in plain):
            del report.failed[media]
            report.found += 1


def _wanted_rows(
    recipe: Recipe, features: FeatureSet, hashes: Iterable[str], augmented: Iterable[str]
) -> dict[Column, list[Row]]:
    """By column, the rows it shall have: view 0 of all media, views 1..K of the augmented ones."""
    wanted: dict[Column, list[Row]] = {}
    for view, columns in view_columns(recipe, features):
        for column in columns:
            some = augmented if view else hashes
            wanted.setdefault(column, []).extend(Row(h, view) for h in some)
    return wanted


class _Todo(NamedTuple):
    """What is missing in one column: the rows it shall have, and the shards that lack."""

    writer: ColumnWriter
    rows: list[Row]
    pending: dict[int, int]


def _encode_all(
    recipe: Recipe, media_of: dict[str, Media], todo: list[_Todo], report: Report
) -> None:
    """Make all pending shards, or wait for other processes that are making them."""
    prepare_workers(ENCODERS[recipe.encoder.kind])
    encoder = build(recipe, choose_device(recipe.device))
    config = recipe.encoder
    workers = config.worker_count
    with (
        DecodePool(encoder.preprocess, workers, config.decode_timeout, config.batch_size) as pool,
        tqdm(total=sum(sum(t.pending.values()) for t in todo), desc="extract", unit="media") as bar,
    ):
        for writer, rows, pending in todo:
            shards = ShardMaker(recipe, media_of, encoder, pool, writer, report, bar)
            while pending:
                left = shards.make(pending)
                if any(writer.is_lost(n) for n in left):  # another dataset's extraction took it
                    writer.column.refresh()
                    left = writer.plan([r for r in rows if r not in writer.column.failures])
                elif len(left) == len(pending):
                    bar.set_postfix_str(f"waiting for {len(left)} shards of other processes")
                    time.sleep(POLL_SECONDS)
                pending = left
            writer.column.refresh()
