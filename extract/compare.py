"""Feature sets by folder or recipe, and their specs side by side."""

from pathlib import Path
from typing import NamedTuple

from epalm.config import Recipe, load_recipe
from epalm.data.sources import naming
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs
from epalm.extract.encoder import describe
from epalm.store.feature_set import FeatureSet, find, open_set
from epalm.store.spec import ColumnSpec, FeatureSpec


class SetOfSources(NamedTuple):
    """A feature set, and the sources whose features it keeps.

    Attributes:
        features: the set.
        recipes: by source name, the recipe that each would have by itself; none of a folder.
    """

    features: FeatureSet
    recipes: dict[str, Recipe]


def feature_sets(target: Path, overrides: tuple[str, ...] = ()) -> list[SetOfSources]:
    """The set in a folder, or those that a recipe's sources need.

    Raises:
        EpalmError: neither, or overrides of a folder.
    """
    if target.is_dir():
        if overrides:
            raise EpalmError(f"--set {overrides[0]}: {target} is a feature set, not a recipe")
        return [SetOfSources(open_set(target), {})]
    if not target.exists():
        raise EpalmError(f"{target}: neither a feature set's folder nor a recipe")
    return sets_of_recipe(load_recipe(target, overrides))


def sets_of_recipe(recipe: Recipe) -> list[SetOfSources]:
    """The sets that a recipe's sources need, each once; EpalmError when one is not there."""
    found: dict[Path, SetOfSources] = {}
    for name, alone in recipe.sources().items():
        with naming(name, bool(recipe.also)):
            features = find(Path(alone.store.root), describe(alone), alone.encoder.weights)
        found.setdefault(features.folder, SetOfSources(features, {})).recipes[name] = alone
    return list(found.values())


def differences(one: Path, other: Path) -> list[str]:
    """One line per field in which two specs differ; each is a set's folder or a recipe."""
    (spec, columns), (other_spec, other_columns) = _specs(one), _specs(other)
    lines = [
        f"{key}: {mine!r} in {one}, {theirs!r} in {other}"
        for key, (mine, theirs) in spec.differing(other_spec).items()
    ]
    names, other_names = {c.name for c in columns}, {c.name for c in other_columns}
    lines += [f"column {name}: only in {one}" for name in sorted(names - other_names)]
    lines += [f"column {name}: only in {other}" for name in sorted(other_names - names)]
    return lines


def _specs(path: Path) -> tuple[FeatureSpec, list[ColumnSpec]]:
    if path.is_dir():
        features = open_set(path)
        return features.spec, [column.column for column in features.columns]
    recipe = load_recipe(path)
    spec = describe(recipe)
    return spec, column_specs(recipe, spec)
