"""In which batches an evaluation asks its questions."""

from collections.abc import Sequence

from epalm.data.grouping import chunks

# by which prompts in a group differ at most, as a share of the longest: of lengths like VQA v2's
# and ten prompt tokens, 0.2 costs least, with 6% padding and 2.4 questions to a prefix
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
    groups: list[list[int]] = []
    places = range(len(media))
    for place in sorted(places, key=lambda i: (sources[i], media[i], -lengths[i])):
        if groups:
            longest = groups[-1][0]
            alike = (sources[longest], media[longest]) == (sources[place], media[place])
            if alike and lengths[longest] - lengths[place] <= SPREAD * lengths[longest]:
                groups[-1].append(place)
                continue
        groups.append([place])
    groups.sort(key=lambda group: (sources[group[0]], -lengths[group[0]], -lengths[group[-1]]))
    return [list(some) for some in chunks([place for g in groups for place in g], batch_size)]
