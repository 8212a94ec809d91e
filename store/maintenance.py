"""Looking after a feature set: verify it, tidy it up."""

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

from epalm.errors import EpalmError
from epalm.store.atomic import claim, locked
from epalm.store.column import Column
from epalm.store.feature_set import Catalogue, FeatureSet, open_set, specs
from epalm.store.interrupted import leftovers
from epalm.store.needs import needs
from epalm.store.writer import ColumnWriter

T = TypeVar("T")
Progress = Callable[[Iterable[T]], Iterable[T]]
"""Wraps what is gone through one by one, to show a bar."""

REPAIR = "cache repair"


class Problem(NamedTuple):
    """A broken shard.

    Attributes:
        what: is wrong with it.
        remedy: the command that mends it.
        intact: its features can be used; only other readers are told something else of it.
    """

    column: Column
    shard: int
    what: str
    remedy: str = REPAIR
    intact: bool = False


class Removed(NamedTuple):
    """What a set was made for and is to be taken as forgotten.

    Attributes:
        media: by dataset.
        runs: their folders.
    """

    media: dict[str, list[str]]
    runs: list[Path]


def verify(features: FeatureSet, progress: Progress[tuple[Column, int]]) -> list[Problem]:
    """Read every shard: its bytes, and what other readers are told of it."""
    problems = [
        Problem(column, marker.shard, "its file is truncated or gone")
        for column in features.columns
        for marker in column.damaged
    ]
    # which media were in it is not known any more: a repair could not plan it
    anew = "train" if features.spec.modality == "text" else "extract"
    problems += [
        Problem(column, shard, "its marker is not as it was written", anew)
        for column in features.columns
        for shard in column.unreadable
    ]
    shards = [(column, shard) for column in features.columns for shard in column.markers]
    for column, shard in progress(shards):
        if not column.is_intact(shard):
            problems.append(Problem(column, shard, "its bytes are not those that were written"))
        elif not column.is_told_rightly(shard):
            what = "`valid` or metadata is not as it was written"
            problems.append(Problem(column, shard, what, intact=True))
    return problems


def give_up(problems: Iterable[Problem]) -> None:
    """Take broken shards out of the set, planned to be made again in their places.

    Those whose features are intact stay: what other readers are told is written again.
    """
    by_column: dict[Column, list[int]] = {}
    for problem in problems:
        by_column.setdefault(problem.column, []).append(problem.shard)
    for column, shards in by_column.items():
        ColumnWriter(column).plan_again(shards)


def text_sets(root: Path, lm: str) -> list[FeatureSet]:
    """The sets of text states in a store, that trainings made with the LM from this address."""
    folders = [folder for folder, spec in specs(root).items() if spec.modality == "text"]
    return [s for s in map(open_set, folders) if s.layout.weights_address == lm]


def removed_media(features: FeatureSet, dataset: str) -> list[str]:
    """Media of a catalogue whose files are gone, where their folder is still there.

    Raises:
        EpalmError: all of them are: more likely a disk that is not mounted.
    """
    known = features.catalogue(dataset)
    root = Path(known.root)
    if not root.is_dir():
        return []
    gone = [m for m in known.media if not (root / m).exists()]
    if gone and len(gone) == len(known.media):
        raise EpalmError(
            f"{features.folder}: all {len(gone)} media files of {dataset} are gone from {root}; is "
            "the disk mounted? To forget them all, delete their catalogue"
        )
    return gone


def removed_runs(features: FeatureSet) -> list[Path]:
    """Runs that needed shards of the set and are gone, where the folder of runs is still there."""
    runs = [need.run for need in needs(features) if need.is_readable]
    return [r for r in runs if r.parent.is_dir() and not (r / "recipe.yaml").is_file()]


def garbage(features: FeatureSet, removed: Removed) -> list[Path]:
    """Files that nothing in the set refers to, in the order in which to delete them.

    Shards that no run needs and none of whose media stands in a catalogue, blocks without marker,
    markers that cannot be read, plans that nobody works at, half-written files, what killed
    conversions left. A shard is kept as a whole while one of its rows is wanted.

    Raises:
        EpalmError: without a catalogue or a run, everything would be garbage.
    """
    runs = needs(features)
    if not features.datasets() and not runs:
        what = "note of the runs that need it" if features.spec.modality == "text" else "catalogue"
        raise EpalmError(f"{features.folder}: has no {what}, so nothing says what it is for")
    known = {
        entry.content_hash
        for dataset in features.datasets()
        for media, entry in features.catalogue(dataset).media.items()
        if media not in set(removed.media.get(dataset, []))
    }
    found = [need.record for need in runs if need.run in removed.runs]
    left = [need for need in runs if need.run not in removed.runs]
    for column in features.columns:
        needed = set().union(*(need.among(column) for need in left))
        unknown = {
            shard
            for shard, marker in column.markers.items()
            if shard not in needed and known.isdisjoint(marker.hashes)
        }
        # markers before their blocks
        found += [column.marker_path(n) for n in sorted(unknown.union(column.unreadable))]
        found += sorted((column.folder / "plans").glob("[0-9]*.json"))
        orphans = column.backend.shards() - column.markers.keys()
        found += [p for n in sorted(orphans | unknown) for p in column.backend.files(n)]
    left_over = [p for folder in leftovers(features.folder) for p in sorted(folder.rglob("*"))]
    found += [p for p in left_over if p.is_file()]
    return found + sorted(features.folder.rglob(".*.partial"))


def collect(features: FeatureSet, removed: Removed) -> list[tuple[Path, int]]:
    """Delete `garbage`, and strike removed media off their catalogues; what it was, with sizes.

    Raises:
        EpalmError: an extraction or a training is writing into it.
    """
    with Idle(features):
        found = [(path, path.stat().st_size) for path in garbage(features, removed)]
        for dataset, gone in removed.media.items():
            known = features.catalogue(dataset)
            media = {m: entry for m, entry in known.media.items() if m not in set(gone)}
            unreadable = {m: why for m, why in known.unreadable.items() if m not in set(gone)}
            features.write_catalogue(dataset, Catalogue(known.root, media, unreadable))
        for path, _ in found:
            path.unlink(missing_ok=True)
        for folder in leftovers(features.folder):
            shutil.rmtree(folder, ignore_errors=True)
    return found


class Idle(ExitStack):
    """While it is held, nothing is written into a set. Interrupted plans are dropped.

    Raises:
        EpalmError: something is being written.
    """

    def __init__(self, features: FeatureSet):
        super().__init__()
        self.enter_context(locked(features.folder / ".lock"))
        features.find_columns()
        for column in features.columns:
            self.enter_context(locked(column.folder / ".plans.lock"))
            for path in sorted((column.folder / "plans").glob("[0-9]*.json")):
                stream = claim(path)
                if stream is None:
                    self.close()
                    raise EpalmError(
                        f"{features.folder}: an extraction or a training is writing into it; wait "
                        "for it"
                    )
                with stream:
                    path.unlink()  # an extraction that waits for the lock plans anew
            column.refresh()
