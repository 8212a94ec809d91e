"""The extraction loop: hash, then read, decode, encode and write, one shard at a time.

A shard's media are fixed before it begins and encoded in the same batches each time, so that a
shard redone after an interruption holds the same bytes.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset, Media
from epalm.data.grouping import chunks
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.encoder import Encoder, build, describe
from epalm.store.feature_set import CatalogueEntry, FeatureSet, FeatureSetWriter, Layout
from epalm.store.stage import Stage

STAGES = ("hash", "read", "decode", "encode", "write")

Job = tuple[str, Media]  # content hash and one of the media that have it


@dataclass
class Report:
    """What one extraction did.

    Attributes:
        features: the set that now holds the dataset's features.
        encoded: number of media encoded by this call; 0 when all were there.
        found: number of distinct media that were there before.
        failed: reason by id of media without features.
        seconds: spent in each stage; read and decode run beside encode.
        total_seconds: wall time of the whole call.
    """

    features: FeatureSet
    encoded: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    total_seconds: float = 0.0


def extract(recipe: Recipe, dataset: Dataset) -> Report:
    """Encode every media of the dataset that its feature set does not hold yet.

    Safe to interrupt and to repeat: whole shards stay, the rest is done at the next call.

    Raises:
        EpalmError: weights that cannot be used, or bad media. These are written to the set's
            ledger, and all others are encoded first; `data.bad_media: skip` accepts them.
    """
    start = time.perf_counter()
    spec = describe(recipe)
    layout = Layout(recipe.store.backend, recipe.store.shard_rows, recipe.encoder.weights)
    features = FeatureSet.create(Path(recipe.store.root), spec, layout)
    report = Report(features)
    with features.writing() as writer:
        if dropped := writer.drop_damaged():
            tqdm.write(f"{features.folder}: {dropped} damaged shards are extracted again")
        entries = _hash_all(dataset, writer, report)
        jobs = {entry.content_hash: dataset.media[m] for m, entry in entries.items()}
        known_bad = {f["hash"]: f["reason"] for f in features.failures() if f["hash"]}
        todo = [job for job in jobs.items() if job[0] not in features and job[0] not in known_bad]
        report.found = sum(h in features for h in jobs)
        if todo:
            encoder = build(recipe, choose_device(recipe.device))
            known_bad |= _encode_all(recipe, dataset.name, encoder, writer, todo, report)
        report.total_seconds = time.perf_counter() - start
        rate = f"{report.encoded / report.total_seconds:.1f} media/s"
        if not report.encoded:
            rate = f"skipped, {report.found} media found in the store"
        writer.record_extraction(Stage(round(report.total_seconds, 2), rate))
    for media, entry in entries.items():
        if entry.content_hash not in features:
            report.failed[media] = known_bad[entry.content_hash]
    if report.failed and recipe.data.bad_media == "stop":
        raise EpalmError(bad_media_message(report.failed, features))
    return report


def bad_media_message(failed: dict[str, str], features: FeatureSet) -> str:
    """What to tell a user whose recipe does not accept bad media."""
    first = [f"  {media}: {reason}" for media, reason in list(failed.items())[:5]]
    more = [f"  and {len(failed) - 5} more"] if len(failed) > 5 else []
    return "\n".join(
        [f"data: {len(failed)} media have no features (ledger: {features.folder}/failures.jsonl)"]
        + first
        + more
        + [
            "mend these files, or leave them out with --set data.bad_media=skip (a file that could "
            "not be decoded is tried again when it changes, or when the ledger is deleted)"
        ]
    )


def _hash_all(
    dataset: Dataset, writer: FeatureSetWriter, report: Report
) -> dict[str, CatalogueEntry]:
    """Content hash of every media file; one whose size and time did not change is not read."""
    start = time.perf_counter()
    before = writer.features.catalogue(dataset.name)
    entries: dict[str, CatalogueEntry] = {}
    for media in tqdm(dataset.media.values(), "hash", unit="media", leave=False):
        try:
            stat = media.path.stat()
            known = before.get(media.id)
            if known is None or known[1:] != (stat.st_size, stat.st_mtime_ns):
                content_hash = hashlib.sha256(media.path.read_bytes()).hexdigest()
                known = CatalogueEntry(content_hash, stat.st_size, stat.st_mtime_ns)
            entries[media.id] = known
        except OSError as error:
            reason = f"cannot be read: {error.strerror} ({media.path})"
            report.failed[media.id] = reason
            writer.record_failure(dataset.name, media.id, "", reason, type(error).__name__)
    writer.catalogue(dataset.name, entries)
    report.seconds["hash"] = time.perf_counter() - start
    return entries


def _encode_all(
    recipe: Recipe,
    dataset: str,
    encoder: Encoder,
    writer: FeatureSetWriter,
    todo: list[Job],
    report: Report,
) -> dict[str, str]:
    """Fill shards with all of `todo`; returns the reason by content hash of those that failed."""
    failed: dict[str, str] = {}
    clock = report.seconds
    with (
        ThreadPoolExecutor(max_workers=2) as pool,
        tqdm(total=len(todo), desc="extract", unit="media") as bar,
    ):
        shards = list(chunks(todo, writer.features.layout.shard_rows))
        batches = (batch for shard in shards for batch in chunks(shard, recipe.encoder.batch_size))
        decoded = _decode_ahead(pool, encoder, batches, clock)
        for shard in shards:
            rows = np.zeros((len(shard), *writer.features.row_shape), np.float32)
            valid = np.zeros(len(shard), bool)
            for begin in range(0, len(shard), recipe.encoder.batch_size):
                inputs = next(decoded)
                good = [i for i, result in enumerate(inputs) if isinstance(result, torch.Tensor)]
                for i, result in enumerate(inputs):
                    if isinstance(result, Exception):
                        content_hash, media = shard[begin + i]
                        failed[content_hash] = f"cannot be decoded: {result} ({media.path})"
                        writer.record_failure(
                            dataset, media.id, content_hash, failed[content_hash],
                            type(result).__name__,
                        )  # fmt: skip
                if good:
                    start = time.perf_counter()
                    places = begin + np.array(good)
                    rows[places] = encoder.encode(torch.stack([inputs[i] for i in good])).numpy()
                    valid[places] = True
                    clock["encode"] += time.perf_counter() - start
                bar.update(len(inputs))
            start = time.perf_counter()
            writer.append([content_hash for content_hash, _ in shard], rows, valid)
            clock["write"] += time.perf_counter() - start
            report.encoded += int(valid.sum())
    return failed


def _decode_ahead(
    pool: ThreadPoolExecutor,
    encoder: Encoder,
    batches: Iterable[Sequence[Job]],
    clock: dict[str, float],
) -> Iterator[list[torch.Tensor | Exception]]:
    """Encoder inputs batch by batch, the next batch being decoded while this one is encoded."""

    def load(job: Job) -> torch.Tensor | Exception:
        content_hash, media = job
        start = time.perf_counter()
        content = media.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != content_hash:
            raise EpalmError(f"{media.path}: changed while it was extracted; run `extract` again")
        read = time.perf_counter()
        clock["read"] += read - start
        try:
            return encoder.preprocess(content)
        except Exception as error:  # whatever a broken file does to its decoder
            return error
        finally:
            clock["decode"] += time.perf_counter() - read

    ahead: list[Future[torch.Tensor | Exception]] | None = None
    for batch in batches:
        following = [pool.submit(load, job) for job in batch]
        if ahead is not None:
            yield [future.result() for future in ahead]
        ahead = following
    if ahead is not None:
        yield [future.result() for future in ahead]
