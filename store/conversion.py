"""Moving a feature set to another backend."""

import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from epalm.errors import EpalmError
from epalm.store.atomic import write_atomic
from epalm.store.backend import check_backend
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet, Layout, open_set
from epalm.store.interrupted import NEW, OLD, beside, finish_conversion, leftovers
from epalm.store.maintenance import Idle, Progress


def convert(
    features: FeatureSet, backend: str, progress: Progress[tuple[Column, int]]
) -> FeatureSet:
    """The same features under another backend, in the same place; every checksum is compared.

    Trainings must not be reading the set. The old files are removed when the new ones are complete;
    interrupted at any moment, the set is there, in one form or the other, and what is half made is
    removed: by this conversion, or after a kill by the next one or `cache gc`.

    Raises:
        EpalmError: no such backend, an extraction is running, a shard is broken, or another process
            came for the set just when folders changed places.
    """
    check_backend(backend)
    work, old = beside(features.folder, NEW), beside(features.folder, OLD)

    def tidy() -> None:
        finish_conversion(features.folder)  # interrupted while folders changed places
        for leftover in leftovers(features.folder):
            shutil.rmtree(leftover, ignore_errors=True)

    with Idle(features):
        tidy()
        _check_markers(features)
        try:
            _write(features, replace(features.layout, backend=backend), work, progress)
            features.folder.rename(old)
            _put_in_place(work, features.folder)
            shutil.rmtree(old, ignore_errors=True)  # `cache gc` may be at it
        finally:
            tidy()
    return open_set(features.folder)


def _put_in_place(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise EpalmError(
            f"{folder}: another process came for the set while its folders changed places; it is "
            "as it was; repeat the command when nothing else uses it"
        ) from None


def _check_markers(features: FeatureSet) -> None:
    """EpalmError when a shard cannot be converted, as its file or its marker is not whole."""
    for column in features.columns:
        if column.damaged:
            raise EpalmError(f"{column.folder}: has damaged shards; run `cache repair` first")
        for shard in column.unreadable:
            raise EpalmError(
                f"{column.marker_path(shard)}: not as it was written; `cache verify` names all "
                "such markers, and what makes their shards again"
            )


def _write(
    features: FeatureSet, layout: Layout, work: Path, progress: Progress[tuple[Column, int]]
) -> None:
    """Make the set in the folder `work`, laid out anew."""
    names = [column.folder.name for column in features.columns]
    ignored = shutil.ignore_patterns("layout.json", "*.lock", "*.partial", *names)
    shutil.copytree(features.folder, work, ignore=ignored)
    write_atomic(work / "layout.json", json.dumps(asdict(layout)))
    for column in features.columns:
        write_atomic(work / column.folder.name / "column.json", column.column.canonical())
    into = {c.folder.name: c for c in FeatureSet(work, features.spec, layout).columns}
    for column in features.columns:
        into[column.folder.name].backend.reserve(max(column.markers, default=-1) + 1)
    for column, shard in progress([(c, n) for c in features.columns for n in c.markers]):
        _copy_shard(column, into[column.folder.name], shard)


def _copy_shard(source: Column, target: Column, shard: int) -> None:
    marker = source.markers[shard]
    block = target.backend.draft(shard, source.block(shard), marker.valid)
    if block.sha256 != marker.sha256:
        block.discard()
        raise EpalmError(f"{source.folder}: shard {shard} is broken; run `cache repair` first")
    block.publish()
    write_atomic(target.marker_path(shard), marker.text())
