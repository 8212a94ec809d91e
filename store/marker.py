"""What stands in a shard: its rows in order, planned first, and marked when the shard is there."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Row(NamedTuple):
    """One view of the media with this content hash."""

    content_hash: str
    view: int


class Failure(NamedTuple):
    """Why a media has no features; `exception` is the kind of error."""

    media: str
    reason: str
    exception: str


@dataclass(frozen=True)
class Plan:
    """The rows of a shard, in order; all of one view."""

    shard: int
    view: int
    hashes: list[str]

    @property
    def rows(self) -> list[Row]:
        return [Row(h, self.view) for h in self.hashes]


@dataclass(frozen=True)
class Marker(Plan):
    """A shard that is there.

    Attributes:
        dtype: its number format.
        sha256: of its rows' bytes.
        failed: by content hash, why a row holds nothing.
    """

    dtype: str
    sha256: str
    failed: dict[str, Failure] = field(default_factory=dict)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(rows,) False where a row holds nothing."""
        return np.array([h not in self.failed for h in self.hashes])

    @classmethod
    def read(cls, path: Path) -> "Marker | None":
        """The marker in a file; None when it is not as it was written."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            seal = tree.pop("seal")
            marker = cls(**{**tree, "failed": {h: Failure(*f) for h, f in tree["failed"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return marker if marker._seal() == seal else None

    def text(self) -> str:
        """What `read` reads."""
        return json.dumps({**vars(self), "seal": self._seal()})

    def _seal(self) -> str:
        """SHA-256 of what the marker says."""
        return hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()
