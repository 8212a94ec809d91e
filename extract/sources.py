"""The features of several sources, each in a feature set of its own, read by joint ids."""

from collections.abc import Mapping, Sequence

import torch

from epalm.config import Recipe
from epalm.data import load_dataset
from epalm.data.example import Dataset
from epalm.data.sources import join, naming, split_id
from epalm.errors import EpalmError
from epalm.extract.lookup import FeatureTable, open_features
from epalm.extract.placement import FreeMemory
from epalm.store.spec import JointSpec
from epalm.store.stage import Stage


class SourceTables:
    """Features of all sources' media; ids are `SOURCE/ID`.

    Attributes:
        tables: by source name, in the order of `Recipe.sources`.
    """

    def __init__(self, tables: Mapping[str, FeatureTable]):
        """EpalmError when the sources do not keep the same number of tokens."""
        first, *others = tables
        for name in others:
            if tables[name].tokens != tables[first].tokens:
                raise EpalmError(
                    f"source {name}: encoder.tokens keeps {tables[name].tokens} tokens of a layer, "
                    f"source {first} {tables[first].tokens}; all sources must keep as many"
                )
        self.tables = tables
        self.spec = JointSpec({name: table.spec for name, table in tables.items()})

    @property
    def extraction(self) -> Stage | None:
        """What the last extractions took, all together."""
        stages = [table.extraction for table in self.tables.values() if table.extraction]
        if not stages:
            return None
        return Stage(sum(s.seconds for s in stages), "; ".join(s.rate for s in stages))

    def view_count(self, media: str) -> int:
        """As FeatureTable's."""
        source, own = split_id(media)
        return self.tables[source].view_count(own)

    def content_hash(self, media: str) -> str:
        """As FeatureTable's."""
        source, own = split_id(media)
        return self.tables[source].content_hash(own)

    def place(self, placement: str, device: torch.device) -> None:
        """As FeatureTable's, of all sources.

        `auto` measures what is free once and gives room to the smallest first, so that as many
        sources as can be are read fast, whatever their names.
        """
        free = FreeMemory(device)
        for table in sorted(self.tables.values(), key=FeatureTable.size):
            table.place(placement, device, free)

    def fetch(
        self, media: Sequence[str], views: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """By source, (M_s, n, [t,] D_s) as FeatureTable gives them; none are (0, n, [t,] D_s).

        Args:
            media: ids, those of a source together, in the order of the sources.
            views: as there.
        """
        names = [split_id(joint)[0] for joint in media]
        if names != sorted(names):
            raise ValueError("media must stand together by source, in the sources' order")
        views = views or [0] * len(media)
        found = {}
        for name, table in self.tables.items():
            places = [place for place, own in enumerate(names) if own == name]
            ids = [split_id(media[place])[1] for place in places]
            found[name] = table.fetch(ids, [views[place] for place in places])
        return found


def open_sources(recipe: Recipe) -> tuple[FeatureTable | SourceTables, Dataset]:
    """The features of a recipe's source or sources, on disk; see `place`.

    Returns:
        The features, and the dataset that they are about: that of all sources together.

    Raises:
        EpalmError: as in `load_dataset` and `open_features`; names the source.
    """
    tables, datasets = {}, {}
    for name, alone in recipe.sources().items():
        with naming(name, bool(recipe.also)):
            tables[name], datasets[name] = open_features(alone, load_dataset(alone))
    if not recipe.also:
        return tables[name], datasets[name]
    return SourceTables(tables), join(datasets)
