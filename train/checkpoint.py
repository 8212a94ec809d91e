"""Checkpoints: trained weights, and what resuming needs, as safetensors; never pickle.

`best.safetensors` holds `trained.*` alone, every trained parameter once. `last.safetensors` holds
AdamW's moments too (`exp_avg.*`, `exp_avg_sq.*`), with step and best score in the file's metadata.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.store.atomic import write_atomic

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimiser steps done.
        best_score, best_step: of the best validation so far; -1: none yet.
    """

    step: int = 0
    best_score: float = -1.0
    best_step: int = -1


def save_weights(path: Path, model: AugmentedLM, progress: Progress) -> None:
    """Write the trained weights alone."""
    _write(path, _weights(model), progress)


def save_state(
    path: Path, model: AugmentedLM, optimiser: torch.optim.AdamW, progress: Progress
) -> None:
    """Write trained weights and optimiser state."""
    tensors = _weights(model)
    for name, parameter in model.trained.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
    _write(path, tensors, progress)


def load_weights(path: Path, model: AugmentedLM) -> Progress:
    """Put a checkpoint's trained weights into the model.

    Raises:
        EpalmError: no such file, unreadable, or of another variant.
    """
    tensors, progress = _read(path)
    _put_weights(path, tensors, model)
    return progress


def load_state(path: Path, model: AugmentedLM, optimiser: torch.optim.AdamW) -> Progress:
    """Put back what `save_state` wrote; errors as in `load_weights`."""
    tensors, progress = _read(path)
    _put_weights(path, tensors, model)
    try:
        for name, parameter in model.trained.named_parameters():
            state = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS}
            optimiser.state[parameter] = {"step": torch.tensor(float(progress.step)), **state}
    except KeyError as error:
        raise EpalmError(f"{path}: holds no optimiser state ({error}); cannot resume") from None
    return progress


def _put_weights(path: Path, tensors: dict[str, torch.Tensor], model: AugmentedLM) -> None:
    weights = {
        k.removeprefix("trained."): v for k, v in tensors.items() if k.startswith("trained.")
    }
    wanted = dict(model.trained.named_parameters())  # tied weights of a trained LM once
    for name in sorted(wanted.keys() ^ weights.keys()):
        state = "is missing" if name in wanted else "has no place"
        raise EpalmError(f"{path}: does not fit the recipe's variant: {name} {state}")
    try:
        model.trained.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise EpalmError(f"{path}: does not fit the recipe's variant: {error}") from None


def _weights(model: AugmentedLM) -> dict[str, torch.Tensor]:
    return {f"trained.{name}": value for name, value in model.trained.named_parameters()}


def _write(path: Path, tensors: dict[str, torch.Tensor], progress: Progress) -> None:
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    # one key: safetensors writes several in random order, and equal states must be equal files
    write_atomic(path, save(contiguous, {"progress": json.dumps(vars(progress))}))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    if not path.is_file():
        raise EpalmError(f"{path}: no such checkpoint; run `train` first")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EpalmError(f"{path}: not a readable checkpoint ({error})") from None
    return tensors, progress
