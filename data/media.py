"""Media, and the root that their ids are relative to: a folder, or archives.

`data.media_root` may be

    photos                        a folder
    train2014.zip                 a zip or (uncompressed) tar archive
    MSRVTT.zip/MSRVTT/videos/all  a folder inside one
    {train2014,val2014}.zip       several archives, whose members must have different names
    cc3m/{00000..00331}.tar       a numbered list, as WebDataset writes shards
    cc3m/*.tar                    all that fit

In a folder, symbolic links may lead anywhere; it is yours. In an archive they may not leave it.
"""

import errno
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from epalm.data.archives import Member, is_archive, list_members, read_member
from epalm.errors import EpalmError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class Media:
    """One image, video or audio file.

    Attributes:
        id: path relative to the dataset's media root, with forward slashes.
        path: where the file is on this machine, or the archive that holds it; it may be missing.
        member: the file in that archive; None: `path` is the file.
    """

    id: str
    path: Path
    member: Member | None = None

    def version(self) -> tuple[int, int]:
        """Size in bytes, and time of last change in ns; of a member, its archive's.

        As long as both stay the same, so does the content. OSError when there is no such file.
        """
        stat = self.path.stat()
        if not S_ISREG(stat.st_mode):  # reading a pipe or a device may never end
            raise OSError(errno.EINVAL, "not a file")
        return stat.st_size if self.member is None else self.member.size, stat.st_mtime_ns

    def exists(self) -> bool:
        """There is such a file."""
        try:
            return bool(self.version())
        except OSError:
            return False

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.id}"

    def read(self) -> bytes:
        """The file's bytes; OSError when they cannot be read."""
        if self.member is None:
            return self.path.read_bytes()
        return read_member(self.path, self.member)

    def sha256(self) -> str:
        """Hash of the file's bytes, as hex; OSError when they cannot be read."""
        if self.member is not None:
            return hashlib.sha256(self.read()).hexdigest()
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


class MediaRoot:
    """Finds media by id.

    Attributes:
        name: what the root is called in the store's catalogue.
        absent: archives that the list names and that are not here; their media are missing.
        members: the files of the archives by id; None: the root is a folder.
    """

    def __init__(self, text: str, *more: str, under: Path | None = None):
        """
        Args:
            text: as `data.media_root` has it.
            more: further lists of archives.
            under: begin each id with its archive's path in this folder, less `.tar`; default: ids
                are the names in the archives.

        Raises:
            EpalmError: an archive that cannot be read, or an id that stands in two of them.
        """
        places = [place for words in (text, *more) for place in expand(words)]
        archives = [
            place for place in places
            if (is_archive(place[0]) and not place[0].exists()) or place[0].is_file()
        ]  # fmt: skip
        self.absent = [path for path, _ in archives if not path.exists()]
        self.members: dict[str, Media] | None = None
        if len(places) > 1 and len(archives) < len(places):
            raise EpalmError(f"data.media_root: {text} names several folders; give one")
        if not archives:
            self._folder = places[0][0] if places else Path(text)
            self.name = str(self._folder.resolve())
            return
        first, inside = archives[0]
        # of what no archive holds: it exists nowhere
        self._folder = first.with_name(f"{first.name}!") / inside
        self.name = str(Path(text).expanduser().absolute())
        self.members = {}
        for path, inside in archives:
            shown = f"{path.relative_to(under).with_suffix('').as_posix()}/" if under else ""
            if path.exists():
                self._add(path, inside, shown)

    def find(self, identifier: str) -> Media:
        """The media of this id, whether it is there or not."""
        if self.members is not None and identifier in self.members:
            return self.members[identifier]
        return Media(identifier, self._folder / identifier)

    def _add(self, archive: Path, inside: str, shown: str) -> None:
        assert self.members is not None
        for name, member in list_members(archive).items():
            if not name.startswith(inside):
                continue
            identifier = shown + name[len(inside) :]
            if identifier in self.members:
                raise EpalmError(
                    f"data.media_root: {identifier} stands in {self.members[identifier].path} and "
                    f"in {archive}; media need different names"
                )
            self.members[identifier] = Media(identifier, archive, member)


def expand(text: str) -> list[tuple[Path, str]]:
    """The folders and archives that a media root names, and of each the folder inside it.

    That folder ends with a slash, or is empty. What does not exist is named as it stands.
    """
    if Path(text).expanduser().exists():
        return [(Path(text).expanduser(), "")]
    found: list[tuple[Path, str]] = []
    for word in _without_braces(text):
        path = Path(word).expanduser()
        matches = sorted(glob.glob(str(path))) if glob.has_magic(word) else [path]
        found += [_split(Path(match)) for match in matches]
    return found


def problem_with_id(text: str) -> str | None:
    """Why a media id cannot be used, or None."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        encoded = b"\0"
    if b"\0" in encoded:
        return "cannot name a file"
    if text.startswith("/") or ".." in text.split("/"):
        return "leaves the media root; write it relative to that (data.media_root)"
    return None


def _split(path: Path) -> tuple[Path, str]:
    """An archive and a folder inside it, where the path leads into one."""
    for parent in path.parents:
        if parent.name and is_archive(parent) and not parent.is_dir():
            return parent, path.relative_to(parent).as_posix() + "/"
    return path, ""


def _without_braces(text: str) -> Iterator[str]:
    """What `{a,b}` and `{000..012}` stand for, in order."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        width = len(first) if first.startswith("0") else 0
        words = [f"{n:0{width}}" for n in range(int(first), int(last) + 1)]
    else:
        words = match[1].split(",")
    for word in words:
        yield from _without_braces(text[: match.start()] + word + text[match.end() :])
