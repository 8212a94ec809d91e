"""The connection C of the paper's equation 1: linear, from encoder width D to LM width H."""

import torch
from torch import nn


class Connection(nn.Module):
    """One linear layer per perceptual token (eP-ALM), or one for all of them (_lin, _pt).

    Weights and biases have torch's default initialisation, without norm or activation
    (convention 4). All its parameters are trained.
    """

    def __init__(self, tokens: int, dim: int, hidden: int, shared: bool):
        super().__init__()
        self.tokens = tokens
        self.linears = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(1 if shared else tokens))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(M, n, D) features, of any number format, to (M, n, H) perceptual tokens."""
        features = features.to(self.linears[0].weight.dtype)
        if len(self.linears) == 1:
            return self.linears[0](features)
        return torch.stack([linear(features[:, i]) for i, linear in enumerate(self.linears)], dim=1)
