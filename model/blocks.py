"""Queries and keys of a packed sequence in blocks of one size, for batched matrix products."""

from functools import lru_cache

import torch

from epalm.model.packing import Packing


@lru_cache(maxsize=1)
def blocks_of(packing: Packing, heads: int, key_heads: int) -> "Blocks":
    """Made for the first layer of a pass; the others have the same."""
    return Blocks(packing, heads, key_heads)


class Blocks:
    """A block for each text. Its keys are those of its prefix and its own; its queries are its own
    and a share of its prefix's, which the texts of a prefix divide among them.

    So each query is answered once, and no key is looked up for a prefix and again for its texts.
    What a prefix's query finds is undefined where no text follows that prefix.

    Shapes: R prefixes of S states, B texts of T; N = R * S + B * T states in the sequence. A block
    has E queries of its prefix, Q = E + T, and K = S + T keys; h heads of width d, of keys g.

    Args:
        packing: the sequence.
        heads: h.
        key_heads: g.

    Attributes:
        mask: (B, 1, Q, K) added to the scores.
        used: (B, 1, E, 1) 1, but 0 for places that are left over where prefix's queries are shared
            out; there, weights of attention are to be 0.
    """

    def __init__(self, packing: Packing, heads: int, key_heads: int):
        device, texts = packing.text_mask.device, packing.texts
        length, tokens = packing.prefix_mask.shape[2], packing.text_mask.shape[2]
        owner = packing.owner
        if owner is None:
            owner = torch.zeros(texts, dtype=torch.long, device=device)
        counts = owner.bincount(minlength=packing.prefixes)
        shared = -(-length // int(counts[counts > 0].min()))
        by_owner, first = owner.argsort(stable=True), counts.cumsum(0) - counts
        text = torch.arange(texts, device=device)
        rank = torch.empty_like(text)  # of a text among those of its prefix
        rank[by_owner] = text - first[owner[by_owner]]

        token, state = torch.arange(tokens, device=device), torch.arange(length, device=device)
        of_prefix = rank[:, None] * shared + torch.arange(shared, device=device)
        self.used = (of_prefix < length)[:, None, :, None].to(packing.text_mask.dtype)
        of_prefix = of_prefix.clamp(max=max(length - 1, 0))
        to_text = packing.prefix_mask.new_full((length, tokens), -torch.inf)
        of_states = torch.cat((packing.prefix_mask[0, 0], to_text), dim=1)
        self.mask = torch.cat((of_states[of_prefix][:, None], packing.text_mask), dim=2)

        start = owner[:, None] * length
        own = packing.prefixes * length + text[:, None] * tokens + token
        queries = torch.cat((start + of_prefix, own), dim=1)
        keys = torch.cat((start + state, own), dim=1)
        self._query_shape = texts * key_heads, heads // key_heads * queries.shape[1]
        self._key_shape = texts, key_heads, keys.shape[1]
        self._queries, self._keys = _by_head(queries, heads), _by_head(keys, key_heads)

        # where in its block each state's query is, and each text's key
        block = by_owner[(first[:, None] + state // max(shared, 1)).clamp(max=texts - 1)]
        place = (state % max(shared, 1)).expand_as(block)
        blocks = torch.cat((block.flatten(), text.repeat_interleave(tokens)))
        places = torch.cat((place.flatten(), (shared + token).repeat(texts)))
        self._of_queries = _in_blocks(blocks, places, heads, queries.shape[1])
        own_blocks, own_places = blocks[block.numel() :], (length + token).repeat(texts)
        self._of_keys = _in_blocks(own_blocks, own_places, key_heads, keys.shape[1])
        self._packing, self._heads, self._length = packing, heads, length

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, h, d) to (B * g, h / g * Q, d)."""
        return _rows(states, self._queries).view(*self._query_shape, -1)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, g, d) to (B * g, K, d)."""
        texts, heads, count = self._key_shape
        return _rows(states, self._keys).view(texts * heads, count, -1)

    def from_queries(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of each query, what its block has for it: (B * g, h / g * Q, d) to (1, N, h, d)."""
        return _rows(blocks, self._of_queries).view(1, -1, self._heads, blocks.shape[-1])

    def from_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of each key, the sum of what the blocks have for it: (B * g, K, d) to (1, N, g, d)."""
        (texts, heads, count), width = self._key_shape, blocks.shape[-1]
        of_prefixes = self._packing.prefixes * self._length
        found = blocks.new_empty(of_prefixes * heads + len(self._of_keys), width)
        of_text = found[of_prefixes * heads :]
        torch.index_select(blocks.view(-1, width), 0, self._of_keys, out=of_text)
        if of_prefixes:
            of_block = blocks.view(texts, heads, count, width)[:, :, : self._length]
            sums = self._packing.sum_over_texts(of_block.transpose(1, 2))
            found[: of_prefixes * heads] = sums.view(-1, width)
        return found.view(1, -1, heads, width)


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows (d,) of states (..., d)."""
    return states.reshape(-1, states.shape[-1]).index_select(0, index)


def _by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Of states (B, S) by number, the rows of their heads in memory (N, heads), by head: flat, in
    the order of (B, heads, S)."""
    head = torch.arange(heads, device=states.device)[:, None]
    return (states[:, None] * heads + head).flatten()


def _in_blocks(blocks: torch.Tensor, places: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """Of states (N,) at places of blocks, the rows of their heads in memory (B, heads, size): flat,
    in the order of (N, heads)."""
    head = torch.arange(heads, device=blocks.device)
    return ((blocks[:, None] * heads + head) * size + places[:, None]).flatten()
