"""What was found in large tars, found once for all commands: their members, or their captions.

A tar has no directory: its members are known only by reading every header, which takes minutes for
shards of many GB, and texts among them by seeking each. What is found lies in the cache folder, as
an archive's own folder may be read-only. It holds as long as the archive's size and time of change
do, like what is known of single media files, and may be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from epalm.address import cache_dir

SMALLEST = 16 * 2**20  # bytes of an archive; smaller ones are read in a second
_FORMAT = 1

T = TypeVar("T")


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

    def columns() -> dict[str, Any]:
        found = scan()
        return {
            "names": list(found),
            "offsets": [member.offset for member in found.values()],
            "sizes": [member.size for member in found.values()],
        }

    def members(tree: dict[str, Any]) -> dict[str, TarMember]:
        found = starmap(TarMember, zip(tree["offsets"], tree["sizes"], strict=True))
        return dict(zip(tree["names"], found, strict=True))

    return found_once(archive, "members", columns, members)


def found_once(archive: Path, what: str, find: Callable[[], Any], meant: Callable[[Any], T]) -> T:
    """What is in an archive: as an earlier command has found it, or as it is found now.

    Args:
        archive: small ones are looked through each time.
        what: is found, as a part of the file's name.
        find: finds it, as a JSON tree.
        meant: what the tree stands for; ValueError, KeyError or TypeError where it is broken.

    Raises:
        EpalmError: as `find`; then nothing is kept.
        OSError: there is no such archive.
    """
    version = _version(archive)
    if version["bytes"] < SMALLEST:
        return meant(find())
    path = index_path(archive, what)
    try:
        kept = json.loads(path.read_bytes())
        if {key: kept[key] for key in version} == version:
            return meant(kept[what])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is nothing whole
    tree = find()
    if _version(archive) == version:  # else it is still being written
        _write(path, version | {what: tree})
    return meant(tree)


def index_path(archive: Path, what: str = "members") -> Path:
    """Where it is kept what was found in an archive."""
    name = hashlib.sha256(os.fsencode(archive.resolve())).hexdigest()
    return cache_dir() / "archives" / f"{name}-{what}.json"


def _version(archive: Path) -> dict[str, Any]:
    stat = archive.stat()
    return {
        "format": _FORMAT,
        "archive": str(archive.resolve()),
        "bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
    }


def _write(path: Path, tree: dict[str, Any]) -> None:
    """Nothing is said where nothing can be written: the next command looks again."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # under a name of its own: several processes may write the same file
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            partial = Path(stream.name)
            json.dump(tree, stream, separators=(",", ":"))
        partial.replace(path)
    except OSError:
        if partial is not None:
            partial.unlink(missing_ok=True)
