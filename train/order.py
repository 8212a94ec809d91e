"""In which order an epoch shows its examples: shuffled, but so that a batch wastes little."""

import random
from collections import defaultdict
from collections.abc import Sequence

from epalm.data.grouping import chunks

POOL = 64  # batches among which groups are sorted by length
SPREAD = 0.1  # by which lengths in a group differ at most, as a share of the longest


def order_of_epoch(
    media: Sequence[str],
    lengths: Sequence[int],
    batch_size: int,
    examples_per_media: int,
    draw: random.Random,
) -> list[int]:
    """Indices of the examples, batch after batch; what fills no batch is left out.

    Examples about one media stand in groups, so that its prefix is shared, if they are about as
    long; groups of like length stand together, so that under a twentieth of a batch is padding.
    Everything else is shuffled.

    Args:
        media: of each example.
        lengths: tokens of each.
    """
    by_media: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(media):
        by_media[name].append(index)
    groups: list[list[int]] = []
    for indices in by_media.values():
        draw.shuffle(indices)
        indices.sort(key=lengths.__getitem__)
        for index in indices:
            alike = groups and media[groups[-1][0]] == media[index]
            if alike and len(groups[-1]) < examples_per_media:
                if lengths[index] - lengths[groups[-1][0]] <= SPREAD * lengths[index]:
                    groups[-1].append(index)
                    continue
            groups.append([index])
    draw.shuffle(groups)
    batches: list[Sequence[int]] = []
    carried: Sequence[int] = []
    for pool in _pools(groups, POOL * batch_size):
        pool.sort(key=lambda group: (lengths[group[-1]], lengths[group[0]]))
        together = [*carried, *(index for group in pool for index in group)]
        *whole, carried = chunks(together, batch_size)
        batches += whole
    if len(carried) == batch_size:
        batches.append(carried)
    draw.shuffle(batches)
    return [index for batch in batches for index in batch]


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
