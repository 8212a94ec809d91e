"""Which broken shards can be made again."""

from collections.abc import Iterable

from epalm.config import Recipe
from epalm.data import load_dataset
from epalm.extract.hashing import hash_media
from epalm.store.feature_set import FeatureSet
from epalm.store.maintenance import Problem


def absent_media(
    features: FeatureSet, recipes: Iterable[Recipe], problems: Iterable[Problem]
) -> dict[Problem, list[str]]:
    """Of each broken shard that cannot be made again whole, the media that it takes.

    Those that a catalogue knows and the recipes' datasets do not have, or not here. What no
    catalogue knows any more, as its file was changed, nobody reads; and of a shard whose file is
    truncated or gone, nothing is left to lose.

    Args:
        features: the set.
        recipes: of all sources whose features it keeps.
        problems: some of its shards, whose features are not intact.
    """
    here: set[str] = set()
    for recipe in recipes:
        found = hash_media(load_dataset(recipe), features)
        here.update(entry.content_hash for entry in found.media.values())
    absent = {
        entry.content_hash: media
        for dataset in features.datasets()
        for media, entry in features.catalogue(dataset).media.items()
        if entry.content_hash not in here
    }
    lacking: dict[Problem, list[str]] = {}
    for problem in problems:
        marker = problem.column.markers.get(problem.shard)
        hashes = [h for h in marker.hashes if h not in marker.failed] if marker else []
        if gone := [absent[h] for h in hashes if h in absent]:
            lacking[problem] = gone
    return lacking
