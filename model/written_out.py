"""Attention written out as matrix products, for a CPU.

Our sequences are short. There, torch's fused kernel takes ten times as long in bfloat16, most of it
for the backward pass, and no less in float32 (at a hundred tokens, a fifth less). And it keeps the
prefix once for each text.

Shapes: B rows of Q queries and K keys; h heads of width d; keys and values may have fewer heads,
each for several of the queries' in a row.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from epalm.model.packing import Packing


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(B, h, Q, d) to (B, Q, h, d); `mask` (B or 1, 1, Q, K) is added to the scores."""
    weights = _weights(query, key, mask, scaling)
    return _weighted(weights, value).transpose(1, 2)


class PackedAttention(torch.autograd.Function):
    """The same of prefixes and texts in one sequence: (1, h, N, d) to (1, N, h, d).

    For the backward pass it keeps what it is given, and the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packing: Packing,
        scaling: float,
    ) -> torch.Tensor:
        (q, q_text), (k, k_text), (v, v_text) = map(packing.heads, (query, key, value))
        weights = _weights(q, k, packing.prefix_mask, scaling)
        of_text = _weights(q_text, packing.after_prefix(k, k_text), packing.text_mask, scaling)
        ctx.save_for_backward(query, key, value, weights, of_text)
        ctx.packing, ctx.scaling = packing, scaling
        out = _weighted(weights, v), _weighted(of_text, packing.after_prefix(v, v_text))
        return _joined(*out, packing).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        *states, weights, of_text = ctx.saved_tensors
        packing, length = ctx.packing, weights.shape[2]
        (q, q_text), (k, k_text), (v, v_text) = map(packing.heads, states)
        g, g_text = packing.heads(gradient.transpose(1, 2))
        prefix = _gradients(g, q, k, v, weights, ctx.scaling)
        k_text, v_text = packing.after_prefix(k, k_text), packing.after_prefix(v, v_text)
        text = _gradients(g_text, q_text, k_text, v_text, of_text, ctx.scaling)
        for own, seen in zip(prefix[1:], text[1:], strict=True):
            own += packing.sum_over_texts(seen[:, :, :length])
        return (
            _joined(prefix[0], text[0], packing),
            _joined(prefix[1], text[1][:, :, length:], packing),
            _joined(prefix[2], text[2][:, :, length:], packing),
            None,
            None,
        )


def _joined(prefix: torch.Tensor, text: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Undoes `Packing.heads`: (1, h, N, d), with each state's heads side by side in memory."""
    count = sum(states.shape[0] * states.shape[2] for states in (prefix, text))
    joined = text.new_empty(1, count, text.shape[1], text.shape[3]).transpose(1, 2)
    for part, states in zip(packing.heads(joined), (prefix, text), strict=True):
        part.copy_(states)
    return joined


def _weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(B, h, Q, K); softmax at least in float32, as Hugging Face has it."""
    scores = _by_key_head(query, key) @ key.transpose(2, 3)
    scores = scores.view(*query.shape[:3], key.shape[2])
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.add(mask, scores, alpha=scaling).softmax(dim=3, dtype=wide).to(query.dtype)


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, h, Q, K) and values (B, key heads, K, d) to (B, h, Q, d)."""
    return (_by_key_head(weights, value) @ value).view(*weights.shape[:3], value.shape[3])


def _gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of query, key and value, from that of what `_weighted` gave."""
    by_head, weights_by_head = _by_key_head(gradient, key), _by_key_head(weights, key)
    of_value = weights_by_head.transpose(2, 3) @ by_head
    wide = torch.promote_types(query.dtype, torch.float32)
    of_weights, seen = (by_head @ value.transpose(2, 3)).to(wide), weights_by_head.to(wide)
    mean = (of_weights * seen).sum(dim=3, keepdim=True)
    of_scores = (of_weights - mean).mul_(seen).mul_(scaling).to(query.dtype)
    of_query = (of_scores @ key).view_as(query)
    return of_query, of_scores.transpose(2, 3) @ _by_key_head(query, key), of_value


def _by_key_head(states: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, h, Q, …) to (B, key heads, h / key heads * Q, …): what meets the same keys together."""
    rows, heads, queries, width = states.shape
    return states.reshape(rows, key.shape[1], heads // key.shape[1] * queries, width)
