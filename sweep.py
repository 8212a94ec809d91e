"""Sweeps: one YAML file that stands for many runs, every combination of its axes and seeds.

    name: comparison
    base: ../demo.yaml            a recipe, relative to the file
    set: {train.steps: 100}       fields changed in all runs
    axes:
      variant:
        lin: {variant.connection: shared, variant.prompt_length: 0}
        pt: {variant.connection: shared}
      mask:
        causal: {}
        reference: {variant.mask: reference}
    seeds: [0, 1, 2]

Runs are called NAME-lin-causal-0 and so on, and are ordinary runs otherwise.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from epalm.config import Name, Recipe, Section, load_recipe
from epalm.config.mistakes import describe_mistakes
from epalm.config.read_yaml import read_yaml
from epalm.errors import EpalmError

_HOW = (
    "it goes to `run`. A sweep is a file of its own, as\n"
    "  name: comparison\n"
    "  base: recipe.yaml\n"
    "  axes: {prompt: {short: {variant.prompt_length: 2}, long: {variant.prompt_length: 20}}}\n"
    "  seeds: [0, 1, 2]"
)


class Sweep(Section):
    """See above."""

    name: Name = Field(description="before the names of its runs")
    base: str = Field(description="recipe that all runs extend, relative to this file")
    set: dict[str, Any] = Field({}, description="dotted recipe fields that all runs change")
    axes: dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]] = Field(
        {}, description="by axis and value, the dotted recipe fields that the value changes"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="a run for each")


class SweepRun(NamedTuple):
    """A run of a sweep; `labels`: its value on each axis."""

    labels: dict[str, str]
    seed: int
    recipe: Recipe


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> list[SweepRun]:
    """The runs of a sweep, seed by seed, so that each seed's comparison is whole before the next.

    Args:
        overrides: as in `load_recipe`; they count in all runs, before the axes.

    Raises:
        EpalmError: not a sweep, one of its recipes is none, two of its runs have one name, two axes
            set one field, or a name or seed is set, which a sweep gives its runs itself.
    """
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
        if isinstance(tree, dict) and _is_recipe(tree):
            raise EpalmError(f"{path}: a recipe, not a sweep; {_HOW}")
        sweep = Sweep.model_validate(tree)
    except FileNotFoundError:
        raise EpalmError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise EpalmError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except ValidationError as error:
        lines = [f"  {line}" for line in describe_mistakes(error, Sweep)]
        raise EpalmError("\n".join([f"{path}: not a sweep", *lines])) from None
    _check_own(path, sweep, overrides)
    _check_axes(path, sweep)
    runs: dict[str, SweepRun] = {}
    for seed in sweep.seeds:
        for values in itertools.product(*sweep.axes.values()):
            labels = dict(zip(sweep.axes, values, strict=True))
            name = "-".join([sweep.name, *values, str(seed)])
            if name in runs:  # a comparison would count it twice
                raise EpalmError(
                    f"{path}: two runs are called {name}; rename a value, or drop a seed"
                )
            changed = [*_assignments(sweep.set), *overrides]
            for axis, value in labels.items():
                changed += _assignments(sweep.axes[axis][value])
            changed += _assignments({"name": name, "seed": seed})
            recipe = load_recipe(path.parent / sweep.base, tuple(changed))
            runs[name] = SweepRun(labels, seed, recipe)
    return list(runs.values())


def _check_own(path: Path, sweep: Sweep, overrides: tuple[str, ...]) -> None:
    given = {override.split("=", 1)[0].strip() for override in overrides}
    given.update(sweep.set, *(fields for axis in sweep.axes.values() for fields in axis.values()))
    for field, own in (("name", "name"), ("seed", "seeds")):
        if field in given:
            raise EpalmError(
                f"{path}: {field} cannot be set, a sweep gives each run its own; change `{own}` in "
                "the file"
            )


def _check_axes(path: Path, sweep: Sweep) -> None:
    """No two of them set the same field, or one a section and the other a field of it."""
    fields = {
        axis: sorted({f for own in of.values() for f in own}) for axis, of in sweep.axes.items()
    }
    for (one, ours), (other, theirs) in itertools.combinations(fields.items(), 2):
        for field, again in itertools.product(ours, theirs):
            if f"{field}.".startswith(f"{again}.") or f"{again}.".startswith(f"{field}."):
                raise EpalmError(
                    f"{path}: axes: {one} sets {field} and {other} sets {again}, of which only the "
                    "later would count; take it out of one of the two"
                )


def _is_recipe(tree: dict[str, Any]) -> bool:
    """Its keys are a recipe's, and but for the name, which both have, none is a sweep's."""
    keys = tree.keys() - {"name"}
    return bool(keys & {"extends", *Recipe.model_fields}) and not keys & Sweep.model_fields.keys()


def _assignments(fields: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in fields.items()]
