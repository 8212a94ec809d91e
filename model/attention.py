"""Attention of the frozen LM's layers, in place of what Hugging Face would choose for them.

It differs in what it does, not in what comes out:

- On a CPU in bfloat16 it is written out as matrix products. torch's fused kernel there takes ten
  times as long for the backward pass of sequences as short as ours.
- The prefix of a media and all texts about it may come as one sequence (`Packing`), so that every
  other part of a layer is called once for both.

Shapes: B texts of T tokens behind R prefixes of S states; h heads of width d; Q queries, K keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_NAME = "epalm"


class Packing(NamedTuple):
    """How R * S prefix states and, after them, B * T text states make one sequence (1, N, H).

    A prefix sees itself; a text sees its prefix and itself.

    Attributes:
        prefixes: R.
        texts: B, at least one.
        owner: (B,) which prefix each text follows; None: there is one.
        prefix_mask: (1, 1, S, S) True: may be seen.
        text_mask: (B, 1, T, S + T) likewise.
    """

    prefixes: int
    texts: int
    owner: torch.Tensor | None
    prefix_mask: torch.Tensor
    text_mask: torch.Tensor

    def join(self, prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(R, S, …) and (B, T, …) to (1, N, …)."""
        return torch.cat((prefix.flatten(0, 1), text.flatten(0, 1)))[None]

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, …) to (R, S, …) and (B, T, …)."""
        of_text = self.texts * self.text_mask.shape[2]
        prefix, text = states[0].split((states.shape[1] - of_text, of_text))
        lengths = self.prefix_mask.shape[2], self.text_mask.shape[2]
        return prefix.unflatten(0, (self.prefixes, lengths[0])), text.unflatten(
            0, (self.texts, lengths[1])
        )


@contextmanager
def own_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Within it, the LM's layers attend as this module says."""
    before = lm.config._attn_implementation
    lm.config._attn_implementation = _NAME
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As Hugging Face calls it: states (B, heads, Q or K, d) to (B, Q, h, d), and no weights.

    Args:
        attention_mask: (B, 1, Q, K) True: may be seen; None with a packing, which has masks.
        scaling: of the products of queries and keys; None: d ** -0.5.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is None:
        assert attention_mask is not None
        return _attend(module, query, key, value, attention_mask, factor), None
    parts = [packing.split(states.transpose(1, 2)) for states in (query, key, value)]
    (q, q_text), (k, k_text), (v, v_text) = (
        (prefix.transpose(1, 2), text.transpose(1, 2)) for prefix, text in parts
    )
    if q.shape[2]:
        prefix = _attend(module, q, k, v, packing.prefix_mask, factor)
    else:  # without a prompt, below the first injection layer
        prefix = q.transpose(1, 2)
    keys, values = (
        torch.cat((_for_texts(own, packing), text), dim=2)
        for own, text in ((k, k_text), (v, v_text))
    )
    text = _attend(module, q_text, keys, values, packing.text_mask, factor)
    return packing.join(prefix, text), None


def _for_texts(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Of prefixes (R, h, S, d), of the prefix of each text (B, h, S, d)."""
    if packing.owner is None:
        return states.expand(packing.texts, -1, -1, -1)
    return states.index_select(0, packing.owner)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """(B, h, Q, d) to (B, Q, h, d)."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        states: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, is_causal=False
        )[0]
        return states
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    scores = (query * scaling if scaling != 1 else query) @ key.transpose(2, 3) + hidden
    weights = scores.softmax(dim=3, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(_NAME, _attention)
