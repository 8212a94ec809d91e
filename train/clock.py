"""Where a training's time goes, and what it gets done in it."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from epalm.store.listing import words_for_bytes
from epalm.store.stage import Stage
from epalm.train.batches import Size
from epalm.train.run import Run
from epalm.train.stopwatch import Stopwatch


class Clock:
    """Wall time since this start by activity, and what was learnt from meanwhile.

    `lap` tells of the time since the lap before, `total` of all since the start, and `record` adds
    that to what the run had before. A GPU works while this process goes on: times are right where
    its result has just been read.

    Args:
        encoding: takes the time of the encoder, which is part of the step; None: features are
            cached.
    """

    def __init__(self, run: Run, encoding: Stopwatch | None = None):
        self.run, self.before, self._encoding = run, run.stages(), encoding
        self.spent = {"data": 0.0, "step": 0.0, "encode": 0.0, "validate": 0.0}
        self.done = {"examples": 0, "tokens": 0, "own tokens": 0, "own places": 0}
        self._lap_spent, self._lap_done = dict(self.spent), dict(self.done)

    @contextmanager
    def running(self, activity: str) -> Iterator[None]:
        """Count the time inside the block."""
        start = time.perf_counter()
        yield
        self.spent[activity] += time.perf_counter() - start

    def count_batch(self, size: Size) -> None:
        """Count a batch, of all processes together."""
        self.done["examples"] += size.examples
        self.done["tokens"] += size.tokens

    def count_piece(self, size: Size, places: int) -> None:
        """Count a piece of it that this process has padded; `places` are its tokens and pads."""
        self.done["own tokens"] += size.tokens
        self.done["own places"] += places

    def lap(self) -> dict[str, float]:
        """Rates and shares since the lap before."""
        self._look_at_encoder()
        spent = {key: self.spent[key] - self._lap_spent[key] for key in self.spent}
        done = {key: self.done[key] - self._lap_done[key] for key in self.done}
        self._lap_spent, self._lap_done = dict(self.spent), dict(self.done)
        return self._rates(spent, done)

    def total(self) -> dict[str, float]:
        """Rates and shares since the start."""
        self._look_at_encoder()
        return self._rates(self.spent, self.done)

    @property
    def training(self) -> float:
        """Seconds spent training since the start; validation is not in it."""
        return self.spent["data"] + self.spent["step"]

    def record(self, examples: int) -> None:
        """Write the stages `train` and `validate`; `examples` is the run's count so far."""
        training = self._total("train", self.training)
        self.run.add_stage("train", Stage(training, f"{examples / training:.1f} examples/s"))
        if self.spent["validate"]:
            self.run.add_stage(
                "validate", Stage(self._total("validate", self.spent["validate"]), "")
            )

    def _look_at_encoder(self) -> None:
        if self._encoding is not None:
            self.spent["encode"] += self._encoding.take()

    def _rates(self, spent: dict[str, float], done: dict[str, int]) -> dict[str, float]:
        seconds = spent["data"] + spent["step"]
        encoding = {} if self._encoding is None else {"encode_share": spent["encode"] / seconds}
        return {
            **encoding,
            "examples_per_second": done["examples"] / seconds,
            "tokens_per_second": done["tokens"] / seconds,
            "data_wait_share": spent["data"] / seconds,
            "padding_share": 1 - done["own tokens"] / done["own places"],
        }

    def _total(self, stage: str, now: float) -> float:
        return round(now + (self.before[stage].seconds if stage in self.before else 0.0), 2)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on a GPU, else resident in this process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def words_for_rates(rates: dict[str, float], memory: int) -> str:
    """One line of what `Clock` and `peak_memory` found."""
    return (
        f"{rates['examples_per_second']:.1f} examples/s, "
        f"{rates['tokens_per_second']:.0f} tokens/s, "
        f"{rates['data_wait_share']:.1%} waiting for data, "
        + (f"{rates['encode_share']:.1%} encoding, " if "encode_share" in rates else "")
        + f"{rates['padding_share']:.1%} padding, "
        f"peak memory {words_for_bytes(memory)}"
    )
