"""Soft prompt: trained tokens before the text (paper, section 3.1 and appendix A)."""

import torch
from torch import nn


def make_mlp(width: int) -> nn.Module:
    """Linear, tanh, Linear, all of this width (convention 5)."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class SoftPrompt(nn.Module):
    """`length` tokens of the LM's word-embedding width E, optionally behind an MLP.

    N(0, 1) embedding. All its parameters are trained.
    """

    def __init__(self, length: int, width: int, mlp: bool):
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(length, width)
        self.mlp = make_mlp(width) if mlp else nn.Identity()

    def forward(self) -> torch.Tensor:
        """The prompt (P, E)."""
        return self.mlp(self.embedding.weight)
