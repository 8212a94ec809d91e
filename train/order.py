"""In which order an epoch shows its examples: shuffled, but so that a batch wastes little."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from epalm.data.grouping import chunks

POOL = 64  # batches among which groups are sorted by length
SPREAD = 0.1  # of lengths in a group, see `alike`


def order_of_epoch(
    media: Sequence[str],
    lengths: Sequence[int],
    batch_size: int,
    examples_per_media: int,
    draw: random.Random,
) -> list[int]:
    """Indices of the examples, batch after batch; a random rest that fills no batch is left out.

    Examples about one media stand in groups, so that its prefix is shared, if they are about as
    long; groups of like length stand together within a pool, so that little is padding. Everything
    else is shuffled.

    Args:
        media: of each example.
        lengths: tokens of each.
    """
    groups = _groups(media, lengths, examples_per_media, draw)
    draw.shuffle(groups)
    _drop(groups, len(media) % batch_size)
    order: list[int] = []
    for number, pool in enumerate(_pools(groups, POOL * batch_size)):
        # up and down in turns: where two pools meet in a batch, their texts are alike too
        pool.sort(key=lambda group: (lengths[group[-1]], lengths[group[0]]), reverse=number % 2 > 0)
        order += (index for group in pool for index in group)
    batches = list(chunks(order, batch_size))
    draw.shuffle(batches)
    return [index for batch in batches for index in batch]


def alike(
    indices: Iterable[int], lengths: Sequence[int], spread: float, most: int | None = None
) -> list[list[int]]:
    """Consecutive groups of about the same length.

    Args:
        indices: of texts, by length; the longest first or last.
        lengths: of all texts.
        spread: by which lengths in a group differ at most, as a share of the longest.
        most: texts in a group; None: any number.
    """
    groups: list[list[int]] = []
    for index in indices:
        if groups and len(groups[-1]) != most:
            shorter, longer = sorted((lengths[groups[-1][0]], lengths[index]))
            if longer - shorter <= spread * longer:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _groups(
    media: Sequence[str], lengths: Sequence[int], most: int, draw: random.Random
) -> list[list[int]]:
    """At most so many examples about one media each, about as long."""
    by_media: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(media):
        by_media[name].append(index)
    groups: list[list[int]] = []
    for indices in by_media.values():
        draw.shuffle(indices)
        indices.sort(key=lengths.__getitem__)
        groups += alike(indices, lengths, SPREAD, most)
    return groups


def _drop(groups: list[list[int]], count: int) -> None:
    """Take so many examples from the end of shuffled groups."""
    while count:
        dropped = groups[-1][:count]
        del groups[-1][:count]
        count -= len(dropped)
        if not groups[-1]:
            groups.pop()


def _pools(groups: Sequence[list[int]], examples: int) -> list[list[list[int]]]:
    """Consecutive groups, about so many examples together."""
    pools: list[list[list[int]]] = [[]]
    held = 0
    for group in groups:
        if held >= examples:
            pools.append([])
            held = 0
        pools[-1].append(group)
        held += len(group)
    return pools
