"""Publishing shards beside the work on the next ones.

Flushing a shard to disk takes as long as making its bytes, and needs no processor. A thread does it
while the next shard is written, and takes all that wait at once.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epalm.store.marker import Failure, Marker
from epalm.store.writer import Claim, ColumnWriter, DraftShard

MOST_WAITING = 4
"""Shards that are written and not yet published, at most; they take no memory of ours."""


class _Written(NamedTuple):
    claim: Claim
    shard: DraftShard


class Publisher:
    """Writes claimed shards, publishes them in a thread, and ends their claims; use it in a `with`.

    Leaving waits until all is published, also after an error: what was written is kept. An error of
    the thread is raised by the next `write`, or on leaving; shards that it could not publish stay
    planned and claimed. The column does not know of the shards before `Column.refresh`.
    """

    def __init__(self, writer: ColumnWriter):
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._written: SimpleQueue[_Written] = SimpleQueue()
        self._under_way: deque[Future[None]] = deque()  # one for each shard written

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._wait(0)

    def write(self, claim: Claim, rows: NDArray[np.float32], failed: dict[str, Failure]) -> Marker:
        """Write a claimed shard, as `ColumnWriter.write` does; its marker is there a little later.

        Waits while many are written and not yet published.
        """
        self._wait(MOST_WAITING - 1)
        shard = self._writer.draft(claim.plan, rows, failed)
        self._written.put(_Written(claim, shard))
        self._under_way.append(self._thread.submit(self._publish))
        return shard.marker

    def _wait(self, left: int) -> None:
        """Until no more than `left` are under way; raises what went wrong with those done."""
        while self._under_way and (len(self._under_way) > left or self._under_way[0].done()):
            self._under_way.popleft().result()

    def _publish(self) -> None:
        """All that wait; nothing where an earlier call took them."""
        waiting: list[_Written] = []
        with suppress(Empty):
            while True:
                waiting.append(self._written.get_nowait())
        self._writer.publish([written.shard for written in waiting])
        for written in waiting:
            written.claim.stream.close()
