"""Checkpoints: trained weights, and what resuming needs, as safetensors; never pickle.

`best.safetensors` holds `trained.*` alone, every trained parameter once. `last.safetensors` holds
AdamW's moments too (`exp_avg.*`, `exp_avg_sq.*`), with step and best score in the file's metadata.
There is a seal, too: safetensors would not notice a bit that has changed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.weights import put_weights, trained_weights
from epalm.store.atomic import write_atomic
from epalm.train.progress import Progress, read_sealed, unreadable

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
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # one key: safetensors writes several in random order, and equal states must be equal files
    note = json.dumps({**vars(progress), "seal": _seal(plain, progress)})
    write_atomic(path, save(plain, {"progress": note}))


def _seal(tensors: Mapping[str, torch.Tensor], progress: Progress) -> str:
    """SHA-256 of all that a checkpoint holds."""
    digest = hashlib.sha256(json.dumps(vars(progress)).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # as bytes, since NumPy knows no bfloat16
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    if not path.is_file():
        raise EpalmError(f"{path}: no such checkpoint; run `train` first")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    progress, seal = read_sealed(path)
    if seal is not None and seal != _seal(tensors, progress):
        raise unreadable(path, "it is not as it was written")
    return tensors, progress
