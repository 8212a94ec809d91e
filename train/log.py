"""What a training writes and shows as it goes: metric lines, TensorBoard, a bar."""

import json
from contextlib import ExitStack
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from epalm.store.atomic import naming_file
from epalm.store.listing import words_for_bytes
from epalm.train.run import Run


class Log:
    """The run's metrics from step `first` on; what was logged after it is forgotten.

    Args:
        enabled: False in all processes but the main one, where nothing is written or shown.
    """

    def __init__(self, run: Run, first: int, enabled: bool):
        self.run, self.first, self.enabled = run, first, enabled
        self._open = ExitStack()
        self._told = False

    def __enter__(self) -> "Log":
        if self.enabled:
            self.run.truncate_metrics(self.first)
        self.bar = self._open.enter_context(
            tqdm(
                total=self.run.recipe.train.steps,
                initial=self.first,
                desc="train",
                unit="step",
                disable=not self.enabled,
            )
        )
        if self.enabled:
            self._metrics = self._open.enter_context(self.run.metrics.open("a", encoding="utf-8"))
            folder = str(self.run.folder / "tensorboard")
            self._board = self._open.enter_context(SummaryWriter(folder, purge_step=self.first + 1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, step: int, line: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same for TensorBoard."""
        if not self.enabled:
            return
        with naming_file(self.run.metrics):
            self._metrics.write(json.dumps({"step": step, **line}) + "\n")
            self._metrics.flush()
        for name, value in line.items():
            self._board.add_scalar(name, value, step)

    def show(self, line: dict[str, float]) -> None:
        """What is new, behind the bar."""
        self.bar.set_postfix_str(
            f"loss={line['loss']:.3f}, {line['examples_per_second']:.0f} examples/s, "
            f"{line['tokens_per_second']:.0f} tokens/s, wait {line['data_wait_share']:.0%}, "
            f"pad {line['padding_share']:.0%}, {words_for_bytes(int(line['peak_memory_bytes']))}"
        )
        if "encode_share" in line and not self._told:
            self._told = True
            forward = "forward alone" if self.run.recipe.encoder.train else "encoder.online"
            self.say(f"encoding took {line['encode_share']:.0%} of this time ({forward})")

    def say(self, words: str) -> None:
        """A line above the bar."""
        if self.enabled:
            tqdm.write(words)
