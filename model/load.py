"""Loading the frozen LM and its tokenizer from an address."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from epalm.address import cache_dir, digest, resolve
from epalm.config import LMConfig, TextConfig
from epalm.device import choose_dtype
from epalm.errors import EpalmError


def load_lm(config: LMConfig, device: torch.device) -> PreTrainedModel:
    """The LM in evaluation mode on the device; EpalmError when it cannot be had."""
    folder = _folder(config.weights)
    dtype = choose_dtype(config.dtype, device)
    logging.disable_progress_bar()
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",  # our masks are boolean, eager attention would add them
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise EpalmError(_not_loadable(config.weights, folder, error)) from None
    return lm.to(device).eval()


def load_tokenizer(lm: LMConfig, text: TextConfig, vocabulary_rows: int) -> PreTrainedTokenizerBase:
    """The LM's tokenizer with the recipe's special tokens, padding on the left.

    Raises:
        EpalmError: none there, no end token, or special tokens beyond the LM's embedding rows.
    """
    folder = _folder(lm.weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EpalmError(_not_loadable(lm.weights, folder, error)) from None
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


def _folder(address: str) -> Path:
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
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"lm.weights: {address}: {path} cannot be loaded as a causal LM with tokenizer: {reason}"
