"""`cache`: the feature store."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from epalm.commands import stages
from epalm.commands.options import recipe_argument, set_option
from epalm.errors import EpalmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from epalm.config import Recipe
    from epalm.extract.compare import SetOfSources
    from epalm.store.feature_set import FeatureSet
    from epalm.store.maintenance import Removed


@click.group()
def cache() -> None:
    """Look at feature sets, check them, and look after them."""


set_argument = click.argument("target", metavar="SET", type=click.Path(path_type=Path))


def sample_option(default: int, words: str) -> "Callable[[Any], Any]":
    """How much of something to look at."""
    count = click.IntRange(min=1)
    return click.option("--sample", type=count, default=default, show_default=True, help=words)


@cache.command("ls")
@click.argument("root", default="features", type=click.Path(path_type=Path))
def cache_ls(root: Path) -> None:
    """List the feature sets in a folder."""
    from epalm.store.listing import table_of_sets

    click.echo(table_of_sets(root))


@cache.command("info")
@set_argument
@set_option
def cache_info(target: Path, overrides: tuple[str, ...]) -> None:
    """Print all that is known of a feature set, given its folder or a recipe."""
    from epalm.store.listing import page_of_set

    for features in _sets(target, overrides):
        click.echo(page_of_set(features))


@cache.command("verify")
@set_argument
@click.option("--deep", is_flag=True, help="Also encode a random sample again; SET is a recipe.")
@sample_option(16, "Rows of each column to encode.")
@set_option
def cache_verify(target: Path, deep: bool, sample: int, overrides: tuple[str, ...]) -> None:
    """Compare every shard with its checksum."""
    from epalm.store.maintenance import verify

    if deep and target.is_dir():
        raise EpalmError(f"{target}: --deep needs the recipe instead of the set, to find the media")
    lines: list[str] = []
    remedies: set[str] = set()
    for features in _sets(target, overrides):
        if problems := verify(features, _bar("verify")):
            lines.append(f"{features.folder}: {len(problems)} broken shards")
            lines += [f"  {p.column.folder.name}, shard {p.shard}: {p.what}" for p in problems]
            remedies |= {f"`{p.remedy}`" for p in problems}
            continue
        shards = sum(len(column.markers) for column in features.columns)
        click.echo(f"{features.folder}: {shards} shards, all as they were written")
    if lines:
        remedy = f"run {' and '.join(sorted(remedies))} with the recipe"
        raise EpalmError("\n".join([*lines, remedy]))
    if deep:
        different: list[str] = []
        _for_sources(target, overrides, lambda alone: different.extend(_verify_deep(alone, sample)))
        if different:
            raise EpalmError(
                f"{', '.join(different)}: other features than the encoder makes now; if weights "
                "and libraries are those of the extraction, delete the column and extract again"
            )


@cache.command("diff")
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
def cache_diff(one: Path, other: Path) -> None:
    """Print in which fields two specs differ; each is a feature set's folder or a recipe."""
    from epalm.extract.compare import differences

    lines = differences(one, other)
    click.echo("\n".join(lines) or "the same features")


