"""Attention of the frozen LM's layers, in place of what Hugging Face would choose for them.

What comes out is the same. A prefix and all texts after it may come as one sequence (`Packing`),
and on a CPU attention is written out (`written_out.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from epalm.model import written_out
from epalm.model.in_use import in_use
from epalm.model.packing import Packing

WRITTEN_OUT_ON = {"cpu"}
_NAME = "epalm"


@contextmanager
def own_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Within it, the LM's layers attend as this module says.

    To say so takes a while: a pass that calls them several times says it once, around all calls.
    """
    with in_use(lm):
        before = lm.config._attn_implementation
        if before == _NAME:
            yield
            return
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
    """As Hugging Face calls it: (B, heads, Q, d) and twice (B, key heads, K, d) to
    (B, Q, heads, d), and no weights.

    Args:
        attention_mask: (B, 1, Q, K) added to the scores; None with a packing, which has masks.
        scaling: of the products of queries and keys; None: d ** -0.5.
        packing: with it, B = 1 and Q = K.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    written = query.device.type in WRITTEN_OUT_ON
    if packing is None:
        assert attention_mask is not None
        one_text = len(query) == 1 and not query.requires_grad  # to generate it, fused is faster
        if written and not one_text:
            return written_out.attention(query, key, value, attention_mask, factor), None
        return _fused(module, query, key, value, attention_mask, factor), None
    if written:
        out: torch.Tensor = written_out.PackedAttention.apply(query, key, value, packing, factor)
        return out, None
    (q, q_text), (k, k_text), (v, v_text) = map(packing.heads, (query, key, value))
    k_text, v_text = packing.after_prefix(k, k_text), packing.after_prefix(v, v_text)
    if q.shape[2]:
        prefix = _fused(module, q, k, v, packing.prefix_mask, factor)
    else:  # without a prompt, below the first injection layer
        prefix = q.transpose(1, 2)
    text = _fused(module, q_text, k_text, v_text, packing.text_mask, factor)
    return packing.join(prefix, text), None


def _fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """By torch's own kernels."""
    states: torch.Tensor = sdpa_attention_forward(
        module, query, key, value, mask, scaling=scaling, is_causal=False
    )[0]
    return states


AttentionInterface.register(_NAME, _attention)
