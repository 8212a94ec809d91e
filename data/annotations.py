"""Annotation files read with care: every mistake is one message with file, record and field."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from epalm.config import DataConfig
from epalm.errors import EpalmError

Hook = Callable[[list[tuple[str, Any]]], Any]


class Record:
    """One record of an annotation file, and where it stands there.

    Its methods raise EpalmError, with file, record and field, for what is missing or of the wrong
    type.
    """

    __slots__ = ("_fields", "_number", "_path", "_place")

    def __init__(self, fields: dict[str, Any], path: Path, place: str, number: int | None = None):
        """
        Args:
            fields: by name.
            path: of the file.
            place: where in the file, as messages have it; empty: all of it.
            number: that belongs to the place, as in `line 3`.
        """
        self._fields, self._path, self._place, self._number = fields, path, place, number

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def keys(self) -> list[str]:
        return list(self._fields)

    def with_fields(self, fields: dict[str, Any]) -> "Record":
        """Other fields in the same place."""
        return Record(fields, self._path, self._place, self._number)

    def error(self, problem: str) -> EpalmError:
        """A mistake in this record."""
        return EpalmError(f"{self._path}{self._inside()}: {problem}")

    def text(self, key: str, empty: bool = False) -> str:
        """A text without blanks around it; `empty` allows that nothing is left."""
        value = self._get(key)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.error(f"field {key!r} is {shown(value)}; it must be a text, not empty")
        return self._encodable(key, value)

    def text_or_null(self, key: str) -> str | None:
        """A text as of `text`; None where the file has null."""
        return None if self._get(key) is None else self.text(key)

    def identifier(self, key: str) -> str:
        """An id, which files give as a whole number or as a text."""
        value = self._get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {key!r} is {shown(value)}; give a whole number or a text")
        return self._encodable(key, value)

    def number(self, key: str) -> int:
        """A whole number, or a text that is one."""
        text = self.identifier(key)
        try:
            return int(text)
        except ValueError:
            raise self.error(f"field {key!r} is {text!r}; it must be a whole number") from None

    def score(self, key: str) -> float:
        """A number that is not negative."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"field {key!r} is {shown(value)}; it must be a number")
        if not math.isfinite(value) or value < 0:
            raise self.error(f"field {key!r} is {value}; it must be finite and not negative")
        return float(value)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise self.error(f"field {key!r} is {shown(value)}; it must be true or false")
        return value

    def texts(self, key: str, empty: bool = False) -> list[str]:
        """A list of at least one text, without blanks around them; `empty` as in `text`."""
        value = self._get(key)
        if not isinstance(value, list) or not value:
            raise self.error(f"field {key!r} must be a list of at least one text")
        for text in value:
            if not isinstance(text, str) or not (empty or text.strip()):
                raise self.error(f"field {key!r} holds {shown(text)}; give texts, not empty")
        return [self._encodable(key, text) for text in value]

    def identifiers(self, key: str) -> list[str]:
        """A list of ids."""
        value = self._list(key)
        return [self.with_fields({key: v}).identifier(key) for v in value]

    def record(self, key: str) -> "Record":
        """A record inside this one."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self.error(f"field {key!r} is {shown(value)}; it must be an object")
        return Record(value, self._path, f"{self._inside()[2:]}, {key}".removeprefix(", "))

    def records(self, key: str) -> Iterator["Record"]:
        """The records of a list inside this one."""
        place = f"{self._inside()[2:]}, {key}".removeprefix(", ")
        return _records(self._list(key), self._path, place)

    def column(self, key: str, field: str) -> list[str]:
        """One text of each record of a list inside this one; texts may be empty."""
        try:
            texts = [item[field].strip() for item in self._fields[key]]
            "".join(texts).encode()
        except (KeyError, TypeError, AttributeError, UnicodeError):  # said by those who look closer
            return [record.text(field, empty=True) for record in self.records(key)]
        return texts

    def _inside(self) -> str:
        """The place behind the path, in a message."""
        number = "" if self._number is None else f" {self._number}"
        return f", {self._place}{number}" if self._place else ""

    def _get(self, key: str) -> Any:
        if key not in self._fields:
            raise self.error(f"field {key!r} is missing")
        return self._fields[key]

    def _encodable(self, key: str, text: str) -> str:
        """A field's text without blanks around it, if UTF-8 can hold it."""
        try:
            text.encode()
        except UnicodeEncodeError:  # of JSON's \ud800 alone, say
            raise self.error(
                f"field {key!r} holds half of a surrogate pair: {shown(text)}; write the whole "
                "character, or leave it out"
            ) from None
        return text.strip()

    def _list(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self.error(f"field {key!r} is {shown(value)}; it must be a list")
        return value


def annotation_file(config: DataConfig, name: str) -> Path:
    """A file in the folder `data.path`; EpalmError when it is not there."""
    folder = Path(config.path).expanduser()
    path = folder / name
    if not path.is_file():
        raise EpalmError(
            f"{path}: no such annotation file; data.path must be the folder that holds it "
            "(docs/datasets.md has the layout)"
        )
    return path


def files_by_split(config: DataConfig, default: dict[str, str]) -> dict[str, Path]:
    """The annotation file of each split: those that the recipe names, or the usual ones.

    Of the usual ones, some may be missing; EpalmError when all are, or one that the recipe names.
    """
    if config.files:
        return {split: annotation_file(config, name) for split, name in config.files.items()}
    folder = Path(config.path).expanduser()
    found = {s: folder / name for s, name in default.items() if (folder / name).is_file()}
    if not found:
        raise EpalmError(
            f"data.path: {folder} holds none of {', '.join(default.values())}; see "
            "docs/datasets.md, or name others in data.files"
        )
    return found


def read_object(path: Path, hook: Hook | None = None) -> Record:
    """A JSON file that holds one object; `hook` makes each object in it of its fields in order."""
    value = _read_json(path, hook)
    if not isinstance(value, dict):
        raise EpalmError(f"{path}: must hold a JSON object, not {shown(value)}")
    return Record(value, path, "")


def read_list(path: Path) -> Iterator[Record]:
    """A JSON file that holds a list of objects."""
    value = _read_json(path)
    if not isinstance(value, list):
        raise EpalmError(f"{path}: must hold a list of JSON objects, not {shown(value)}")
    return _records(value, path, "record")


def read_table(
    path: Path, columns: list[str], tabs: bool = False, header: bool = True
) -> Iterator[Record]:
    """A CSV file, whose cells are texts; records are named by their last line.

    Args:
        path: the file.
        columns: that it must have; without `header`, all that it has.
        tabs: cells are separated by tabs, and quotes mean nothing.
        header: the first line names the columns.

    Raises:
        EpalmError: missing columns or two of one name, rows of another length, an open quote.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if tabs:
                rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
            else:
                rows = csv.reader(stream, strict=True)
            names = next(rows, []) if header else columns
            distinct(f"{path}, line 1")([(name, None) for name in names if name])
            if missing := [c for c in columns if c not in names]:
                mark = "tabs" if tabs else "commas"
                raise EpalmError(
                    f"{path}, line 1: column {missing[0]!r} is missing; it has "
                    f"{', '.join(map(repr, names)) or 'none'}; {mark} stand between columns"
                )
            for cells in rows:
                if not cells:
                    continue
                place = f"line {rows.line_num}"
                if len(cells) != len(names):
                    raise EpalmError(
                        f"{path}, {place}: has {len(cells)} cells where {len(names)} columns are; "
                        "is the file cut off, or a quote missing?"
                    )
                yield Record(dict(zip(names, cells, strict=True)), path, place)
    except OSError as error:
        raise EpalmError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EpalmError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise EpalmError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from None


def distinct(place: Path | str) -> Hook:
    """A hook that refuses a name that stands twice in an object, of which Python keeps the last.

    Args:
        place: the file, or where in it.
    """

    def check(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(fields)
        if len(found) < len(fields):
            names = Counter(name for name, _ in fields)
            again = next(name for name, count in names.items() if count > 1)
            raise EpalmError(f"{place}, {again}: stands there {names[again]} times")
        return found

    return check


def _read_json(path: Path, hook: Hook | None = None) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=hook)
    except OSError as error:
        raise EpalmError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EpalmError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except RecursionError:
        raise EpalmError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise EpalmError(f"{path}: not valid JSON ({error}); is the file cut off?") from None


def _records(values: list[Any], path: Path, name: str) -> Iterator[Record]:
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise EpalmError(f"{path}, {name} {number}: must be an object, not {shown(value)}")
        yield Record(value, path, name, number)


def shown(value: Any) -> str:
    """A value, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
