"""What stands before the text, and at which layer it gets there."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from epalm.model.injection import InjectionPlan


class Rows(NamedTuple):
    """How many rows of a batch each of R runs has, run after run.

    Attributes:
        media: M_r.
        different: U_r, texts that differ.
        texts: B_r.
    """

    media: list[int]
    different: list[int]
    texts: list[int]


class New(NamedTuple):
    """States that take the place of others.

    Attributes:
        first: at which place of the prefix.
        states: (M, k, H); up to the first injection layer (R, k, H).
    """

    first: int
    states: torch.Tensor


@dataclass(frozen=True)
class Prefix:
    """Perceptual tokens of M media and the prompt, or prompts of R runs that share a pass.

    Attributes:
        plan: at which layers perceptual tokens are put in place.
        tokens: (M, n, t, H) perceptual tokens.
        prompts: (1, R, P, H) the prompt entering layer 0; with deep prompts (L, R, P, H), one a
            layer.
        owner: (M,) which of the R each media's is; None: R = 1.
        of_text: (U,) which of the R each different text has; None: R = 1.
        rows: of these runs; None: R = 1.
    """

    plan: InjectionPlan
    tokens: torch.Tensor
    prompts: torch.Tensor
    owner: torch.Tensor | None = None
    of_text: torch.Tensor | None = None
    rows: Rows | None = None

    @property
    def length(self) -> int:
        """t + P."""
        return self.tokens.shape[2] + self.prompts.shape[2]

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What enters a layer: the states before it, with what is new here put in place.

        Args:
            hidden: (M, S, H) [perceptual tokens, from the first injection layer on | prompt |
                text]; at layer 0 with its prompt. (R, S, H) up to the first injection layer, where
                there is no text.
        """
        if layer == self.plan.start:
            return self._enter_first(hidden)
        new = self.new(layer)
        if new is None:
            return hidden
        states = new.states.expand(len(hidden), -1, -1)
        after = new.first + states.shape[1]
        return torch.cat((hidden[:, : new.first], states, hidden[:, after:]), dim=1)

    def new(self, layer: int) -> New | None:
        """What is put in place in a layer, but for the first injection layer, where all places move
        on; None: nothing is."""
        parts, source = [], self.plan.source[layer]
        if source is not None:
            parts.append(self.tokens[:, source])
        if self._has_prompt_of(layer):
            parts.append(self._prompt(layer))
        if not parts:
            return None
        behind_tokens = layer > self.plan.start and source is None
        first = self.tokens.shape[2] if behind_tokens else 0
        return New(first, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def _enter_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """`enter` at the first injection layer: tokens, before what there was."""
        start = self.plan.start
        rest = hidden if self.owner is None else hidden[self.owner]
        tokens = self.tokens[:, self.plan.source[start]]
        rest = rest.expand(len(tokens), -1, -1)
        if self._has_prompt_of(start):
            prompt = self._prompt(start)
            rest = torch.cat((prompt, rest[:, prompt.shape[1] :]), dim=1)
        return torch.cat((tokens, rest), dim=1)

    def _has_prompt_of(self, layer: int) -> bool:
        """A prompt of its own, that is."""
        return layer > 0 and len(self.prompts) > 1

    def _prompt(self, layer: int) -> torch.Tensor:
        """(R, P, H) of a layer; from the first injection layer on, of each media (M, P, H)."""
        prompt = self.prompts[layer]
        if layer < self.plan.start:
            return prompt
        if self.owner is not None:
            return prompt[self.owner]
        return prompt.expand(len(self.tokens), -1, -1)

    def states_of_runs(self, layer: int, prefix: int, text: int) -> list[int] | None:
        """How many states each run has in a layer: in its prefixes, run after run, then in its
        texts; None where there is one run.

        Args:
            prefix: length of a prefix there, or 0 where none is run.
            text: length of a text, likewise.
        """
        if self.rows is None:
            return None
        below = layer < self.plan.start
        prefixes = [1] * len(self.rows.media) if below else self.rows.media
        texts = self.rows.different if below else self.rows.texts
        return [n * prefix for n in prefixes] + [n * text for n in texts]
