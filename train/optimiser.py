"""AdamW and its learning rates (paper, appendices A and D; conventions 24 and 25)."""

import math
from typing import Any, NamedTuple

import torch

from epalm.config import TrainConfig
from epalm.model.augmented import AugmentedLM

STAIR = 100  # optimiser steps that each rate of the official warm-up lasts
STAIRS = 4


class Rates(NamedTuple):
    """Learning rates of the connections; of prompts and adapters; of LM and encoder if trained.

    `peak` is the connections' highest, which the official caption scripts never leave.
    """

    connection: float
    prompt: float
    lm: float
    encoder: float
    peak: float


_RATE_OF = {
    "connection": "connection",
    "soft_prompt": "prompt",
    "deep_prompt": "prompt",
    "adapters": "prompt",
    "lm": "lm",
    "encoder": "encoder",
}


def make_optimiser(model: AugmentedLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for each trained part; `rate` says which of the rates is its.

    With the schedule `official-caption`, two groups as bug 4 makes them: biases and whatever else
    has one dimension follow the schedule without weight decay, the rest stays at the peak.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(module.parameters()), "rate": _RATE_OF[name]}
        for name, module in model.trained.items()
    ]
    if config.schedule == "official-caption":
        named = list(model.trained.named_parameters())
        is_bias = [p.ndim <= 1 or name.endswith("bias") for name, p in named]
        biases = [p for (_, p), bias in zip(named, is_bias, strict=True) if bias]
        others = [p for (_, p), bias in zip(named, is_bias, strict=True) if not bias]
        groups = [
            {"params": biases, "rate": "connection", "weight_decay": 0.0},
            {"params": others, "rate": "peak"},
        ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=model.device.type in ("cpu", "cuda"),
    )


def learning_rates(step: int, config: TrainConfig) -> Rates:
    """The rates at a step, from 0.

    The connections' is that of the recipe's schedule. The others follow the same curve up to their
    own peaks; prompts and adapters may stay constant.
    """
    rate = _cosine(step, config) if config.schedule == "cosine" else _official(step, config)
    share = rate / config.lr
    prompt = config.lr if config.prompt_lr is None else config.prompt_lr
    lm = config.lr if config.lm_lr is None else config.lm_lr
    encoder = config.lr if config.encoder_lr is None else config.encoder_lr
    constant = config.prompt_schedule == "constant"
    prompt = prompt if constant else prompt * share
    return Rates(rate, prompt, lm * share, encoder * share, config.lr)


def _cosine(step: int, config: TrainConfig) -> float:
    """Linear warm-up from `warmup_lr` to `lr`, then a cosine that ends at `min_lr`."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    return _wave((step - warmup) / max(config.steps - 1 - warmup, 1), config)


def _official(step: int, config: TrainConfig) -> float:
    """The official code's (convention 25): a stair in the first epoch, then a cosine over epochs.

    The stair has the peak from step 401 on; an epoch that is shorter leaves it half-way
    (bug 28). Later epochs have one rate each.
    """
    assert config.epochs is not None  # the recipe is checked for it
    epoch = step * config.epochs // config.steps
    if epoch:
        return _wave(epoch / config.epochs, config)
    climbed = min(max(step - 1, 0) // STAIR, STAIRS) / STAIRS
    return config.warmup_lr + (config.lr - config.warmup_lr) * climbed


def _wave(progress: float, config: TrainConfig) -> float:
    """Half a cosine wave from `lr` at progress 0 to `min_lr` at 1."""
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimiser: torch.optim.AdamW, step: int, config: TrainConfig) -> None:
    """Give all groups their rate for this step."""
    rates = learning_rates(step, config)
    for group in optimiser.param_groups:
        group["lr"] = getattr(rates, group["rate"])
