"""Attention masks over [perceptual token | prompt | text]; True: may be seen."""

import torch


def text_mask(prefix: int, text: torch.Tensor, queries: int) -> torch.Tensor:
    """Mask of the last `queries` text tokens, over the prefix and all text: (B, 1, Q, prefix + T).

    Args:
        prefix: number of prefix states; all of them are seen.
        text: (B, T) 1 for real tokens, 0 for pads.
        queries: Q, at most T.
    """
    rows, length = text.shape
    place = torch.arange(length, device=text.device)
    causal = place[None, :] <= place[length - queries :, None]
    seen = causal & text.bool()[:, None, :]
    seen = torch.cat((seen.new_ones(rows, queries, prefix), seen), dim=2)
    return _see_something(seen, prefix + length - queries)[:, None]


def prefix_mask(length: int, device: torch.device) -> torch.Tensor:
    """Causal mask among prefix states: (1, 1, length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def joint_mask(prompt: int, text: torch.Tensor, tokens: int, token_sees_all: bool) -> torch.Tensor:
    """Mask of the whole sequence run at once: (B, 1, S, S), S = tokens + prompt + T.

    `token_sees_all` is the reference's mask: the perceptual tokens, which come first, see
    everything, later text and the pads after it included (convention 7, bug 2). Pads on the left,
    which the reference never has, they do not see: no text depends on its batch.
    """
    rows = text.shape[0]
    before = tokens + prompt
    keys = torch.cat((text.new_ones(rows, before), text), dim=1).bool()
    size = keys.shape[1]
    seen = prefix_mask(size, text.device)[0] & keys[:, None, :]
    seen = _see_something(seen, 0)
    if token_sees_all:
        begun = text.cumsum(dim=1) > 0
        seen[:, :tokens, before:] = begun[:, None, :]
        seen[:, :tokens, :before] = True
    return seen[:, None]


def added_to_scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds to its scores: 0 where a mask lets see, else minus infinity."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _see_something(seen: torch.Tensor, offset: int) -> torch.Tensor:
    """Let a query that sees nothing (a pad on the left) see itself: softmax needs one key."""
    queries = seen.shape[1]
    itself = torch.zeros_like(seen[0])
    index = torch.arange(queries, device=seen.device)
    itself[index, index + offset] = True
    return seen | (~seen.any(dim=2, keepdim=True) & itself)
