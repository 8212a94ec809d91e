"""How far a training is, as its checkpoints say."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from epalm.config import TrainConfig
from epalm.errors import EpalmError


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimiser steps done.
        best_score, best_step: of the best validation so far; -1: none yet.
        stale: validations since then.
    """

    step: int = 0
    best_score: float = -1.0
    best_step: int = -1
    stale: int = 0

    def is_impatient(self, config: TrainConfig) -> bool:
        """So many validations in a row were not better than the best before."""
        return config.patience is not None and self.stale >= config.patience

    def is_over(self, config: TrainConfig) -> bool:
        """The recipe's training has nothing left to do."""
        return self.step >= config.steps or self.is_impatient(config)


def read_progress(path: Path) -> Progress:
    """How far the training was when it wrote this checkpoint.

    Raises:
        EpalmError: it cannot be read.
    """
    try:
        with safe_open(path, "np") as file:  # the weights are not wanted
            return Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> EpalmError:
    return EpalmError(
        f"{path}: not a readable checkpoint ({error}); delete it and run `train` again"
    )
