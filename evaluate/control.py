"""The control: the same questions about other media."""

import random
from collections.abc import Iterable


def shuffled_media(media: Iterable[str], seed: int) -> dict[str, str]:
    """For each media id another one of them, a seeded permutation without fixed points.

    A single media is left as it is; there is nothing to exchange it with.
    """
    ordered = sorted(set(media))
    random.Random(f"{seed} control").shuffle(ordered)
    return dict(zip(ordered, ordered[1:] + ordered[:1], strict=True))
