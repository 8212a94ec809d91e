"""AdamW and its learning rates (paper, appendices A and D; conventions 24 and 25)."""

import math
from typing import NamedTuple

import torch

from epalm.config import TrainConfig
from epalm.model.augmented import AugmentedLM


class Rates(NamedTuple):
    """Learning rates of the connections; of prompts and adapters; of the LM where it is trained."""

    connection: float
    prompt: float
    lm: float


_RATE_OF = {
    "connection": "connection",
    "soft_prompt": "prompt",
    "deep_prompt": "prompt",
    "adapters": "prompt",
    "lm": "lm",
}


def make_optimiser(model: AugmentedLM, config: TrainConfig) -> torch.optim.AdamW:
    """One group for each trained part; `rate` says which of the rates is its."""
    groups = [
        {"params": list(module.parameters()), "rate": _RATE_OF[name]}
        for name, module in model.trained.items()
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def learning_rates(step: int, config: TrainConfig) -> Rates:
    """The rates at a step, from 0.

    Linear warm-up from `warmup_lr` to `lr`, then a cosine that reaches `min_lr` at the last step.
    The others follow the same curve up to their own peaks; prompts and adapters may stay constant.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        rate = config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    else:
        progress = (step - warmup) / max(config.steps - 1 - warmup, 1)
        half_wave = 0.5 * (1 + math.cos(math.pi * progress))
        rate = config.min_lr + (config.lr - config.min_lr) * half_wave
    share = rate / config.lr
    prompt = config.lr if config.prompt_lr is None else config.prompt_lr
    lm = config.lr if config.lm_lr is None else config.lm_lr
    constant = config.prompt_schedule == "constant"
    return Rates(rate, prompt if constant else prompt * share, lm * share)


def set_learning_rates(optimiser: torch.optim.AdamW, step: int, config: TrainConfig) -> None:
    """Give all groups their rate for this step."""
    rates = learning_rates(step, config)
    for group in optimiser.param_groups:
        group["lr"] = getattr(rates, group["rate"])
