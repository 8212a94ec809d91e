"""Several runs in one pass: one frozen LM, and the trained parts of each run.

The rows of all runs stand in one batch, each run's together. What is trained touches its own run's
rows only: a run's connection makes the tokens of its media, its prompt stands before them, and its
adapters see its rows. So the loss of one run has no gradient in the parts of another, and the sum
of their losses gives each run the gradient that it would have alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import NamedTuple

import torch
from torch import nn

from epalm.device import send
from epalm.model.adapters import Adapter, Adapters, attached
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Features
from epalm.model.prefix import Prefix, Rows


class SharedFeatures(NamedTuple):
    """The features of a batch of several runs.

    Attributes:
        of: of each run.
        rows: whose the batch's rows are.
    """

    of: list[Features]
    rows: Rows


class SharedLM(AugmentedLM):
    """Runs of one variant on one LM; `trained` holds the trained parts of each.

    Its `states` and `_prefix` take the features of several runs alone; `states` is the one way in.

    Args:
        models: of the runs, all with the same LM and with the causal mask.
    """

    def __init__(self, models: Sequence[AugmentedLM]):
        first = models[0]
        super().__init__(first.lm, first.plan, first.trained["connection"])
        self.prompt_length = first.prompt_length
        self.trained = nn.ModuleDict({str(i): model.trained for i, model in enumerate(models)})
        self._models = tuple(models)  # in a tuple they are no part of this module

    # of several runs' features, where AugmentedLM's takes those of one
    def _prefix(  # type: ignore[override]
        self, features: SharedFeatures, rows: torch.Tensor | None = None
    ) -> Prefix:
        pairs = zip(self._models, features.of, strict=True)
        tokens = torch.cat([model.perceptual_tokens(own) for model, own in pairs])
        prompts = torch.stack([model.prompts() for model in self._models], dim=1)
        return Prefix(
            self.plan,
            tokens,
            prompts,
            _owners(features.rows.media, self.device),
            _owners(features.rows.different, self.device),
            features.rows,
        )

    def _adapted(self, layers: range, counts: Sequence[int] | None) -> AbstractContextManager[None]:
        """Within it, these layers have all runs' adapters, each for so many states."""
        if "adapters" not in self._models[0].trained:
            return nullcontext()
        assert counts is not None
        own: list[Adapters] = [model.trained["adapters"] for model in self._models]
        return attached(
            self.family,
            layers,
            _side_by_side([adapters.attention for adapters in own], counts),
            _side_by_side([adapters.feed_forward for adapters in own], counts),
        )


class _SideBySide(nn.Module):
    """Adapters of several runs at one place, each for its own states: so many of the first run, of
    the second, and so on, then of the first again."""

    def __init__(self, adapters: Sequence[Adapter], counts: Sequence[int]):
        super().__init__()
        self.adapters, self.counts = adapters, list(counts)
        self.sequential = adapters[0].sequential

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        parts = states.flatten(0, -2).split(self.counts)
        pairs = zip(cycle(self.adapters), parts, strict=False)
        return torch.cat([adapter(own) for adapter, own in pairs]).view_as(states)


def _side_by_side(adapters: Sequence[nn.ModuleDict], counts: Sequence[int]) -> nn.ModuleDict:
    """By layer, the adapters of all runs."""
    return nn.ModuleDict(
        {layer: _SideBySide([own[layer] for own in adapters], counts) for layer in adapters[0]}
    )


def _owners(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Which run each row is of."""
    return send(torch.repeat_interleave(torch.tensor(rows)), device)
