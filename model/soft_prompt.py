"""Soft prompt: trained tokens before the text (paper, section 3.1 and appendix A)."""

import torch
from torch import nn


class SoftPrompt(nn.Module):
    """`length` tokens of the LM's word-embedding width E, optionally behind an MLP.

    N(0, 1) embedding; the MLP is Linear, tanh, Linear, all of width E (convention 5). All its
    parameters are trained.
    """

    def __init__(self, length: int, width: int, mlp: bool):
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.mlp = (
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            if mlp
            else nn.Identity()
        )

    def forward(self) -> torch.Tensor:
        """The prompt (P, E)."""
        return self.mlp(self.embedding.weight)
