"""Looking after a feature set: verify it, tidy it up, move it to another backend."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from epalm.errors import EpalmError
from epalm.store.atomic import claim, locked, write_atomic
from epalm.store.backend import BACKENDS
from epalm.store.column import Column, ColumnWriter
from epalm.store.feature_set import Catalogue, FeatureSet, open_set

T = TypeVar("T")
Progress = Callable[[Iterable[T]], Iterable[T]]
"""Wraps what is gone through one by one, to show a bar."""


class Problem(NamedTuple):
    """A shard whose features cannot be used."""

    column: Column
    shard: int
    what: str


def verify(features: FeatureSet, progress: Progress[tuple[Column, int]]) -> list[Problem]:
    """Read every shard and compare its checksum."""
    problems = [
        Problem(column, marker.shard, "its file is truncated or gone")
        for column in features.columns
        for marker in column.damaged
    ]
    shards = [(column, shard) for column in features.columns for shard in column.markers]
    for column, shard in progress(shards):
        if not column.is_intact(shard):
            problems.append(Problem(column, shard, "its bytes are not those that were written"))
    return problems


def give_up(problems: Iterable[Problem]) -> None:
    """Take broken shards out of the set, planned to be made again in their places."""
    by_column: dict[Column, list[int]] = {}
    for problem in problems:
        by_column.setdefault(problem.column, []).append(problem.shard)
    for column, shards in by_column.items():
        known = [*column.markers.values(), *column.damaged]
        ColumnWriter(column).plan_again([m for m in known if m.shard in shards])


def forget_removed(features: FeatureSet, dataset: str) -> list[str]:
    """Strike media off a catalogue whose files are gone, where their folder is still there."""
    with locked(features.folder / ".lock"):
        known = features.catalogue(dataset)
        if not Path(known.root).is_dir():
            return []
        gone = [m for m in known.media if not (Path(known.root) / m).exists()]
        media = {m: entry for m, entry in known.media.items() if m not in gone}
        features.write_catalogue(dataset, Catalogue(known.root, media))
    return gone


def garbage(features: FeatureSet) -> dict[Path, int]:
    """What nothing in the set refers to, with its size in bytes.

    Shards none of whose media stands in a catalogue, blocks without marker, plans that nobody
    works at, half-written files.

    Raises:
        EpalmError: an extraction is running.
    """
    with _Idle(features):
        return {path: _size(path) for path in _garbage(features)}


def collect(features: FeatureSet) -> dict[Path, int]:
    """Delete `garbage`; returns what it was."""
    with _Idle(features):
        found = {path: _size(path) for path in _garbage(features)}
        for path in found:  # in an order that an interruption cannot hurt: markers before blocks
            path.unlink(missing_ok=True)
    return found


def convert(
    features: FeatureSet, backend: str, progress: Progress[tuple[Column, int]]
) -> FeatureSet:
    """The same features under another backend, in the same place; every checksum is compared.

    The old files are removed when the new ones are complete; interrupted before, nothing changes.

    Raises:
        EpalmError: no such backend, an extraction is running, or a shard is broken.
    """
    if backend not in BACKENDS:
        raise EpalmError(f"--to: {backend!r} is not one of {', '.join(BACKENDS)}")
    layout = replace(features.layout, backend=backend)
    work = features.folder.with_name(f".converting-{features.folder.name}")
    old = features.folder.with_name(f".converted-{features.folder.name}")
    with _Idle(features):
        shutil.rmtree(work, ignore_errors=True)
        for name in ("spec.json", "failures.jsonl", "extraction.json", "catalogue"):
            source = features.folder / name
            if source.is_dir():
                shutil.copytree(source, work / name)
            elif source.is_file():
                work.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, work / name)
        write_atomic(work / "layout.json", json.dumps(asdict(layout)))
        for column in features.columns:
            write_atomic(work / column.folder.name / "column.json", column.column.canonical())
        target = FeatureSet(work, features.spec, layout)
        into = {column.folder.name: column for column in target.columns}
        shards = [(column, shard) for column in features.columns for shard in column.markers]
        for column in features.columns:
            into[column.folder.name].backend.reserve(max(column.markers, default=-1) + 1)
        for column, shard in progress(shards):
            _copy_shard(column, into[column.folder.name], shard)
        features.folder.rename(old)
        work.rename(features.folder)
        shutil.rmtree(old)
    return open_set(features.folder)


def _copy_shard(source: Column, target: Column, shard: int) -> None:
    marker = source.markers[shard]
    valid = np.array([h not in marker.failed for h in marker.hashes])
    if target.backend.write(shard, source.block(shard), valid) != marker.sha256:
        raise EpalmError(f"{source.folder}: shard {shard} is broken; run `cache repair` first")
    write_atomic(target._marker_path(shard), json.dumps(asdict(marker)))


class _Idle(ExitStack):
    """Holds every plan of a set and its lock, so that no extraction works at it meanwhile."""

    def __init__(self, features: FeatureSet):
        super().__init__()
        self.enter_context(locked(features.folder / ".lock"))
        for column in features.columns:
            self.enter_context(locked(column.folder / ".plans.lock"))
            for path in sorted((column.folder / "plans").glob("[0-9]*.json")):
                stream = claim(path)
                if stream is None:
                    self.close()
                    raise EpalmError(f"{features.folder}: an extraction is running; wait for it")
                self.enter_context(stream)
            column.refresh()


def _unreferenced(features: FeatureSet, column: Column) -> list[int]:
    """Shards none of whose media any catalogue knows."""
    known = {
        entry.content_hash
        for dataset in features.datasets()
        for entry in features.catalogue(dataset).media.values()
    }
    return [n for n, marker in column.markers.items() if known.isdisjoint(marker.hashes)]


def _garbage(features: FeatureSet) -> list[Path]:
    found: list[Path] = []
    for column in features.columns:
        unreferenced = set(_unreferenced(features, column))
        found += [column._marker_path(n) for n in sorted(unreferenced)]
        found += sorted((column.folder / "plans").glob("[0-9]*.json"))
        orphans = column.backend.shards() - column.markers.keys()
        found += [p for n in sorted(orphans | unreferenced) for p in column.backend.files(n)]
    return found + sorted(features.folder.rglob(".*.partial"))


def _size(path: Path) -> int:
    return path.stat().st_size
