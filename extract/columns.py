"""Which columns of a feature set a recipe reads and fills."""

from epalm.config import Recipe
from epalm.errors import EpalmError
from epalm.extract.views import augmentation
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet
from epalm.store.spec import ColumnSpec, FeatureSpec


def column_specs(recipe: Recipe, spec: FeatureSpec) -> list[ColumnSpec]:
    """View 0's column, and that of views 1..K where the recipe has any.

    Raises:
        EpalmError: layers that the encoder does not have.
    """
    encoder = recipe.encoder
    layers = encoder.layers if encoder.layers is not None else tuple(range(spec.layers))
    if layers[-1] >= spec.layers:
        raise EpalmError(
            f"encoder.layers: {layers[-1]} wanted, {spec.encoder} has layers 0 to {spec.layers - 1}"
        )
    count = spec.tokens if encoder.tokens == "all" else 1
    plain = ColumnSpec(encoder.tokens, count, layers)
    if not encoder.views.count:
        return [plain]
    augmented = augmentation(recipe, spec.modality)
    return [plain, ColumnSpec(encoder.tokens, count, layers, augmented)]


def existing_columns(recipe: Recipe, features: FeatureSet) -> list[Column]:
    """The columns there are that the recipe reads; nothing is made."""
    wanted = column_specs(recipe, features.spec)
    return list(dict.fromkeys(c for spec in wanted for c in features.covering(spec)[0]))


def view_columns(recipe: Recipe, features: FeatureSet) -> list[tuple[int, list[Column]]]:
    """The columns to fill, view by view from 0, made where they are not there yet."""
    plain, *augmented = (
        features.columns_for(wanted) for wanted in column_specs(recipe, features.spec)
    )
    views = [(0, plain)]
    for columns in augmented:
        views += [(view, columns) for view in range(1, recipe.encoder.views.count + 1)]
    return views


def last_layers(recipe: Recipe, column: ColumnSpec) -> tuple[int, ...]:
    """The layers of a column that the variant uses: its `levels`, or the last n (convention 3)."""
    if recipe.variant.levels is not None:
        named = tuple(sorted(set(recipe.variant.levels.values())))
        if not set(named) <= set(column.layers):
            raise EpalmError(
                f"variant.levels: encoder layers {', '.join(map(str, named))} wanted, "
                f"there are only {', '.join(map(str, column.layers))}"
            )
        return named
    wanted = recipe.variant.encoder_layers
    if wanted > len(column.layers):
        raise EpalmError(
            f"variant.encoder_layers: {wanted} wanted, the encoder has {len(column.layers)} "
            "(those that encoder.layers keeps)"
        )
    return column.layers[-wanted:]
