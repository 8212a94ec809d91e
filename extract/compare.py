"""Specs side by side: of feature sets on disk, and of those that recipes ask for."""

from pathlib import Path

from epalm.config import load_recipe
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs
from epalm.extract.encoder import describe
from epalm.store.feature_set import FeatureSet, find, open_set
from epalm.store.spec import ColumnSpec, FeatureSpec


def feature_set(target: Path, overrides: tuple[str, ...] = ()) -> FeatureSet:
    """The set in a folder, or the one that a recipe names.

    Raises:
        EpalmError: neither, or overrides of a folder.
    """
    if target.is_dir():
        if overrides:
            raise EpalmError(f"--set {overrides[0]}: {target} is a feature set, not a recipe")
        return open_set(target)
    if not target.exists():
        raise EpalmError(f"{target}: neither a feature set's folder nor a recipe")
    return set_of_recipe(target, overrides)


def set_of_recipe(path: Path, overrides: tuple[str, ...] = ()) -> FeatureSet:
    """The feature set that a recipe names; EpalmError when there is none."""
    recipe = load_recipe(path, overrides)
    return find(Path(recipe.store.root), describe(recipe), recipe.encoder.weights)


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
