"""The connection C of the paper's equation 1: linear, from encoder width D to LM width H."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.functional import normalize

from epalm.device import send

Features: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor]
"""(M, n, [t,] D) of M media; of several sources (M_s, n, [t,] D_s) by name, M media in all, those
of a source together."""


class Connection(nn.Module):
    """One linear layer per level, n of them (eP-ALM), or one for all of them (_lin, _pt).

    Weights and biases have torch's default initialisation, without norm or activation
    (convention 4). All its parameters are trained.

    Two options of DePALM (arXiv 2403.13499), off in the paper: `norm` gives every token this
    length, and `affine` multiplies each of its H components by a trained scale and adds a trained
    bias, both per level, after the norm; they start as 1 and 0.
    """

    def __init__(
        self,
        levels: int,
        dim: int,
        hidden: int,
        shared: bool,
        norm: float | None = None,
        affine: bool = False,
    ):
        super().__init__()
        self.levels = levels
        self.linears = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(1 if shared else levels))
        self.norm = norm
        self.scale = nn.Parameter(torch.ones(levels, 1, hidden)) if affine else None
        self.bias = nn.Parameter(torch.zeros(levels, 1, hidden)) if affine else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(M, n, t, D) features, of any number format, to (M, n, t, H) perceptual tokens.

        (M, n, D) is read as t = 1.
        """
        if features.ndim == 3:
            features = features[:, :, None]
        features = features.to(self.linears[0].weight.dtype)
        if len(self.linears) == 1:
            tokens = self.linears[0](features)
        else:
            levels = [linear(features[:, i]) for i, linear in enumerate(self.linears)]
            tokens = torch.stack(levels, dim=1)
        if self.norm is not None:
            tokens = normalize(tokens, dim=-1) * self.norm
        if self.scale is not None:
            tokens = tokens * self.scale + self.bias
        return tokens


class Connections(nn.Module):
    """A connection for each of several sources, all with as many levels."""

    def __init__(self, of: Mapping[str, Connection]):
        super().__init__()
        self.of = nn.ModuleDict(of)
        self.levels = next(iter(of.values())).levels

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(M_s, n, [t,] D_s) features by source to (M, n, t, H), source after source."""
        return torch.cat([self.of[name](own) for name, own in features.items()])


def tokens_of(features: Features) -> int:
    """t, the perceptual tokens of a media and level."""
    some = features if isinstance(features, torch.Tensor) else next(iter(features.values()))
    return some.shape[2] if some.ndim == 4 else 1


def media_of(features: Features) -> int:
    """M."""
    if isinstance(features, torch.Tensor):
        return len(features)
    return sum(len(own) for own in features.values())


def to_device(features: Features, device: torch.device) -> Features:
    """The features on a device, as `send` brings them there."""
    if isinstance(features, torch.Tensor):
        return send(features, device)
    return {name: send(own, device) for name, own in features.items()}
