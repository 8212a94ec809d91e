"""Several runs in one pass: one frozen LM, and the trained parts of each run.

The rows of all runs stand in one batch, each run's together. What is trained touches its own run's
rows only: a run's connection makes the tokens of its media, its prompt stands before them, and its
adapters see its rows. So the loss of one run has no gradient in the parts of another, and the sum
of their losses gives each run the gradient that it would have alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from epalm.device import send
from epalm.model.adapters import Adapter, Adapters, attached
from epalm.model.augmented import AugmentedLM
from epalm.model.cache import PrefixCache
from epalm.model.connection import Features
from epalm.model.prefix import Prefix, Rows
from epalm.model.text import Equal


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
    def states(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: SharedFeatures,
        rows: torch.Tensor,
        equal: Equal,
        text_states: torch.Tensor | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """As AugmentedLM's, of all runs' texts; no two runs' texts count as equal."""
        cache = self.perceive(features, rows)
        cache.rows = features.rows
        cache.owner = _owners(features.rows.different, self.device)
        return self.extend(cache, input_ids, attention_mask, False, equal, text_states, last)

    # as `states`
    def _prefix(  # type: ignore[override]
        self, features: SharedFeatures, rows: torch.Tensor | None = None
    ) -> Prefix:
        pairs = zip(self._models, features.of, strict=True)
        tokens = torch.cat([model.perceptual_tokens(own) for model, own in pairs])
        prompts = torch.stack([model.prompts() for model in self._models], dim=1)
        owner = _owners(features.rows.media, self.device)
        return Prefix(self.plan, tokens, prompts, owner, features.rows)

    def _run(
        self,
        layers: range,
        hidden: torch.Tensor,
        call: dict[str, Any],
        cache: PrefixCache | None,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        below = layers.stop <= self.plan.start
        if prefix is not None:
            assert prefix.rows is not None
            rows = [1] * len(self._models) if below else prefix.rows.media
        else:
            assert cache is not None and cache.rows is not None
            rows = cache.rows.different if below else cache.rows.texts
        with self._side_by_side(layers, rows):
            return super()._run(layers, hidden, call, cache, prefix)

    def _side_by_side(self, layers: range, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Within it, these layers have all runs' adapters, each for so many rows."""
        if "adapters" not in self._models[0].trained:
            return nullcontext()
        own: list[Adapters] = [model.trained["adapters"] for model in self._models]
        return attached(
            self.family,
            layers,
            _side_by_side([adapters.attention for adapters in own], rows),
            _side_by_side([adapters.feed_forward for adapters in own], rows),
        )


class _SideBySide(nn.Module):
    """Adapters of several runs at one place, each for its own rows."""

    def __init__(self, adapters: Sequence[Adapter], rows: Sequence[int]):
        super().__init__()
        self.adapters, self.rows = adapters, list(rows)
        self.sequential = adapters[0].sequential

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        length = len(states) // sum(self.rows)  # of a row, where it is laid flat (OPT does)
        parts = states.split([rows * length for rows in self.rows])
        pairs = zip(self.adapters, parts, strict=True)
        return torch.cat([adapter(own) for adapter, own in pairs])


def _side_by_side(adapters: Sequence[nn.ModuleDict], rows: Sequence[int]) -> nn.ModuleDict:
    """By layer, the adapters of all runs."""
    return nn.ModuleDict(
        {layer: _SideBySide([own[layer] for own in adapters], rows) for layer in adapters[0]}
    )


def _owners(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Which run each row is of."""
    return send(torch.repeat_interleave(torch.tensor(rows)), device)
