"""Where a training's time goes, over all its starts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from epalm.store.stage import Stage
from epalm.train.run import Run


class Clock:
    """Wall time since this start by activity; `record` adds it to what the run had before."""

    def __init__(self, run: Run):
        self.run, self.before = run, run.stages()
        self.spent = {"data": 0.0, "step": 0.0, "validate": 0.0}

    @contextmanager
    def running(self, activity: str) -> Iterator[None]:
        """Count the time inside the block."""
        start = time.perf_counter()
        yield
        self.spent[activity] += time.perf_counter() - start

    def record(self, examples: int) -> None:
        """Write the stages `train` and `validate`; `examples` is the run's count so far."""
        training = self._total("train", self.spent["data"] + self.spent["step"])
        self.run.add_stage("train", Stage(training, f"{examples / training:.1f} examples/s"))
        if self.spent["validate"]:
            self.run.add_stage(
                "validate", Stage(self._total("validate", self.spent["validate"]), "")
            )

    def _total(self, stage: str, now: float) -> float:
        return round(now + (self.before[stage].seconds if stage in self.before else 0.0), 2)
