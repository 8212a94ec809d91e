"""What stands before the text, and at which layer it gets there."""

from dataclasses import dataclass

import torch

from epalm.model.injection import InjectionPlan


@dataclass(frozen=True)
class Prefix:
    """Perceptual tokens of M media and the prompt.

    Attributes:
        plan: at which layers perceptual tokens are put in place.
        tokens: (M, n, t, H) perceptual tokens.
        prompts: (1, P, H) the prompt entering layer 0; with deep prompts (L, P, H), one a layer.
    """

    plan: InjectionPlan
    tokens: torch.Tensor
    prompts: torch.Tensor

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What enters a layer: the states before it, with what is new here put in place.

        Args:
            hidden: (M or 1, S, H) [perceptual tokens, from the first injection layer on | prompt |
                text]; at layer 0 with its prompt.
        """
        source = self.plan.source[layer]
        own_prompt = layer > 0 and len(self.prompts) > 1
        if source is None and not own_prompt:
            return hidden
        width = self.tokens.shape[2] if layer > self.plan.start else 0
        front, rest = hidden[:, :width], hidden[:, width:]
        if own_prompt:
            prompt = self.prompts[layer].expand(len(rest), -1, -1)
            rest = torch.cat((prompt, rest[:, self.prompts.shape[1] :]), dim=1)
        if source is not None:
            front = self.tokens[:, source]
            rest = rest.expand(len(front), -1, -1)
        return torch.cat((front, rest), dim=1)
