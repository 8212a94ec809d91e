"""Prefixes and the texts after them in one sequence, so that a layer is called once for both."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Packing:
    """How R * S prefix states and, after them, B * T text states make one sequence of N.

    A prefix sees itself; a text sees its prefix and itself.

    Attributes:
        prefixes: R.
        texts: B, at least one.
        owner: (B,) which prefix each text follows; None: there is one.
        prefix_mask: (1, 1, S, S) as `masks.added_to_scores` gives it.
        text_mask: (B, 1, T, S + T) likewise.
    """

    prefixes: int
    texts: int
    owner: torch.Tensor | None
    prefix_mask: torch.Tensor
    text_mask: torch.Tensor

    def to(self, device: torch.device | int | str) -> "Packing":
        """On another device; accelerate calls it where the LM is spread over several."""
        text_mask = self.text_mask.to(device)
        if text_mask is self.text_mask:
            return self
        owner = None if self.owner is None else self.owner.to(device)
        prefix_mask = self.prefix_mask.to(device)
        return replace(self, owner=owner, prefix_mask=prefix_mask, text_mask=text_mask)

    def join(self, prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(R, S, …) and (B, T, …) to (1, N, …)."""
        return torch.cat((prefix.flatten(0, 1), text.flatten(0, 1)))[None]

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, …) to (R, S, …) and (B, T, …)."""
        length, queries = self.prefix_mask.shape[2], self.text_mask.shape[2]
        sizes = self.prefixes * length, self.texts * queries
        prefix, text = states[0].split(sizes)
        return (
            prefix.unflatten(0, (self.prefixes, length)),
            text.unflatten(0, (self.texts, queries)),
        )

    def put(self, states: torch.Tensor, first: int, new: torch.Tensor) -> torch.Tensor:
        """States (1, N, H) with new ones (R, k, H) in place of each prefix's from this one on."""
        length = self.prefix_mask.shape[2]
        place = torch.arange(first, first + new.shape[1], device=new.device)
        start = torch.arange(0, self.prefixes * length, length, device=new.device)
        rows = (start[:, None] + place).flatten()
        return states.index_copy(1, rows, new.flatten(0, 1)[None])

    def heads(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's states (1, h, N, d) to (R, h, S, d) and (B, h, T, d)."""
        prefix, text = self.split(states.transpose(1, 2))
        return prefix.transpose(1, 2), text.transpose(1, 2)

    def after_prefix(self, prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(R, h, S, d) and (B, h, T, d) to texts, each after its prefix: (B, h, S + T, d)."""
        return torch.cat((self._prefix_of_texts(prefix), text), dim=2)

    def _prefix_of_texts(self, states: torch.Tensor) -> torch.Tensor:
        """Of prefixes (R, …), of the prefix of each text (B, …)."""
        if self.owner is None:
            return states.expand(self.texts, *states.shape[1:])
        return states.index_select(0, self.owner)
