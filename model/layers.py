"""The frozen LM's layers, and the ways in which our passes call them.

Shapes: R prefixes of S states, B texts of T tokens, H LM width; t perceptual and P prompt tokens
make a prefix of t + P, below the first injection layer of P.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from epalm.model.attention import own_attention
from epalm.model.cache import CACHE, PrefixCache
from epalm.model.families.base import LMFamily
from epalm.model.injection import InjectionPlan
from epalm.model.masks import added_to_scores, prefix_mask, text_mask
from epalm.model.packing import Packing
from epalm.model.prefix import Prefix

_MANY = 512  # tokens; for fewer, to read the weights twice costs more than a gradient too many
Adapted = Callable[[range, Sequence[int] | None], AbstractContextManager[None]]


class Layers:
    """The layers of an LM.

    Args:
        lm: whose they are; on its first device all states are expected.
        family: where they are.
        plan: where perceptual tokens enter.
        adapted: within what it gives, some layers run with their adapters; of several runs it is
            told `Prefix.states_of_runs`.

    Attributes:
        lower: those below the first injection layer.
        upper: the others, but for the last.
        last: the last alone. There, nothing but keys and values is wanted of a state that no token
            is predicted from.
        injected: `upper` and `last`.
    """

    def __init__(
        self, lm: PreTrainedModel, family: LMFamily, plan: InjectionPlan, adapted: Adapted
    ):
        count = len(plan.source)
        self.lower = range(plan.start)
        self.upper = range(plan.start, count - 1)
        self.last = range(count - 1, count)
        self.injected = range(plan.start, count)
        self._lm, self._family, self._plan, self._adapted = lm, family, plan, adapted

    def run(
        self,
        layers: range,
        hidden: torch.Tensor,
        call: dict[str, Any],
        cache: PrefixCache | None,
        enter: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        counts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Some layers, one after the other; the only place where they are called.

        Args:
            layers: some in a row.
            hidden: (B, S, H) entering the first of them.
            call: their keyword arguments.
            cache: grows in every layer; None: there is none.
            enter: what enters a layer, of its number and what left the one before; None: just that.
            counts: of several runs, `Prefix.states_of_runs`.
        """
        with own_attention(self._lm), self._adapted(layers, counts):
            for index in layers:
                if enter is not None:
                    hidden = enter(index, hidden)
                hidden = self._family.layers[index](
                    hidden, use_cache=cache is not None, **{CACHE: cache}, **call
                )
        return hidden

    def on_prefix(
        self, layers: range, front: torch.Tensor, length: int, cache: PrefixCache, prefix: Prefix
    ) -> torch.Tensor:
        """Some layers on prefixes alone.

        Args:
            layers: part of `lower`, or of the others.
            front: prefixes (R, S, H) as they left the layer before.
            length: of a prefix in these layers.
            cache: what is kept of them.
        """
        places = _places(length, prefix)
        mask = prefix_mask(length, front.device)
        call = self.call(front, places, places.new_zeros((1, 0)), prefix.length, mask)
        counts = prefix.states_of_runs(layers.start, length, 0)
        return self.run(layers, front, call, cache, prefix.enter, counts)

    def keep_keys(self, front: torch.Tensor, cache: PrefixCache, prefix: Prefix) -> None:
        """The last layer on prefixes (R, S, H), as far as the texts after them need it."""
        with cache.keys_only():
            self.on_prefix(self.last, front, prefix.length, cache, prefix)

    def packed(
        self,
        layers: range,
        front: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor,
        prefix: Prefix,
        owner: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some layers on prefixes and the texts after them, in one sequence.

        Args:
            layers: `lower` or `upper`, or the rest of one.
            front: prefixes (R, S, H) as they left the layer before.
            text: (B, T, H) likewise.
            mask: (B, T) 1 for real tokens.
            owner: (B,) which prefix each text follows; None: there is one.

        Returns:
            Both as they leave the last of these layers.
        """
        if not layers:
            return front, text
        entered = prefix.enter(layers.start, front)
        if entered.requires_grad and not text.requires_grad and mask.numel() >= _MANY:
            # in one sequence, a gradient would be made for the text that nobody wants
            first, rest = layers[:1], layers[1:]
            cache = PrefixCache(prefix.tokens.shape[2], prefix.prompts.shape[2])
            front = self.on_prefix(first, front, entered.shape[1], cache, prefix)
            cache.take_later(first, mask.new_zeros(len(mask)) if owner is None else owner)
            text = self.on_text(first, text, mask, cache, prefix)
            return self.packed(rest, front, text, mask, prefix, owner)
        front = entered
        length, queries = front.shape[1], text.shape[1]
        packing = Packing(
            len(front),
            len(text),
            owner,
            added_to_scores(prefix_mask(length, text.device), text.dtype),
            added_to_scores(text_mask(length, mask, queries), text.dtype),
        )
        hidden = packing.join(front, text)
        places = _places(length, prefix).repeat(len(front))
        call = self.call(hidden, places, positions(mask).reshape(1, -1), prefix.length, None)

        def enter(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            new = prefix.new(layer) if layer > layers.start else None
            return hidden if new is None else packing.put(hidden, new.first, new.states)

        counts = prefix.states_of_runs(layers.start, length, queries)
        return packing.split(
            self.run(layers, hidden, {**call, "packing": packing}, None, enter, counts)
        )

    def on_text(
        self,
        layers: range,
        text: torch.Tensor,
        mask: torch.Tensor,
        cache: PrefixCache | None,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        """Some layers on text (B, Q, H) alone.

        Args:
            layers: part of `lower`, or of the others.
            mask: (B, T) of all text, this at its end.
            cache: what comes before, and is kept of it; None: there is nothing, nor is it kept.
            prefix: the same, where there may be several runs.
        """
        queries = text.shape[1]
        length = cache.length(layers.start < self._plan.start) if cache is not None else 0
        seen = text_mask(length, mask, queries)
        call = self._call_on_text(text, positions(mask)[:, -queries:], seen, cache)
        return self.run(layers, text, call, cache, None, _counts(prefix, layers, queries))

    def on_last(
        self,
        text: torch.Tensor,
        mask: torch.Tensor,
        wanted: int | None,
        cache: PrefixCache,
        prefix: Prefix | None = None,
    ) -> torch.Tensor:
        """The last layer on text (B, Q, H).

        Args:
            mask: (B, T) of all text, this at its end.
            wanted: only the states of the last so many tokens are: (B, wanted, H); None: all.
            cache: what comes before.
            prefix: the same, where there are several runs.
        """
        queries = text.shape[1]
        places, seen = positions(mask)[:, -queries:], text_mask(cache.length(False), mask, queries)
        first = queries - min(wanted or queries, queries)
        for start, stop in ((0, first), (first, queries)):
            if start == stop:
                continue
            part = text[:, start:stop]
            seen_by_part = seen[:, :, start:stop, : seen.shape[3] - queries + stop]
            call = self._call_on_text(part, places[:, start:stop], seen_by_part, cache)
            counts = _counts(prefix, self.last, stop - start)
            with cache.keys_only() if stop < queries else nullcontext():
                part = self.run(self.last, part, call, cache, None, counts)
        return part

    def _call_on_text(
        self,
        text: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        cache: PrefixCache | None,
    ) -> dict[str, Any]:
        length = cache.length(False) if cache is not None else 0
        return self.call(text, places.new_zeros(0), places, length, mask)

    def call(
        self,
        hidden: torch.Tensor,
        places: torch.Tensor,
        text_positions: torch.Tensor,
        length: int,
        mask: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Keyword arguments of a layer call; see `LMFamily.layer_arguments`.

        Args:
            mask: (B, 1, S, K) True: may be seen; None: it comes otherwise.
        """
        extra = self._family.layer_arguments(hidden, places, text_positions, length)
        added = None if mask is None else added_to_scores(mask, hidden.dtype)
        return {"attention_mask": added, **extra}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Place of each real token among its row's, from 0; pads have -1 (convention 6)."""
    return mask.cumsum(dim=1) * mask - 1


def _places(length: int, prefix: Prefix) -> torch.Tensor:
    """Where in [perceptual tokens | prompt] the last so many are: (length,).

    Below the first injection layer, the places of the perceptual tokens are empty.
    """
    return torch.arange(prefix.length - length, prefix.length, device=prefix.tokens.device)


def _counts(prefix: Prefix | None, layers: range, length: int) -> list[int] | None:
    """`Prefix.states_of_runs` of texts alone."""
    return None if prefix is None else prefix.states_of_runs(layers.start, 0, length)
