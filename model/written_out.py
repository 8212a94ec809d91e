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

from epalm.model.blocks import Blocks, blocks_of
from epalm.model.packing import Packing

_LITTLE = 1 << 17  # numbers, by which blocks may be larger than the states in them


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(B, h, Q, d) to (B, Q, h, d); `mask` (B or 1, 1, Q, K) is added to the scores."""
    rows, heads, queries, width = query.shape
    by_key_head = query.reshape(rows, key.shape[1], heads // key.shape[1] * queries, width)
    scores = by_key_head @ key.transpose(2, 3)
    weights = _softmax(scores.view(rows, heads, queries, -1), mask, scaling).view_as(scores)
    return (weights @ value).view(rows, heads, queries, -1).transpose(1, 2)


class PackedAttention(torch.autograd.Function):
    """The same of prefixes and texts in one sequence: (1, h, N, d) to (1, N, h, d).

    For the backward pass it keeps what it is given, in blocks where these are not much larger, and
    the weights.
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
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        blocks = blocks_of(packing, query.shape[2], key.shape[2])
        queries, keys, values = blocks.queries(query), blocks.keys(key), blocks.keys(value)
        scores = queries @ keys.transpose(1, 2)
        by_head = scores.view(len(blocks.mask), -1, *blocks.mask.shape[2:])
        weights = _softmax(by_head, blocks.mask, scaling)
        if blocks.used is not None:
            weights[:, :, : blocks.used.shape[2]] *= blocks.used
        weights = weights.view_as(scores)
        pairs = (queries, query), (keys, key), (values, value)
        kept = [of if of.numel() < states.numel() + _LITTLE else states for of, states in pairs]
        ctx.save_for_backward(*kept, weights)
        ctx.blocks, ctx.scaling = blocks, scaling
        return blocks.from_queries(weights @ values)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, weights = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        queries = blocks.queries(query) if query.ndim == 4 else query
        keys, values = (blocks.keys(x) if x.ndim == 4 else x for x in (key, value))
        of_out = blocks.queries(gradient)
        of_value = blocks.from_keys(weights.transpose(1, 2) @ of_out)
        wide = _wide(weights)
        of_weights = (of_out @ values.transpose(1, 2)).to(wide)
        of_scores = torch._softmax_backward_data(of_weights, weights.to(wide), 2, wide)
        if ctx.scaling != 1:
            of_scores.mul_(ctx.scaling)
        of_scores = of_scores.to(query.dtype)
        of_query = blocks.from_queries(of_scores @ keys)
        of_key = blocks.from_keys(of_scores.transpose(1, 2) @ queries)
        of_query, of_key, of_value = (x.transpose(1, 2) for x in (of_query, of_key, of_value))
        return of_query, of_key, of_value, None, None


def _softmax(scores: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Weights (B, h, Q, K); in float32 at least, as Hugging Face has it."""
    weights = torch.add(mask, scores, alpha=scaling).softmax(dim=3, dtype=_wide(scores))
    return weights.to(scores.dtype)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
