"""Queries and keys of a packed sequence in blocks of one size, for batched matrix products.

For a CPU: how large blocks are is read off a tensor, for which a GPU would be waited for.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from epalm.model.packing import Packing


@lru_cache(maxsize=1)
def blocks_of(packing: Packing, heads: int, key_heads: int) -> "Blocks":
    """Made for the first layer of a pass; the others have the same."""
    return Blocks(packing, heads, key_heads)


class Blocks:
    """A block for each text. Its keys are those of its prefix and its own; its queries are its own
    and a share of its prefix's, which the texts of a prefix divide among them.

    So one batch of products serves prefixes and texts, and no query is answered twice. Those of a
    prefix that no text follows find 0, and nothing is learnt from them.

    Shapes: R prefixes of S states, B texts of T; N = R * S + B * T states in the sequence. A block
    has E queries of its prefix, Q = E + T, and K = S + T keys; h heads of width d, of keys g.

    Args:
        packing: the sequence.
        heads: h.
        key_heads: g.

    Attributes:
        mask: (B, 1, Q, K) added to the scores.
        used: (B, 1, E, 1) 1, but 0 where there are fewer queries than places for them; there,
            weights of attention are to be 0. None: all are 1.
    """

    def __init__(self, packing: Packing, heads: int, key_heads: int):
        length, tokens = packing.prefix_mask.shape[2], packing.text_mask.shape[2]
        owner = packing.owner
        owners = (0,) * packing.texts if owner is None else tuple(owner.tolist())
        self._index = _index(owners, packing.prefixes, length, tokens, heads, key_heads)
        self._prefixes, self._texts, self._length = packing.prefixes, packing.texts, length
        self._owner, self._heads, self._key_heads = owner, heads, key_heads

        to_text = packing.prefix_mask.new_full((length, tokens), -torch.inf)
        of_state = torch.cat((packing.prefix_mask[0, 0], to_text), dim=1)
        self.mask = torch.cat((of_state[self._index.states][:, None], packing.text_mask), dim=2)
        used = self._index.used
        self.used = None if used is None else used[:, None, :, None].to(self.mask.dtype)

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, h, d) to (B * g, h / g * Q, d)."""
        rows = _rows(states, self._index.queries)
        return rows.view(self._texts * self._key_heads, -1, states.shape[-1])

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, g, d) to (B * g, K, d)."""
        rows = _rows(states, self._index.keys)
        return rows.view(self._texts * self._key_heads, -1, states.shape[-1])

    def from_queries(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of each query, what its block has for it: (B * g, h / g * Q, d) to (1, N, h, d)."""
        rows = _rows(blocks, self._index.of_queries)
        return rows.view(1, -1, self._heads, blocks.shape[-1])

    def from_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of each key, the sum of what the blocks have for it: (B * g, K, d) to (1, N, g, d)."""
        heads, width, of_keys = self._key_heads, blocks.shape[-1], self._index.of_keys
        of_prefixes = self._prefixes * self._length
        found = blocks.new_empty(of_prefixes * heads + len(of_keys), width)
        torch.index_select(blocks.view(-1, width), 0, of_keys, out=found[of_prefixes * heads :])
        if of_prefixes:
            of_block = blocks.view(self._texts, heads, -1, width)[:, :, : self._length]
            sums = self._sum_over_texts(of_block.transpose(1, 2))
            found[: of_prefixes * heads].view_as(sums).copy_(sums)
        return found.view(1, -1, heads, width)

    def _sum_over_texts(self, states: torch.Tensor) -> torch.Tensor:
        """Of texts (B, …), the sum over those of each prefix (R, …)."""
        each = self._index.of_each
        if each == 1:
            return states
        if each is not None:
            return states.unflatten(0, (self._prefixes, each)).sum(dim=1)
        flat = states.flatten(1)  # in more dimensions, index_add_ takes several times as long
        sums = flat.new_zeros(self._prefixes, flat.shape[1]).index_add_(0, self._owner, flat)
        return sums.view(self._prefixes, *states.shape[1:])


class _Index(NamedTuple):
    """Where in memory blocks find their states, and states their blocks.

    Attributes:
        states: (B, E) of which states of its prefix a text has the queries.
        used: (B, E) False where no query is left for it; None: it is True everywhere.
        queries, keys: of blocks, in order, the rows (d,) of their heads in a sequence.
        of_queries, of_keys: of a sequence's queries, and its texts' keys, in blocks.
        of_each: how many texts each prefix has, if all have as many, and they are in its order;
            None: it is otherwise.
    """

    states: torch.Tensor
    used: torch.Tensor | None
    queries: torch.Tensor
    keys: torch.Tensor
    of_queries: torch.Tensor
    of_keys: torch.Tensor
    of_each: int | None


@lru_cache(maxsize=8)  # most batches are alike in this
def _index(
    owners: tuple[int, ...], prefixes: int, length: int, tokens: int, heads: int, key_heads: int
) -> _Index:
    texts, owner = len(owners), torch.tensor(owners)
    shares = _share_out(owner, prefixes, length)
    text, token = torch.arange(texts), torch.arange(tokens)

    # which states' queries and keys each block has
    start = owner[:, None] * length
    own = prefixes * length + text[:, None] * tokens + token
    queries = torch.cat((start + shares.states, own), dim=1)
    keys = torch.cat((start + torch.arange(length), own), dim=1)

    # which block has each state's query, and each text's key
    own_block, each = text.repeat_interleave(tokens), shares.states.shape[1]
    block = torch.cat((shares.block.flatten(), own_block))
    place = torch.cat((shares.place.flatten(), (each + token).repeat(texts)))
    own_place = (length + token).repeat(texts)

    of_each = texts // prefixes
    alike = owners == tuple(prefix for prefix in range(prefixes) for _ in range(of_each))
    return _Index(
        shares.states,
        None if shares.used.all() else shares.used,
        _by_head(queries, heads),
        _by_head(keys, key_heads),
        _in_blocks(block, place, heads, queries.shape[1]),
        _in_blocks(own_block, own_place, key_heads, keys.shape[1]),
        of_each if alike else None,
    )


class _Shares(NamedTuple):
    """How texts divide the queries of R prefixes of S states: E for each text.

    Attributes:
        states: (B, E) of which states of its prefix a text has the queries.
        used: (B, E) False where no query is left for it.
        block: (R, S) which text has the query of a state.
        place: (R, S) at which of the E.
    """

    states: torch.Tensor
    used: torch.Tensor
    block: torch.Tensor
    place: torch.Tensor


def _share_out(owner: torch.Tensor, prefixes: int, length: int) -> _Shares:
    """Each prefix's queries among the texts that it owns (B,), in their order."""
    counts = owner.bincount(minlength=prefixes)
    alone = counts == 0
    # for a prefix without texts, one more: the last text of all has no query for it then
    each = -(-length // int(counts[~alone].min())) + (1 if length and alone.any() else 0)
    texts, first = owner.argsort(stable=True), counts.cumsum(0) - counts
    rank = torch.empty_like(owner)  # of a text among those of its prefix
    rank[texts] = torch.arange(len(owner)) - first[owner[texts]]
    states = rank[:, None] * each + torch.arange(each)
    used = states < length
    state, divisor = torch.arange(length), max(each, 1)
    of_texts = torch.where(alone[:, None], len(owner) - 1, first[:, None] + state // divisor)
    place = torch.where(alone[:, None], each - 1, state % divisor)
    return _Shares(states.where(used, 0), used, texts[of_texts], place)


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows (d,) of states (..., d)."""
    return states.reshape(-1, states.shape[-1]).index_select(0, index)


def _by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Of states (B, S) by number, the rows of their heads in memory (N, heads), by head: flat, in
    the order of (B, heads, S)."""
    head = torch.arange(heads)[:, None]
    return (states[:, None] * heads + head).flatten()


def _in_blocks(blocks: torch.Tensor, places: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """Of states (N,) at places of blocks, the rows of their heads in memory (B, heads, size): flat,
    in the order of (N, heads)."""
    head = torch.arange(heads)
    return ((blocks[:, None] * heads + head) * size + places[:, None]).flatten()
