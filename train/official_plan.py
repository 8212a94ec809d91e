"""Where a checkpoint of the official code injects, as its config says (conventions 1 to 3)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from epalm.model.injection import InjectionPlan

_LINEAR = re.compile(r"connection\.linears\.(\d+)\.(\w+)")


class OfficialPlan(NamedTuple):
    """The plan of an LM's layers, from the last n of an encoder's.

    Attributes:
        source: of every LM layer, which of the n it takes, or None. Some of the n may never be
            taken (bug 3).
        n: encoder layers that have a connection.
        said: the config's words.
    """

    source: tuple[int | None, ...]
    n: int
    said: str

    @classmethod
    def of(cls, settings: Mapping[str, Any], lm_layers: int) -> "OfficialPlan | None":
        """Of a checkpoint's `config`; None where it does not say."""
        keys = ("start_layer_idx", "end_layer_idx", "injected_hidden_states")
        if not all(isinstance(settings.get(key), int) for key in keys):
            return None
        start, end, n = (settings[key] for key in keys)
        step = settings.get("text_step") or 1
        said = (
            f"start_layer_idx {start}, end_layer_idx {end}, injected_hidden_states {n}, text_step "
            f"{step}"
        )
        return cls(InjectionPlan.spread(lm_layers, start, end, n, step).source, n, said)

    @property
    def used(self) -> list[int]:
        """Those of the n that are taken."""
        return sorted({source for source in self.source if source is not None})

    @property
    def plan(self) -> InjectionPlan:
        """Ours, of the used ones alone."""
        used = self.used
        return InjectionPlan(tuple(None if s is None else used.index(s) for s in self.source))

    def levels(self, encoder_layers: int) -> dict[int, int]:
        """As `variant.levels`, of an encoder with so many layers."""
        first = encoder_layers - self.n
        return {layer: first + s for layer, s in enumerate(self.source) if s is not None}

    def without_unused(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained state without the connections that are never taken, the others renumbered."""
        numbers = {int(found[1]) for name in state if (found := _LINEAR.fullmatch(name))}
        if len(numbers) < self.n:  # one for all
            return dict(state)
        kept = {}
        for name, value in state.items():
            found = _LINEAR.fullmatch(name)
            if found is None:
                kept[name] = value
            elif int(found[1]) in self.used:
                kept[f"connection.linears.{self.used.index(int(found[1]))}.{found[2]}"] = value
        return kept
