"""Hugging Face folders of encoders: configuration, feature extractor, weights."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.activations import ACT2FN
from transformers.utils import logging

from epalm.errors import EpalmError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What such a folder's weights are called."""

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "num_frames",
    "patch_size",
    "frequency_stride",
    "time_stride",
    "max_length",
    "num_mel_bins",
)


def hf_config(kind: Any, folder: Path) -> Any:
    """A configuration of this class from a folder's config.json.

    Raises:
        EpalmError: there is none, or it is another kind of model's.
    """
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.get("model_type") != kind.model_type:
            raise EpalmError(
                f"encoder.weights: {file} is of a {fields.get('model_type')!r} model, but this "
                f"encoder.kind needs {kind.model_type!r}"
            )
        return kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise EpalmError(f"encoder.weights: {file} cannot be read ({reason})") from None


def check_config(config: Any) -> None:
    """EpalmError for sizes below 1, or an activation that there is none of.

    A configuration checks its types alone, and the model fails at the rest. The numbers may be of
    `encoder.arch` or of config.json; the former replace the latter.
    """
    for name in _SIZES:
        size = getattr(config, name, 1)
        if size < 1:
            raise EpalmError(f"encoder.arch: {name} is {size}; it must be 1 or more")
    if config.hidden_act not in ACT2FN:
        raise EpalmError(
            f"encoder.arch: hidden_act is {config.hidden_act!r}, not one of {', '.join(ACT2FN)}"
        )


def hf_extractor(kind: Any, folder: Path, **changes: Any) -> Any:
    """A feature extractor of this class from a folder's preprocessor_config.json."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **changes)
    except (OSError, ValueError, TypeError) as error:
        raise EpalmError(
            f"encoder.weights: {folder} holds no preprocessor_config.json that says what the model "
            f"is shown ({first_line(error)}); add the one that belongs to the weights"
        ) from None


def hf_model(kind: Any, folder: Path, config: Any, part: str = "") -> Any:
    """A model of this class from a folder, in float32.

    Hugging Face's loading fills gaps with random numbers and goes on; here that is an error.

    Args:
        part: only weights whose name begins so must be there.
    """
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the classifier, which we do not want, as a problem
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError) as error:
        reason = first_line(error)
        raise EpalmError(f"encoder.weights: {folder} cannot be loaded: {reason}") from None
    finally:
        logging.set_verbosity(before)
    missing = sorted(name for name in report["missing_keys"] if name.startswith(part))
    wrong = sorted(name for name, *_ in report["mismatched_keys"] if name.startswith(part))
    if missing or wrong:
        raise EpalmError(
            f"encoder.weights: {folder} does not fit its config.json: "
            f"{len(missing)} weights are missing, {len(wrong)} have another shape, among them "
            f"{(missing + wrong)[0]}"
        )
    return model
