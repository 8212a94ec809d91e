"""In which batches an evaluation asks its questions."""

from collections import defaultdict
from collections.abc import Sequence

from epalm.data.grouping import chunks
from epalm.train.order import alike

# of lengths in a group, see `alike`: with prompts like VQA v2's and ten prompt tokens, 0.2 costs
# least, with 6% padding and 2.4 questions to a prefix
SPREAD = 0.2


def evaluation_batches(
    sources: Sequence[str], media: Sequence[str], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Positions of N examples, batch by batch; a function of nothing but the arguments.

    Examples about one media stand together where they are about as long, so that its prefix runs
    once for all of them, and groups of like length do, so that little is padding. The longest come
    first: what does not fit in memory shows at once. Sources stay apart, in alphabetical order, as
    their features are read.

    Args:
        sources: of each example; empty where there is only one.
        media: shown with each example.
        lengths: tokens of each prompt.
    """
    by_media: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place in sorted(range(len(media)), key=lambda i: (sources[i], media[i], -lengths[i])):
        by_media[sources[place], media[place]].append(place)
    groups = [group for own in by_media.values() for group in alike(own, lengths, SPREAD)]
    groups.sort(key=lambda group: (sources[group[0]], -lengths[group[0]], -lengths[group[-1]]))
    return [list(some) for some in chunks([place for g in groups for place in g], batch_size)]
