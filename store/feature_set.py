"""A feature set on disk: shards, their markers, the catalogue of media, the failure ledger.

    ROOT/ENCODER-FINGERPRINT/
        spec.json                 what made it (FeatureSpec)
        layout.json               backend, rows per shard, address of the encoder's weights
        zarr.json, features/, valid/   the shards (see the backend)
        markers/000000.json       which media stand in shard 0, and its checksum; written last
        catalogue/DATASET.json    media id -> content hash, size and time of change
        failures.jsonl            media that could not be encoded, and why
        extraction.json           time and rate of the last extraction into it

Features are filed by the media's content hash, so that equal files are encoded once, whatever
their names and datasets. A shard counts only when its marker is there; the index is rebuilt from
the markers at every opening.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epalm.errors import EpalmError
from epalm.store.atomic import read_json_lines, write_atomic
from epalm.store.backend import ShardBackend, open_backend
from epalm.store.spec import FeatureSpec
from epalm.store.stage import Stage

ROW_TOKENS = 1  # tokens a layer: only [CLS] is kept


@dataclass(frozen=True)
class Layout:
    """How a set is laid out; none of it changes a feature's value.

    Attributes:
        backend: name of the shard backend.
        shard_rows: media per shard.
        weights_address: where the encoder's weights came from.
    """

    backend: str
    shard_rows: int
    weights_address: str


class CatalogueEntry(NamedTuple):
    """A media file as it was when it was extracted; size in bytes, time in ns."""

    content_hash: str
    size: int
    mtime_ns: int


class FeatureSet:
    """One feature set, open for reading; `writing()` opens it for appending shards."""

    def __init__(self, folder: Path, spec: FeatureSpec, layout: Layout):
        self.folder, self.spec, self.layout = folder, spec, layout
        self.row_shape = (spec.layers, ROW_TOKENS, spec.dim)
        self.backend: ShardBackend = open_backend(
            layout.backend, folder, self.row_shape, spec.dtype, layout.shard_rows
        )
        self._read_markers()

    @classmethod
    def create(cls, root: Path, spec: FeatureSpec, layout: Layout) -> "FeatureSet":
        """Open the set that this spec names, made when it is not there yet."""
        folder = root / _folder_name(spec)
        if not (folder / "layout.json").is_file():
            write_atomic(folder / "spec.json", spec.canonical())
            write_atomic(folder / "layout.json", json.dumps(vars(layout)))
        return _open(folder)

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self, hashes: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers (n,) of media given by content hash; KeyError when one is not there."""
        return np.array([self._row_of[h] for h in hashes], np.int64)

    def gather(self, rows: NDArray[np.int64], layers: slice) -> NDArray[np.generic]:
        """Features of these rows and encoder layers, copied: (n, layers, tokens, D)."""
        shards, offsets = np.divmod(rows, self.layout.shard_rows)
        kept = len(range(self.spec.layers)[layers])
        out = np.empty((len(rows), kept, ROW_TOKENS, self.spec.dim), self.spec.dtype)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._block(int(shard))[offsets[here], layers]
        return out

    def _block(self, shard: int) -> NDArray[np.generic]:
        """A shard's rows, mapped; its checksum is compared when it is first used."""
        block = self.backend.map(shard)
        if shard not in self._checked:
            if hashlib.sha256(block.data).hexdigest() != self._sha256[shard]:
                raise EpalmError(
                    f"{self.folder}: shard {shard} does not have the checksum it was written "
                    f"with; delete {self._marker_path(shard)} and run `extract` again"
                )
            self._checked.add(shard)
        return block

    def catalogue(self, dataset: str) -> dict[str, CatalogueEntry]:
        """What is known of a dataset's media, by id; empty when none was extracted."""
        path = self._catalogue_path(dataset)
        if not path.is_file():
            return {}
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {media: CatalogueEntry(*entry) for media, entry in entries.items()}

    def last_extraction(self) -> Stage | None:
        """What the last extraction into this set took."""
        path = self.folder / "extraction.json"
        return Stage(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def failures(self) -> list[dict[str, str]]:
        """The ledger: dataset, media, hash, reason and exception of each failure, in order."""
        return read_json_lines(self.folder / "failures.jsonl")

    @contextmanager
    def writing(self) -> Iterator["FeatureSetWriter"]:
        """Append to the set; EpalmError when another process is doing so."""
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EpalmError(
                    f"{self.folder}: another extraction is writing this feature set; wait for it"
                ) from None
            self._read_markers()  # another writer may have been at work before the lock
            yield FeatureSetWriter(self)

    def _read_markers(self) -> None:
        self.damaged: list[int] = []
        self.next_shard = 0
        self._row_of: dict[str, int] = {}
        self._sha256: dict[int, str] = {}
        self._checked: set[int] = set()
        for path in sorted((self.folder / "markers").glob("*.json")):
            self._index(json.loads(path.read_text(encoding="utf-8")))

    def _index(self, marker: dict[str, Any]) -> None:
        shard = marker["shard"]
        self.next_shard = max(self.next_shard, shard + 1)
        if not self.backend.is_whole(shard):
            self.damaged.append(shard)
            return
        self._sha256[shard] = marker["sha256"]
        for offset, (content_hash, valid) in enumerate(marker["rows"]):
            if valid:
                self._row_of[content_hash] = shard * self.layout.shard_rows + offset

    def _marker_path(self, shard: int) -> Path:
        return self.folder / "markers" / f"{shard:06}.json"

    def _catalogue_path(self, dataset: str) -> Path:
        safe = re.sub(r"[^\w.-]", "_", dataset)
        return self.folder / "catalogue" / f"{safe}.json"


class FeatureSetWriter:
    """Appends to a feature set; held by one process at a time."""

    def __init__(self, features: FeatureSet):
        self.features = features

    def append(
        self, hashes: Sequence[str], rows: NDArray[np.generic], valid: NDArray[np.bool_]
    ) -> None:
        """Write one shard: block first, its marker last.

        Args:
            hashes: content hash of each row's media, at most `shard_rows` of them.
            rows: (n, L, tokens, D).
            valid: (n,) False where encoding failed; such a row is kept but never found.

        Raises:
            EpalmError: values that the stored number format cannot hold.
        """
        features = self.features
        dtype = features.spec.dtype
        with np.errstate(over="ignore"):
            stored = rows.astype(dtype)
        if not np.isfinite(stored).all():
            largest = np.abs(rows).max()
            remedy = "extract with --set store.dtype=float32"
            if not np.isfinite(largest):
                remedy = "the encoder's arithmetic overflows; extract with encoder.dtype=float32"
            raise EpalmError(
                f"{features.folder}: features that {dtype} cannot hold (largest magnitude "
                f"{largest:g}); {remedy}"
            )
        marker = {
            "shard": features.next_shard,
            "view": features.spec.view,
            "rows": [[h, bool(ok)] for h, ok in zip(hashes, valid, strict=True)],
            "sha256": features.backend.write(features.next_shard, stored, valid),
        }
        write_atomic(features._marker_path(features.next_shard), json.dumps(marker))
        features._index(marker)

    def catalogue(self, dataset: str, entries: dict[str, CatalogueEntry]) -> None:
        """Add media to a dataset's catalogue, by id."""
        merged = self.features.catalogue(dataset) | entries
        text = json.dumps(merged, sort_keys=True, indent=0)
        write_atomic(self.features._catalogue_path(dataset), text)

    def record_extraction(self, stage: Stage) -> None:
        """Note what this extraction took."""
        write_atomic(self.features.folder / "extraction.json", json.dumps(stage._asdict()))

    def record_failure(
        self, dataset: str, media: str, content_hash: str, reason: str, exception: str
    ) -> None:
        """Add a line to the ledger; the hash is empty for a file that cannot be read."""
        entry = {
            "dataset": dataset,
            "media": media,
            "hash": content_hash,
            "reason": reason,
            "exception": exception,
        }
        with (self.features.folder / "failures.jsonl").open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(entry) + "\n")

    def drop_damaged(self) -> int:
        """Forget shards whose file is truncated or gone, so that their media are encoded again."""
        for shard in self.features.damaged:
            self.features._marker_path(shard).unlink()
        count = len(self.features.damaged)
        self.features.damaged = []
        return count


