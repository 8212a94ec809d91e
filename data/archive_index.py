"""An index of a large tar on disk: its members and where they lie, found once for all commands.

A tar has no directory: its members are known only by reading every header, which takes minutes for
shards of many GB. The index lies in the cache folder, as an archive's own folder may be read-only.
It holds as long as the archive's size and time of change do, like what is known of single media
files, and may be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from epalm.address import cache_dir

SMALLEST = 16 * 2**20  # bytes of an archive; the headers of smaller ones are read in a second
_FORMAT = 1


class TarMember(NamedTuple):
    """A file in a tar: where its bytes begin, and how many there are."""

    offset: int
    size: int


def indexed(archive: Path, scan: Callable[[], dict[str, TarMember]]) -> dict[str, TarMember]:
    """A tar's members by name: from its index, or by `scan`, of which the index is made.

    Raises:
        EpalmError: as `scan`; of such an archive there is no index.
        OSError: there is no such archive.
    """
    version = _version(archive)
    if version["bytes"] < SMALLEST:
        return scan()
    path = index_path(archive)
    found = _read(path, version)
    if found is None:
        found = scan()
        if _version(archive) == version:  # else it is still being written
            _write(path, version, found)
    return found


def index_path(archive: Path) -> Path:
    """Where the index of an archive is."""
    name = hashlib.sha256(os.fsencode(archive.resolve())).hexdigest()
    return cache_dir() / "archives" / f"{name}.json"


def _version(archive: Path) -> dict[str, Any]:
    stat = archive.stat()
    return {
        "format": _FORMAT,
        "archive": str(archive.resolve()),
        "bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
    }


def _read(path: Path, version: dict[str, Any]) -> dict[str, TarMember] | None:
    """None where there is no whole index of this version of the archive."""
    try:
        index = json.loads(path.read_bytes())
        if {key: index[key] for key in version} != version:
            return None
        members = starmap(TarMember, zip(index["offsets"], index["sizes"], strict=True))
        return dict(zip(index["names"], members, strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, version: dict[str, Any], found: dict[str, TarMember]) -> None:
    """Nothing is said where nothing can be written: the next command reads the headers again."""
    index = version | {
        "names": list(found),
        "offsets": [member.offset for member in found.values()],
        "sizes": [member.size for member in found.values()],
    }
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # under a name of its own: several processes may write the same index
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            partial = Path(stream.name)
            json.dump(index, stream, separators=(",", ":"))
        partial.replace(path)
    except OSError:
        if partial is not None:
            partial.unlink(missing_ok=True)
