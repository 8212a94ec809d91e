"""Which runs need which shards of a feature set that no dataset's catalogue speaks of.

An LM's text states are made by trainings, each for its own texts. Each notes in the set where they
stand, as `cache gc` cannot know otherwise what is still wanted:

    SET/runs/1a2b….json       {"run": folder of the run, "shards": {"text12-4-4": [0, 3], …}}

While a training still makes them, `shards` is null: it may need any. So does a record that is not
as it was written, until it is deleted or its run is trained again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epalm.store.atomic import locked, write_atomic
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet


class Need(NamedTuple):
    """What a run needs of a set.

    Attributes:
        record: the file that says so.
        run: the run's folder; the record itself where it is not as it was written.
        shards: by column; None: any.
    """

    record: Path
    run: Path
    shards: Mapping[str, Sequence[int]] | None

    @property
    def is_readable(self) -> bool:
        """The record is as it was written, and says which run it is of."""
        return self.run != self.record

    def among(self, column: Column) -> set[int]:
        """The shards of a column that the run needs."""
        if self.shards is None:
            return set(column.markers)
        return set(self.shards.get(column.folder.name, ()))


def note_need(features: FeatureSet, run: Path, shards: Mapping[str, Sequence[int]] | None) -> None:
    """Write down what a run needs, in the place of what it needed before."""
    if not os.access(features.folder, os.W_OK):
        return  # nor can anybody tidy it up from here
    run = run.resolve()
    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    text = json.dumps({"run": str(run), "shards": shards})
    with locked(features.folder / ".lock"):  # processes that train together write it all at once
        write_atomic(features.folder / "runs" / f"{name}.json", text)


def needs(features: FeatureSet) -> list[Need]:
    """What runs need of a set, by the run's folder; a record that cannot be read counts as any."""
    records = sorted((features.folder / "runs").glob("[!.]*.json"))
    return sorted(map(_read, records), key=lambda need: need.run)


def unreadable_needs(features: FeatureSet) -> list[str]:
    """A line for each record that is not as it was written: what follows, and the remedy."""
    return [
        f"{need.record}: `run` or `shards` is not as a training wrote it, so that every shard "
        "counts as needed; train its run again, or delete the file"
        for need in needs(features)
        if not need.is_readable
    ]


def _read(record: Path) -> Need:
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        run, shards = Path(tree["run"]), tree["shards"]
    except (ValueError, TypeError, KeyError):
        return Need(record, record, None)
    if not run.is_absolute() or not (shards is None or _are_shards(shards)):
        return Need(record, record, None)
    return Need(record, run, shards)


def _are_shards(tree: Any) -> bool:
    """Lists of numbers by column; of anything else `cache gc` would take too little for needed."""
    return isinstance(tree, dict) and all(
        isinstance(some, list) and all(type(number) is int for number in some)
        for some in tree.values()
    )
