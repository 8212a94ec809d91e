"""AdamW in two groups, and their learning rates (paper, appendix A; conventions 24 and 25)."""

import math

import torch

from epalm.config import TrainConfig
from epalm.model.augmented import AugmentedLM


def make_optimiser(model: AugmentedLM, config: TrainConfig) -> torch.optim.AdamW:
    """Group 0: connections; group 1, where there is one: the soft prompt."""
    groups = [{"params": list(module.parameters())} for module in model.trained.values()]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def learning_rates(step: int, config: TrainConfig) -> tuple[float, float]:
    """Rates of connections and soft prompt at a step, from 0.

    Linear warm-up from `warmup_lr` to `lr`, then a cosine that reaches `min_lr` at the last step.
    The soft prompt follows the same curve up to its own peak, or stays constant.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        rate = config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    else:
        progress = (step - warmup) / max(config.steps - 1 - warmup, 1)
        half_wave = 0.5 * (1 + math.cos(math.pi * progress))
        rate = config.min_lr + (config.lr - config.min_lr) * half_wave
    peak = config.lr if config.prompt_lr is None else config.prompt_lr
    return rate, peak if config.prompt_schedule == "constant" else peak * rate / config.lr


def set_learning_rates(optimiser: torch.optim.AdamW, step: int, config: TrainConfig) -> None:
    """Give both groups their rate for this step."""
    for group, rate in zip(optimiser.param_groups, learning_rates(step, config), strict=False):
        group["lr"] = rate