@cache.command("repair")
@recipe_argument
@set_option
def cache_repair(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make the broken shards of the recipe's columns again, in their places.

    Those whose media are not here stay as they are. Those of its LM's text states are dropped; the
    next training makes them again.
    """
    from epalm.config import load_recipe
    from epalm.data.sources import naming
    from epalm.extract.compare import sets_of_recipe
    from epalm.store.maintenance import give_up, text_sets, verify

    loaded = load_recipe(recipe, overrides)
    for states in text_sets(Path(loaded.store.root), loaded.lm.weights):
        broken = verify(states, _bar("verify text states"))
        give_up(broken)
        lost = any(not problem.intact for problem in broken)
        click.echo(
            f"{states.folder}: {len(broken)} broken shards of text states"
            + ("; dropped, the next training makes them again" if lost else "")
        )
    left: list[str] = []
    for found in _said(sets_of_recipe(loaded)):
        with naming(" and ".join(found.recipes), bool(loaded.also)):
            left += _repair(found)
    if left:
        remedy = (
            "bring the media back, or take a recipe that has them, and repeat the command; `cache "
            "gc --removed` forgets media that are gone for good"
        )
        raise EpalmError("\n".join([*left, remedy]))


@cache.command("gc")
@set_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--removed", is_flag=True, help="Also forget media and runs that are gone.")
@set_option
def cache_gc(target: Path, dry_run: bool, removed: bool, overrides: tuple[str, ...]) -> None:
    """Delete what nothing in a feature set refers to any more."""
    from epalm.store.maintenance import Removed, removed_media, removed_runs
    from epalm.store.needs import unreadable_needs

    for features in _sets(target, overrides):
        for line in unreadable_needs(features):
            click.echo(line)
        gone = Removed({}, [])
        if removed:
            media = {dataset: removed_media(features, dataset) for dataset in features.datasets()}
            gone = Removed(media, removed_runs(features))
        _collect(features, gone, dry_run)


@cache.command("convert")
@set_argument
@click.option("--to", "backend", required=True, help="zarr or hdf5")
@set_option
def cache_convert(target: Path, backend: str, overrides: tuple[str, ...]) -> None:
    """Move a feature set to another backend; no training may be reading it."""
    from epalm.store.conversion import convert

    for features in _sets(target, overrides):
        if features.layout.backend == backend:
            click.echo(f"{features.folder}: is {backend} already")
            continue
        click.echo(f"{convert(features, backend, _bar('convert')).folder}: {backend}")


@cache.command("estimate")
@recipe_argument
@sample_option(32, "Media to measure the rate on.")
@set_option
def cache_estimate(recipe: Path, sample: int, overrides: tuple[str, ...]) -> None:
    """Say what an extraction would add, and how long it would take."""
    _for_sources(recipe, overrides, lambda alone: _estimate(alone, sample))


def _sets(target: Path, overrides: tuple[str, ...]) -> "Iterator[FeatureSet]":
    """The sets of a folder or a recipe, as `_said` gives them."""
    from epalm.extract.compare import feature_sets

    return (found.features for found in _said(feature_sets(target, overrides)))


def _said(sets: "list[SetOfSources]") -> "Iterator[SetOfSources]":
    """Sets one by one; says whose each is, if there are several sources."""
    several = sum(len(found.recipes) for found in sets) > 1
    for found in sets:
        if several:
            click.echo(f"source {' and '.join(found.recipes)}:")
        yield found


def _for_sources(
    recipe: Path, overrides: tuple[str, ...], act: "Callable[[Recipe], object]"
) -> None:
    """Do it with the recipe of each source by itself; says which it is, if there are several."""
    from epalm.config import load_recipe
    from epalm.data.sources import naming

    loaded = load_recipe(recipe, overrides)
    for name, alone in loaded.sources().items():
        if loaded.also:
            click.echo(f"source {name}:")
        with naming(name, bool(loaded.also)):
            act(alone)


def _repair(found: "SetOfSources") -> list[str]:
    """Mend a set; a line for each shard that could not be, as its media are not here."""
    from epalm.extract.columns import existing_columns
    from epalm.extract.repair import absent_media
    from epalm.store.maintenance import REPAIR, give_up, verify

    features, recipes = found.features, found.recipes.values()
    ours = {column for recipe in recipes for column in existing_columns(recipe, features)}
    problems = verify(features, _bar("verify"))
    mendable = [p for p in problems if p.column in ours and p.remedy == REPAIR]
    lost = [p for p in mendable if not p.intact]
    absent = absent_media(features, recipes, lost) if lost else {}
    give_up(p for p in mendable if p not in absent)
    click.echo(f"{features.folder}: {len(mendable)} broken shards")
    if intact := len(mendable) - len(lost):
        click.echo(f"  {intact} with intact features: `valid` and metadata are written anew")
    for p in problems:
        if p.remedy != REPAIR:
            click.echo(f"  {p.column.folder.name}, shard {p.shard}: {p.what}; run `{p.remedy}`")
    for name in sorted(
        {p.column.folder.name for p in problems if p.column not in ours and p.remedy == REPAIR}
    ):
        click.echo(f"  {name} has broken shards too; repair it with a recipe that keeps it")
    if len(lost) > len(absent):
        for recipe in recipes:
            stages.extract_source(recipe, False, True)
    return [
        f"{p.column.folder}: shard {p.shard} stays as it is: {len(media)} of its media are not "
        f"here or not the recipe's, {media[0]} among them"
        for p, media in absent.items()
    ]


def _collect(features: "FeatureSet", gone: "Removed", dry_run: bool) -> None:
    """Delete a set's garbage, and say what it was."""
    from epalm.store.listing import words_for_bytes
    from epalm.store.maintenance import collect, garbage

    if dry_run:
        found = [(path, path.stat().st_size) for path in garbage(features, gone)]
    else:
        found = collect(features, gone)
    verb = "would be" if dry_run else "are"
    for dataset, forgotten in gone.media.items():
        click.echo(f"{dataset}: {len(forgotten)} media {verb} forgotten")
    for run in gone.runs:
        click.echo(f"{run}: gone; its needs {verb} forgotten")
    for path, _ in found:
        click.echo(f"  {os.path.relpath(path, features.folder)}")
    size = words_for_bytes(sum(size for _, size in found))
    click.echo(f"{len(found)} files, {size}, {verb} deleted")


def _estimate(recipe: "Recipe", sample: int) -> None:
    from epalm.data import load_dataset
    from epalm.extract.check import estimate
    from epalm.store.listing import words_for_bytes

    found = estimate(recipe, load_dataset(recipe), sample)
    for name, rows in found.rows.items():
        click.echo(f"{name}: {rows:,} rows of {words_for_bytes(found.row_bytes[name])}")
    if found.rate is None:
        click.echo(f"nothing to do; all is in {found.folder}")
        return
    click.echo(
        f"{words_for_bytes(found.bytes)} into {found.folder}; about {found.seconds / 60:.1f} min "
        f"at {found.rate:.1f} rows/s, measured here on view 0"
    )


def _bar(label: str) -> "Callable[[Iterable[Any]], Iterable[Any]]":
    """Shows a bar over shards."""
    from tqdm import tqdm

    return lambda shards: tqdm(list(shards), label, unit="shard")


def _verify_deep(recipe: "Recipe", sample: int) -> list[str]:
    """Columns whose features the encoder does not make now."""
    from epalm.data import load_dataset
    from epalm.extract.check import verify_deep

    different = []
    for c in verify_deep(recipe, load_dataset(recipe), sample):
        click.echo(
            f"{c.column}: {c.rows} rows encoded again, largest difference "
            f"{c.largest_difference:.2g} (values up to {c.largest_value:.3g}, arithmetic explains "
            f"{c.bound:.2g})"
        )
        if c.largest_difference > c.bound:
            different.append(c.column)
    return different
