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
        source = self.plan.source[layer]
        own_prompt = layer > 0 and len(self.prompts) > 1
        if source is None and not own_prompt:
            return hidden
        width = self.tokens.shape[2] if layer > self.plan.start else 0
        front, rest = hidden[:, :width], hidden[:, width:]
        if own_prompt:
            prompt = self.prompts[layer]
            if self.owner is not None and layer > self.plan.start:
                prompt = prompt[self.owner]
            prompt = prompt.expand(len(rest), -1, -1)
            rest = torch.cat((prompt, rest[:, prompt.shape[1] :]), dim=1)
        if source is not None:
            front = self.tokens[:, source]
            if self.owner is not None and layer == self.plan.start:
                rest = rest[self.owner]
            rest = rest.expand(len(front), -1, -1)
        return torch.cat((front, rest), dim=1)

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
