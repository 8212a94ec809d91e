"""Loading the frozen LM and its tokenizer from an address."""

import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from epalm.address import cache_dir, digest, resolve
from epalm.config import LMConfig, TextConfig
from epalm.device import choose_dtype
from epalm.errors import EpalmError, first_line
from epalm.model.families import check_family
from epalm.model.spread import check_room


def load_lm(config: LMConfig, device: torch.device, trained: bool = False) -> PreTrainedModel:
    """The LM in evaluation mode on the device; EpalmError when it cannot be had.

    Args:
        trained: it will be trained, or has been: `auto` is float32 then.
    """
    folder = model_folder(config.weights)
    check_family(load_lm_config(config.weights).model_type)  # before all weights are read
    logging.disable_progress_bar()
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=lm_dtype(config, device, trained),
            attn_implementation="sdpa",  # whatever its config.json asks for: ours takes its place
            local_files_only=True,
            device_map=config.device_map,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise EpalmError(_not_loadable(config.weights, folder, error)) from None
    if config.device_map is None:
        return lm.to(device).eval()
    check_room(lm)
    return lm.eval()


def lm_dtype(config: LMConfig, device: torch.device, trained: bool) -> torch.dtype:
    """Number format of the LM on the device; `trained` as in `load_lm`."""
    return choose_dtype("float32" if trained and config.dtype == "auto" else config.dtype, device)


def load_tokenizer(address: str, text: TextConfig, vocabulary_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer at an address, with the recipe's special tokens, padding on the left.

    Args:
        address: of the LM, or of a folder with its tokenizer alone.

    Raises:
        EpalmError: none there, no end token, or special tokens beyond the LM's embedding rows.
    """
    folder = model_folder(address)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EpalmError(_not_loadable(address, folder, error)) from None
    if tokenizer.eos_token_id is None:
        raise EpalmError(f"lm.weights: the tokenizer in {folder} has no end-of-text token")
    if text.special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(text.special_tokens)})
    if len(tokenizer) > vocabulary_rows:
        raise EpalmError(
            f"text.special_tokens: {len(tokenizer)} tokens, but the LM has {vocabulary_rows} "
            "embedding rows and none are added to it; use fewer special tokens"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked; any id serves
    tokenizer.padding_side = "left"
    return tokenizer


def load_lm_config(address: str) -> PreTrainedConfig:
    """What the LM is made of, without its weights; EpalmError when it cannot be had."""
    folder = model_folder(address)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EpalmError(_not_loadable(address, folder, error)) from None


def lm_without_weights(address: str) -> PreTrainedModel:
    """The LM on the device `meta`, which knows shapes alone; EpalmError when it cannot be had."""
    config = load_lm_config(address)
    check_family(config.model_type)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except ValueError as error:  # an encoder's configuration, say
        raise EpalmError(_not_loadable(address, resolve(address), error)) from None


def lm_digest(address: str) -> str:
    """SHA-256 over the LM's configuration and weights, of those files that would be loaded.

    Raises:
        EpalmError: they cannot be had.
    """
    found = resolve(address)
    if found.is_file():
        return digest(found)
    weights = sorted(found.glob("*.safetensors")) or sorted(found.glob("*.bin"))
    files = [*found.glob("config.json"), *weights]
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()


def model_folder(address: str) -> Path:
    """A folder in Hugging Face's format for the address."""
    found = resolve(address)
    if found.suffix == ".gguf":
        return _converted(found)
    if not found.is_dir():
        raise EpalmError(f"lm.weights: {found} is neither a model folder nor a .gguf file")
    return found


def _converted(gguf: Path) -> Path:
    """The folder with a GGUF file's weights in float32, made once: reading GGUF is slow."""
    target = cache_dir() / "converted" / digest(gguf)[:16]
    if target.is_dir():
        return target
    logging.disable_progress_bar()
    partial = target.with_name(f"{target.name}-{os.getpid()}")
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        lm.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EpalmError(_not_loadable(str(gguf), gguf, error)) from None
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)
        if not target.is_dir():  # else another process was faster
            raise
    return target


def _not_loadable(address: str, path: Path, error: Exception) -> str:
    return (
        f"lm.weights: {address}: {path} cannot be loaded as a causal LM with tokenizer: "
        f"{first_line(error)}"
    )