def find(root: Path, spec: FeatureSpec, weights_address: str) -> FeatureSet:
    """The set that a training needs.

    Args:
        root: folder with feature sets.
        spec: what is needed. Where its `weights` is empty, because the weights are not at hand,
            a set fits whose weights came from the same address.
        weights_address: the recipe's.

    Raises:
        EpalmError: there is none, and then which fields the nearest one differs in; or several.
    """
    specs = {path.parent: _read_spec(path.parent) for path in sorted(root.glob("*/spec.json"))}
    fitting = [_open(folder) for folder, known in specs.items() if known and spec.matches(known)]
    if not spec.weights:
        fitting = [s for s in fitting if s.layout.weights_address == weights_address]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(s.folder.name for s in fitting)
        raise EpalmError(
            f"{root}: {names} differ only in the encoder's weights, which are not at hand; "
            "provide the weights, or keep one of them"
        )
    readable = {folder: known for folder, known in specs.items() if known}
    if not readable:
        raise EpalmError(f"{root}: no feature set here; run `extract` with this recipe first")
    folder, nearest = min(readable.items(), key=lambda item: len(spec.differences(item[1])))
    lines = "\n".join(f"  {line}" for line in spec.differences(nearest))
    raise EpalmError(
        f"{root}: no feature set fits this recipe; the nearest, {folder.name}, differs in\n"
        f"{lines}\nrun `extract` with this recipe, or change the recipe"
    )


def _read_spec(folder: Path) -> FeatureSpec | None:
    """The spec of a set, or None when it cannot be read (another format version, say)."""
    try:
        return FeatureSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def _open(folder: Path) -> FeatureSet:
    spec = _read_spec(folder)
    try:
        layout = Layout(**json.loads((folder / "layout.json").read_text(encoding="utf-8")))
        if spec is None:
            raise ValueError("spec.json")
        return FeatureSet(folder, spec, layout)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EpalmError(
            f"{folder}: not a readable feature set ({error!r}); move it away and extract again"
        ) from None


def _folder_name(spec: FeatureSpec) -> str:
    return f"{spec.encoder.rsplit('/', 1)[-1]}-{spec.fingerprint}"
