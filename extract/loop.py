"""The extraction loop: hash, then read, decode, encode and write, one shard at a time.

A shard's media are fixed before it begins and encoded in the same batches each time, so that a
shard redone after an interruption holds the same bytes. Several processes, on machines that share
a disk, may extract into one set: each claims the shards it makes.
"""

import errno
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset, Media
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.columns import view_columns
from epalm.extract.encoder import ENCODERS, Encoder, build, describe
from epalm.extract.views import view_seed
from epalm.extract.workers import Batch, DecodePool, Task, prepare_workers
from epalm.store.column import Claim, Column, ColumnWriter, Failure, Row
from epalm.store.feature_set import Catalogue, CatalogueEntry, FeatureSet, Layout
from epalm.store.stage import Stage

STAGES = ("hash", "read", "decode", "encode", "write")
HASH_PIECE = 4096  # media hashed between two saves of the catalogue
POLL_SECONDS = 0.5  # between looks at shards that other processes are making


@dataclass
class Report:
    """What one extraction did.

    Attributes:
        features: the set that now holds the dataset's features.
        encoded: rows (views of media) encoded by this call; 0 when all were there.
        found: rows that were there before, or that another process made meanwhile.
        failed: reason by id of media without features.
        removed: ids that the catalogue knows, and whose files are gone.
        seconds: spent in each stage; read and decode run beside encode.
        total_seconds: wall time of the whole call.
    """

    features: FeatureSet
    encoded: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    total_seconds: float = 0.0


def extract(recipe: Recipe, dataset: Dataset, retry_failed: bool = False) -> Report:
    """Encode every media of the dataset that its feature set does not hold yet.

    Safe to interrupt and to repeat: whole shards stay, the rest is done at the next call.

    Args:
        recipe: what to make.
        dataset: whose media.
        retry_failed: try media again that stand in the failure ledger.

    Raises:
        EpalmError: weights that cannot be used, or bad media. These are written to the set's
            ledger, and all others are encoded first; `data.bad_media: skip` accepts them.
    """
    start = time.perf_counter()
    spec = describe(recipe)
    layout = Layout(recipe.store.backend, recipe.store.shard_rows, recipe.encoder.weights)
    features = FeatureSet.create(Path(recipe.store.root), spec, layout)
    report = Report(features)
    entries = _hash_all(dataset, features, report)
    media_of = {entry.content_hash: dataset.media[m] for m, entry in entries.items()}
    training = {e.media for e in dataset.split("train")}
    augmented = [e.content_hash for m, e in entries.items() if m in training]
    wanted = _wanted_rows(recipe, features, list(media_of), dict.fromkeys(augmented))
    todo: list[_Todo] = []
    for column, rows in wanted.items():
        writer = ColumnWriter(column)
        _mend(writer)
        report.found += sum(row in column for row in rows)
        if not retry_failed:
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
    if report.failed and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message(report.failed, features))
    return report


def bad_media_message(failed: dict[str, str], features: FeatureSet) -> str:
    """What to tell a user whose recipe does not accept bad media."""
    first = [f"  {media}: {reason}" for media, reason in list(failed.items())[:5]]
    more = [f"  and {len(failed) - 5} more"] if len(failed) > 5 else []
    return "\n".join(
        [f"data: {len(failed)} media have no features (ledger: {features.ledger})"]
        + first
        + more
        + [
            "mend these files, or leave them out with --set data.bad_media=skip (a file that could "
            "not be decoded is tried again when it changes, or with `extract --retry-failed`)"
        ]
    )


