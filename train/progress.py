"""How far a training is, as its checkpoints say."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from epalm.config import TrainConfig
from epalm.errors import EpalmError
from epalm.store.atomic import NUMBER, Kinds, wrong_field

_KINDS: Kinds = {"step": int, "best_score": NUMBER, "best_step": int, "stale": int}


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
    """How far the training was when it wrote this checkpoint; errors as below."""
    return read_sealed(path)[0]


def read_sealed(path: Path) -> tuple[Progress, str | None]:
    """The same with the checkpoint's seal, which an earlier version did not give it.

    Raises:
        EpalmError: it cannot be read.
    """
    try:
        with safe_open(path, "np") as file:  # the weights are not wanted
            tree = json.loads(file.metadata()["progress"])
        if wrong := wrong_field(tree, _KINDS, {"seal": str}):
            raise ValueError(wrong)
        seal = tree.pop("seal", None)
        return Progress(**tree), seal
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: object) -> EpalmError:
    return EpalmError(
        f"{path}: not a readable checkpoint ({error}); restore it, or train again with --overwrite"
    )
