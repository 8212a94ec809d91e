"""Moving a feature set to another backend."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np

from epalm.errors import EpalmError
from epalm.store.atomic import write_atomic
from epalm.store.backend import check_backend
from epalm.store.column import Column
from epalm.store.feature_set import OLD, FeatureSet, open_set
from epalm.store.maintenance import Idle, Progress


def convert(
    features: FeatureSet, backend: str, progress: Progress[tuple[Column, int]]
) -> FeatureSet:
    """The same features under another backend, in the same place; every checksum is compared.

    Trainings must not be reading the set. The old files are removed when the new ones are complete;
    interrupted at any moment, the set is there, in one form or the other.

    Raises:
        EpalmError: no such backend, an extraction is running, or a shard is broken.
    """
    check_backend(backend)
    layout = replace(features.layout, backend=backend)
    work = features.folder.with_name(f".converting-{features.folder.name}")
    old = features.folder.with_name(OLD + features.folder.name)
    with Idle(features):
        for leftover in (work, old):  # of an interrupted conversion
            shutil.rmtree(leftover, ignore_errors=True)
        if damaged := [c.folder for c in features.columns if c.damaged]:
            raise EpalmError(f"{damaged[0]}: has damaged shards; run `cache repair` first")
        ignored = shutil.ignore_patterns("layout.json", "*.lock", "*.partial", *_names(features))
        shutil.copytree(features.folder, work, ignore=ignored)
        write_atomic(work / "layout.json", json.dumps(asdict(layout)))
        for column in features.columns:
            write_atomic(work / column.folder.name / "column.json", column.column.canonical())
        into = {c.folder.name: c for c in FeatureSet(work, features.spec, layout).columns}
        for column in features.columns:
            into[column.folder.name].backend.reserve(max(column.markers, default=-1) + 1)
        for column, shard in progress([(c, n) for c in features.columns for n in c.markers]):
            _copy_shard(column, into[column.folder.name], shard)
        features.folder.rename(old)
        work.rename(features.folder)
        shutil.rmtree(old)
    return open_set(features.folder)


def _names(features: FeatureSet) -> list[str]:
    return [column.folder.name for column in features.columns]


def _copy_shard(source: Column, target: Column, shard: int) -> None:
    marker = source.markers[shard]
    valid = np.array([h not in marker.failed for h in marker.hashes])
    block = target.backend.draft(shard, source.block(shard), valid)
    if block.sha256 != marker.sha256:
        block.discard()
        raise EpalmError(f"{source.folder}: shard {shard} is broken; run `cache repair` first")
    block.publish()
    write_atomic(target._marker_path(shard), marker.text())