def _hash_all(dataset: Dataset, features: FeatureSet, report: Report) -> dict[str, CatalogueEntry]:
    """Content hash of every media file; one whose size and time did not change is not read."""
    start = time.perf_counter()
    before = features.catalogue(dataset.name)
    entries: dict[str, CatalogueEntry] = {}
    found = Catalogue(str(dataset.root))

    def look(media: Media) -> CatalogueEntry | OSError:
        try:
            stat = media.path.stat()
            if not S_ISREG(stat.st_mode):  # reading a pipe or a device may never end
                raise OSError(errno.EINVAL, "not a file")
            known = before.media.get(media.id)
            if known is not None and known[1:] == (stat.st_size, stat.st_mtime_ns):
                return known
            with media.path.open("rb") as stream:
                content_hash = hashlib.file_digest(stream, "sha256").hexdigest()
            return CatalogueEntry(content_hash, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            return error

    everything = list(dataset.media.values())
    with (
        ThreadPoolExecutor(4, thread_name_prefix="hash") as pool,
        tqdm(total=len(everything), desc="hash", unit="media", leave=False) as bar,
    ):
        for begin in range(0, len(everything), HASH_PIECE):
            piece = everything[begin : begin + HASH_PIECE]
            for media, result in zip(piece, pool.map(look, piece), strict=True):
                if isinstance(result, CatalogueEntry):
                    entries[media.id] = found.media[media.id] = result
                else:
                    reason = f"cannot be read: {result.strerror}"
                    failure = Failure(media.id, reason, type(result).__name__)
                    found.unreadable[media.id] = failure
            if _is_news(found, before):
                features.add_to_catalogue(dataset.name, found)
            bar.update(len(piece))
    report.failed.update({m: failure.reason for m, failure in found.unreadable.items()})
    others = before.media.keys() - dataset.media.keys()
    report.removed = sorted(m for m in others if not (dataset.root / m).exists())
    report.seconds["hash"] = time.perf_counter() - start
    return entries


def _is_news(found: Catalogue, before: Catalogue) -> bool:
    """A read-only set that knows all media is not written to."""
    return (
        found.root != before.root
        or not found.media.items() <= before.media.items()
        or not found.unreadable.items() <= before.unreadable.items()
    )


def _mend(writer: ColumnWriter) -> None:
    """Truncated or missing shards are made again, in their places."""
    if damaged := writer.column.damaged:
        tqdm.write(f"{writer.column.folder}: {len(damaged)} damaged shards are made again")
        writer.plan_again(damaged)


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
    workers = config.workers or min(os.cpu_count() or 1, 8)
    with (
        DecodePool(encoder.preprocess, workers, config.decode_timeout, config.batch_size) as pool,
        tqdm(total=sum(sum(t.pending.values()) for t in todo), desc="extract", unit="media") as bar,
    ):
        for writer, rows, pending in todo:
            shards = _Shards(recipe, media_of, encoder, pool, writer, report, bar)
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


class _Shards:
    """Makes planned shards of one column."""

    def __init__(
        self,
        recipe: Recipe,
        media_of: dict[str, Media],
        encoder: Encoder,
        pool: DecodePool,
        writer: ColumnWriter,
        report: Report,
        bar: "tqdm[Any]",
    ):
        self.batch_size, self.seed = recipe.encoder.batch_size, recipe.encoder.views.seed
        self.media_of, self.encoder, self.pool = media_of, encoder, pool
        self.writer, self.report, self.bar = writer, report, bar

    def make(self, pending: dict[int, int]) -> dict[int, int]:
        """Make those that nobody else is making; returns what others still have in hand."""
        others: list[int] = []
        with ExitStack() as held:
            for claim, begin, batch in self._decoded(pending, others, held):
                if begin == 0:
                    rows = np.zeros(
                        (len(claim.plan.hashes), *self.writer.column.row_shape), np.float32
                    )
                    failed: dict[str, Failure] = {}
                self._encode(claim, begin, batch, rows, failed)
                self.bar.update(len(batch.outcomes))
                if begin + len(batch.outcomes) == len(rows):
                    self._write(claim, rows, failed)
        left = {n: pending[n] for n in others if not self.writer.is_made(n)}
        by_others = sum(pending[n] for n in others if n not in left)
        self.bar.update(by_others)
        self.report.found += by_others
        return left

    def _decoded(
        self, pending: Iterable[int], others: list[int], held: ExitStack
    ) -> Iterator[tuple[Claim, int, Batch]]:
        """Claimed shards batch by batch, the next being decoded while this one is encoded."""
        ahead: tuple[Claim, int, Batch] | None = None
        for number in pending:
            claim = self.writer.claim(number)
            if claim is None:
                others.append(number)
                continue
            held.enter_context(claim.stream)
            plan = claim.plan
            for begin in range(0, len(plan.hashes), self.batch_size):
                tasks = [
                    Task(self.media_of[h].path, h, view_seed(self.seed, h, plan.view))
                    for h in plan.hashes[begin : begin + self.batch_size]
                ]
                following = (claim, begin, self.pool.submit(tasks))
                if ahead is not None:
                    yield ahead
                ahead = following
        if ahead is not None:
            yield ahead

    def _encode(
        self,
        claim: Claim,
        begin: int,
        batch: Batch,
        rows: NDArray[np.float32],
        failed: dict[str, Failure],
    ) -> None:
        clock = self.report.seconds
        good: list[int] = []
        for position, future in enumerate(batch.outcomes):
            outcome = future.result()
            clock["read"] += outcome.read_seconds
            clock["decode"] += outcome.decode_seconds
            content_hash = claim.plan.hashes[begin + position]
            if outcome.error is None:
                good.append(position)
            elif outcome.error[0] == "ChangedFile":
                raise EpalmError(f"{outcome.error[1]}; run `extract` again")
            else:
                kind, text = outcome.error
                media = self.media_of[content_hash]
                failed[content_hash] = Failure(media.id, f"cannot be decoded: {text}", kind)
        if not good:
            return
        start = time.perf_counter()
        inputs = batch.inputs if len(good) == len(batch.outcomes) else batch.inputs[good]
        layers = self.writer.column.column.layers
        features = self.encoder.encode(inputs, layers).numpy()
        for position, row in zip(good, features, strict=True):
            if np.isfinite(row).all():
                rows[begin + position] = row
            else:
                content_hash = claim.plan.hashes[begin + position]
                reason = "its features are not finite; a wider encoder.dtype may help"
                media = self.media_of[content_hash]
                failed[content_hash] = Failure(media.id, reason, "FloatingPointError")
        clock["encode"] += time.perf_counter() - start

    def _write(self, claim: Claim, rows: NDArray[np.float32], failed: dict[str, Failure]) -> None:
        start = time.perf_counter()
        marker = self.writer.write(claim.plan, rows, failed)
        claim.stream.close()
        self.report.encoded += len(rows) - len(failed)
        self.report.seconds["write"] += time.perf_counter() - start
        if marker.dtype != self.writer.column.spec.dtype:
            tqdm.write(
                f"{self.writer.column.folder}: shard {marker.shard} holds values beyond "
                f"{self.writer.column.spec.dtype}, it is stored as {marker.dtype}"
            )
