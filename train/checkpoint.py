"""Checkpoints: trained weights, and what resuming needs, as safetensors; never pickle.

`best.safetensors` holds `trained.*` alone, every trained parameter once. `last.safetensors` holds
AdamW's moments too (`exp_avg.*`, `exp_avg_sq.*`), with step and best score in the file's metadata.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.weights import put_weights, trained_weights
from epalm.store.atomic import write_atomic
from epalm.train.progress import Progress, read_progress, unreadable

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_weights(path: Path, model: AugmentedLM, progress: Progress) -> None:
    """Write the trained weights alone."""
    _write(path, trained_weights(model.trained), progress)


def save_state(
    path: Path, model: AugmentedLM, optimiser: torch.optim.AdamW, progress: Progress
) -> None:
    """Write trained weights and optimiser state."""
    tensors = trained_weights(model.trained)
    for name, parameter in model.trained.named_parameters():
        if parameter in optimiser.state:  # else the loss does not depend on it
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
    _write(path, tensors, progress)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's trained weights, as `trained_weights` names them; errors as below."""
    tensors, _ = _read(path)
    return {name: value for name, value in tensors.items() if not name.startswith(MOMENTS)}


def load_weights(path: Path, model: AugmentedLM) -> Progress:
    """Put a checkpoint's trained weights into the model.

    Raises:
        EpalmError: no such file, unreadable, or of another variant.
    """
    tensors, progress = _read(path)
    put_weights(model.trained, tensors, str(path))
    return progress


def load_state(path: Path, model: AugmentedLM, optimiser: torch.optim.AdamW) -> Progress:
    """Put back what `save_state` wrote; errors as in `load_weights`."""
    tensors, progress = _read(path)
    put_weights(model.trained, tensors, str(path))
    for name, parameter in model.trained.named_parameters():
        keys = {moment: f"{moment}.{name}" for moment in MOMENTS}
        if set(keys.values()) <= tensors.keys():
            state = {moment: tensors[key].to(parameter.device) for moment, key in keys.items()}
            # on the device, as fused AdamW has it
            steps = torch.tensor(float(progress.step), device=parameter.device)
            optimiser.state[parameter] = {"step": steps, **state}
    if not optimiser.state:
        raise EpalmError(f"{path}: holds no optimiser state; cannot resume")
    return progress


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
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    return tensors, read_progress(path)
