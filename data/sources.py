"""Several datasets as one: examples and media keep apart by the name of their source."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from epalm.config import MAIN, Recipe
from epalm.data import load_dataset
from epalm.data.example import Dataset
from epalm.errors import EpalmError

SEPARATOR = "/"
"""Between source and id; ids of several sources are `SOURCE/ID`. No source's name has one."""


def load_sources(recipe: Recipe) -> Dataset:
    """The datasets of all of a recipe's sources as one; errors as in `load_dataset`."""
    datasets = {}
    for name, alone in recipe.sources().items():
        with naming(name, bool(recipe.also)):
            datasets[name] = load_dataset(alone)
    return join(datasets)


def join(datasets: Mapping[str, Dataset]) -> Dataset:
    """One dataset of the sources' examples and media; of a single source, its own.

    Types are `SOURCE TYPE`, so that scores are broken down by source. The root is the main
    source's, which no id is relative to.

    Args:
        datasets: by source name, in the order of `Recipe.sources`.
    """
    if len(datasets) == 1:
        return datasets[MAIN]
    examples = tuple(
        replace(
            example,
            id=joint_id(name, example.id),
            media=joint_id(name, example.media),
            type=f"{name} {example.type}".rstrip(),
            entails=tuple(joint_id(name, other) for other in example.entails),
            source=name,
        )
        for name, dataset in datasets.items()
        for example in dataset.examples
    )
    media = {
        joint_id(name, key): value
        for name, dataset in datasets.items()
        for key, value in dataset.media.items()
    }
    together = "+".join(dataset.name for dataset in datasets.values())
    return Dataset(together, examples, media, datasets[MAIN].root)


def joint_id(source: str, own: str) -> str:
    """The id among several sources."""
    return f"{source}{SEPARATOR}{own}"


def split_id(joint: str) -> tuple[str, str]:
    """Source and id within it."""
    source, _, own = joint.partition(SEPARATOR)
    return source, own


@contextmanager
def naming(source: str, several: bool) -> Iterator[None]:
    """Within it, errors say which source they are about, if there are several."""
    try:
        yield
    except EpalmError as error:
        if not several:
            raise
        raise type(error)(f"source {source}: {error}") from None
