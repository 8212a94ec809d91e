"""Making planned shards: claim, decode, encode, write."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.grouping import chunks
from epalm.data.media import Media
from epalm.errors import EpalmError
from epalm.extract.encoder import Encoder
from epalm.extract.report import Report
from epalm.extract.views import view_seed
from epalm.extract.workers import Batch, DecodePool, Task
from epalm.store.marker import Failure
from epalm.store.publisher import Publisher
from epalm.store.writer import Claim, ColumnWriter


class ShardMaker:
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
        with ExitStack() as held, Publisher(self.writer) as publisher:
            for claim, begin, batch in self._decoded(pending, others, held):
                if begin == 0:
                    rows = np.zeros(
                        (len(claim.plan.hashes), *self.writer.column.row_shape), np.float32
                    )
                    failed: dict[str, Failure] = {}
                self._encode(claim, begin, batch, rows, failed)
                self.bar.update(len(batch.outcomes))
                if begin + len(batch.outcomes) == len(rows):
                    self._write(publisher, claim, rows, failed)
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
            if not self.media_of.keys() >= set(plan.hashes):
                # of another dataset, and whoever was making it died: its rows are planned anew
                self.writer.give_up(claim)
                others.append(number)
                continue
            begin = 0
            for hashes in chunks(plan.hashes, self.batch_size):
                tasks = [
                    Task(self.media_of[h], h, view_seed(self.seed, h, plan.view)) for h in hashes
                ]
                following = (claim, begin, self.pool.submit(tasks))
                begin += len(hashes)
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
                self.report.features.distrust(content_hash)
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

    def _write(
        self,
        publisher: Publisher,
        claim: Claim,
        rows: NDArray[np.float32],
        failed: dict[str, Failure],
    ) -> None:
        start = time.perf_counter()
        marker = publisher.write(claim, rows, failed)
        self.report.encoded += len(rows) - len(failed)
        self.report.seconds["write"] += time.perf_counter() - start
        if marker.dtype != self.writer.column.spec.dtype:
            tqdm.write(
                f"{self.writer.column.folder}: shard {marker.shard} holds values beyond "
                f"{self.writer.column.spec.dtype}, it is stored as {marker.dtype}"
            )
