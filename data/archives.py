"""Media inside zip and tar archives, read without unpacking them.

A tar's members are found by their headers, and then read from where they lie; of large ones an
index is kept (`archive_index.py`). A zip has a directory of its own. Open archives are kept open by
each process, up to OPEN_ARCHIVES of them.
"""

import errno
import lzma
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from epalm.data.archive_index import TarMember, indexed
from epalm.errors import EpalmError

OPEN_ARCHIVES = 64  # per process, well below the usual limit of open files
LINKS = 8  # links to links that are followed
SUFFIXES = (".zip", ".tar")

# what zipfile raises for a damaged member; NotImplementedError: of a packing it does not know
_DAMAGED = (
    KeyError, RuntimeError, NotImplementedError, EOFError, struct.error, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError,
)  # fmt: skip
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")


class ZipMember(NamedTuple):
    """A file in a zip: its name there, and its size in bytes once unpacked."""

    name: str
    size: int


Member = TarMember | ZipMember


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive we read.

    Raises:
        EpalmError: an archive whose members cannot be read one by one.
    """
    name = path.name.lower()
    if name.endswith(_PACKED):
        raise EpalmError(
            f"{path}: single files cannot be read out of such an archive quickly; unpack it, or "
            "pack it anew as a plain .tar or .zip"
        )
    return name.endswith(SUFFIXES)


def list_members(archive: Path) -> Mapping[str, Member]:
    """The files in an archive, by their names there.

    Raises:
        EpalmError: not an archive, cut off, or a member that leads out of it.
    """
    try:
        if archive.suffix.lower() == ".zip":
            return _list_zip(archive)
        return indexed(archive, lambda: _list_tar(archive))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise EpalmError(f"{archive}: not a whole {archive.suffix} archive ({error})") from None


def read_member(archive: Path, member: Member) -> bytes:
    """A member's bytes; OSError when they cannot be read, or are not what was packed."""
    modified = archive.stat().st_mtime_ns  # an archive that was written anew is opened anew
    if isinstance(member, TarMember):
        tar = _open_tar(archive, modified)  # held: another thread may push it out of the cache
        pieces: list[bytes] = []
        offset, end = member.offset, member.offset + member.size
        while offset < end:  # one call reads at most 2 GiB
            piece = os.pread(tar.number, end - offset, offset)
            if not piece:
                raise OSError(errno.EIO, "the archive is cut off")
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    try:
        return _open_zip(archive, modified).read(member.name)
    except _DAMAGED as error:
        raise OSError(errno.EIO, f"damaged or encrypted in its archive ({error})") from None


class _Descriptor:
    """A file that is open until nobody uses it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_ARCHIVES)
def _open_tar(archive: Path, modified: int) -> _Descriptor:
    return _Descriptor(archive)


@lru_cache(maxsize=OPEN_ARCHIVES)
def _open_zip(archive: Path, modified: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _list_zip(archive: Path) -> dict[str, ZipMember]:
    found: dict[str, ZipMember] = {}
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise EpalmError(
                    f"{archive}: {info.filename} is a link; those in a zip are not read"
                )
            found[_inside(archive, info.filename)] = ZipMember(info.filename, info.file_size)
    return found


def _list_tar(archive: Path) -> dict[str, TarMember]:
    found: dict[str, TarMember] = {}
    links: dict[str, str] = {}
    with tarfile.open(archive, "r:") as file:
        for info in file:
            name = _inside(archive, info.name)
            if info.issparse():
                raise EpalmError(f"{archive}: {name} is stored with holes; pack it anew without -S")
            if info.isfile():
                found[name] = TarMember(info.offset_data, info.size)
            elif info.islnk():
                links[name] = _inside(archive, info.linkname)
            elif info.issym():
                target = posixpath.join(posixpath.dirname(name), info.linkname)
                links[name] = _inside(archive, target, f"{name} links to {info.linkname}")
    for name, target in links.items():
        for _ in range(LINKS):
            if target in found:  # links to folders, and to nothing, name no file
                found[name] = found[target]
                break
            target = links.get(target, "")
    return found


def _inside(archive: Path, name: str, what: str | None = None) -> str:
    """The name in plain form; EpalmError when it leads out of the archive."""
    plain = posixpath.normpath(name)
    if plain.startswith("/") or plain == ".." or plain.startswith("../"):
        raise EpalmError(f"{archive}: {what or name}, which leaves the archive; pack it anew")
    return plain
