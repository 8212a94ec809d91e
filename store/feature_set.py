"""A feature set on disk: its columns, the catalogue of media, the failure ledger.

    ROOT/ENCODER-FINGERPRINT/
        spec.json                 what made it (FeatureSpec)
        layout.json               backend, rows per shard, address of the encoder's weights
        cls-0-11/                 a column: the class token of layers 0 to 11, view 0
        cls-0-11-views-1a2b3c4d/  a column of augmented views
        catalogue/DATASET.json    media id -> content hash, size and time of change
        failures.jsonl            media without features, and why; drawn up from the markers
        extraction.json           time and rate of the last extraction into it

More media, views, layers or tokens are more shards or columns; what is there is not touched.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from epalm.errors import EpalmError
from epalm.store.atomic import locked, read_json_lines, write_atomic
from epalm.store.backend import check_backend
from epalm.store.column import Column
from epalm.store.interrupted import OLD, finish_conversion
from epalm.store.marker import Failure
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.stage import Stage

OF_A_SET = ("spec.json", "layout.json")


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
    """A media file as it was when it was extracted; size in bytes, time in ns (-1: hash again)."""

    content_hash: str
    size: int
    mtime_ns: int


@dataclass
class Catalogue:
    """What is known of a dataset's media.

    Attributes:
        root: folder that the media ids are relative to, as it was at the last extraction.
        media: by id.
        unreadable: why a media file could not even be read, by id.
    """

    root: str = ""
    media: dict[str, CatalogueEntry] = field(default_factory=dict)
    unreadable: dict[str, Failure] = field(default_factory=dict)


class FeatureSet:
    """One feature set."""

    def __init__(self, folder: Path, spec: FeatureSpec, layout: Layout):
        self.folder, self.spec, self.layout = folder, spec, layout
        self.columns: list[Column] = []
        self.find_columns()

    @classmethod
    def create(cls, root: Path, spec: FeatureSpec, layout: Layout) -> "FeatureSet":
        """Open the set that this spec names, made when it is not there yet.

        Raises:
            EpalmError: there is no such backend, or the folder holds something else.
        """
        check_backend(layout.backend)
        folder = root / folder_name(spec)
        finish_conversion(folder)
        if not _is_made(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock"):
                finish_conversion(folder)  # it may have been moved away just before
                if _read_spec(folder) is None:  # new or damaged; the folder's name says the same
                    write_atomic(folder / "spec.json", spec.canonical())
                if not (folder / "layout.json").is_file():
                    write_atomic(folder / "layout.json", json.dumps(asdict(layout)))
        return open_set(folder)

    def covering(self, wanted: ColumnSpec) -> tuple[list[Column], tuple[int, ...]]:
        """Columns there are that keep the wanted layers, and the layers that none keeps."""
        alike = [
            c
            for c in self.columns
            if (c.column.tokens, c.column.token_count) == (wanted.tokens, wanted.token_count)
            and c.column.augmentation == wanted.augmentation
        ]
        left = set(wanted.layers)
        chosen = []
        for column in sorted(alike, key=lambda c: -len(left & set(c.column.layers))):
            if left & set(column.column.layers):
                chosen.append(column)
                left -= set(column.column.layers)
        return chosen, tuple(sorted(left))

    def columns_for(self, wanted: ColumnSpec) -> list[Column]:
        """Columns that together keep the wanted layers; one is made for those that none keeps.

        Raises:
            EpalmError: somebody has changed what the one to be made says already.
        """
        chosen, missing = self.covering(wanted)
        if not missing:
            return chosen
        with locked(self.folder / ".lock"):
            self.find_columns()  # another process may have made some
            chosen, missing = self.covering(wanted)
            if missing:
                new = ColumnSpec(wanted.tokens, wanted.token_count, missing, wanted.augmentation)
                path = self.folder / new.name / "column.json"
                if path.is_file():
                    raise EpalmError(f"{path}: was changed; make it {new.canonical()} again")
                write_atomic(path, new.canonical())
                self.find_columns()
                chosen, _ = self.covering(wanted)
        return chosen

    def catalogue(self, dataset: str) -> Catalogue:
        """What is known of a dataset's media; empty when none was extracted."""
        path = self._catalogue_path(dataset)
        if not path.is_file():
            return Catalogue()
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            _check_kinds(tree["media"], [str, int, int])
            _check_kinds(tree["unreadable"], [str, str, str])
            if not isinstance(tree["root"], str):
                raise TypeError
            media = {key: CatalogueEntry(*entry) for key, entry in tree["media"].items()}
            unreadable = {key: Failure(*entry) for key, entry in tree["unreadable"].items()}
            return Catalogue(tree["root"], media, unreadable)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise EpalmError(
                f"{path}: not a readable catalogue; delete it and run `extract`, which hashes the "
                "media again and finds their features"
            ) from None

    def datasets(self) -> list[str]:
        """Names of the catalogues there are."""
        return [unquote(p.stem) for p in sorted((self.folder / "catalogue").glob("*.json"))]

    def add_to_catalogue(self, dataset: str, found: Catalogue) -> None:
        """Merge what an extraction found about media into the dataset's catalogue."""
        with locked(self.folder / ".lock"):
            known = self.catalogue(dataset)
            media = {**known.media, **found.media}
            unreadable = {**known.unreadable, **found.unreadable}
            unreadable = {m: why for m, why in unreadable.items() if m not in found.media}
            self.write_catalogue(dataset, Catalogue(found.root, media, unreadable))

    def distrust(self, content_hash: str) -> None:
        """Have media of this hash hashed again, though size and time of their files are known."""
        with locked(self.folder / ".lock"):
            for dataset in self.datasets():
                known = self.catalogue(dataset)
                stale = {
                    media: entry._replace(mtime_ns=-1)
                    for media, entry in known.media.items()
                    if entry.content_hash == content_hash
                }
                if stale:
                    media = {**known.media, **stale}
                    self.write_catalogue(dataset, Catalogue(known.root, media, known.unreadable))

    def write_catalogue(self, dataset: str, catalogue: Catalogue) -> None:
        """Replace a dataset's catalogue."""
        text = json.dumps(vars(catalogue), sort_keys=True, indent=0)
        write_atomic(self._catalogue_path(dataset), text)

    def last_extraction(self) -> Stage | None:
        """What the last extraction into this set took."""
        try:
            text = (self.folder / "extraction.json").read_text(encoding="utf-8")
            return Stage.of(json.loads(text))
        except (FileNotFoundError, ValueError):
            return None

    def record_extraction(self, stage: Stage) -> None:
        """Note what an extraction took, and draw up the ledger."""
        with locked(self.folder / ".lock"):
            write_atomic(self.folder / "extraction.json", json.dumps(stage._asdict()))
            lines = [json.dumps(line) + "\n" for line in self._failures()]
            if lines or self.ledger.is_file():
                write_atomic(self.ledger, "".join(lines))

    @property
    def ledger(self) -> Path:
        """The failure ledger: one JSON object a line."""
        return self.folder / "failures.jsonl"

    def failures(self) -> list[dict[str, str]]:
        """The ledger's entries: media, hash, reason and exception of each; the hash of a file that
        cannot even be read is empty."""
        return read_json_lines(self.ledger, {"reason": str}, whole=True)

    def _failures(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        catalogues = [self.catalogue(dataset) for dataset in self.datasets()]
        known = {entry.content_hash for c in catalogues for entry in c.media.values()}
        for column in self.columns:
            for row, failure in sorted(column.failures.items()):
                if row.content_hash not in known:  # the file was mended since
                    continue
                lines.append({"hash": row.content_hash, "view": row.view,
                              "column": column.folder.name, **failure._asdict()})  # fmt: skip
        for dataset in self.datasets():
            for _, failure in sorted(self.catalogue(dataset).unreadable.items()):
                lines.append({"hash": "", "dataset": dataset, **failure._asdict()})
        return lines

    def find_columns(self) -> None:
        """Open columns that were made since."""
        known = {column.folder for column in self.columns}
        for path in sorted(self.folder.glob("*/column.json")):
            if path.parent not in known:
                self.columns.append(self._open_column(path.parent))
        self.columns.sort(key=lambda column: column.folder.name)

    def _open_column(self, folder: Path) -> Column:
        try:
            column = ColumnSpec.from_json((folder / "column.json").read_text(encoding="utf-8"))
            if column.name != folder.name:
                raise ValueError(f"describes {column.name}")
            return Column(folder, self.spec, column, self.layout.backend, self.layout.shard_rows)
        except (ValueError, TypeError) as error:
            raise EpalmError(
                f"{folder}: its column.json is not readable ({error!r}); write it anew after that "
                "of a column like it, or move the folder away"
            ) from None

    def _catalogue_path(self, dataset: str) -> Path:
        return self.folder / "catalogue" / f"{quote(dataset, safe='')}.json"


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
    readable = specs(root)
    fitting = [open_set(folder) for folder, known in readable.items() if spec.matches(known)]
    if not spec.weights:
        fitting = [s for s in fitting if s.layout.weights_address == weights_address]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(s.folder.name for s in fitting)
        if spec.weights:
            raise EpalmError(f"{root}: {names} are copies of one feature set; keep one of them")
        raise EpalmError(
            f"{root}: {names} differ only in the encoder's weights, which are not at hand; "
            "provide the weights, or keep one of them"
        )
    if not readable:
        raise EpalmError(f"{root}: no feature set here; run `extract` with this recipe first")
    folder, nearest = min(readable.items(), key=lambda item: len(spec.differences(item[1])))
    lines = "\n".join(f"  {line}" for line in spec.differences(nearest))
    raise EpalmError(
        f"{root}: no feature set fits this recipe; the nearest, {folder.name}, differs in\n"
        f"{lines}\nrun `extract` with this recipe, or change the recipe"
    )


def specs(root: Path) -> dict[Path, FeatureSpec]:
    """Folders of the sets in `root` whose spec this version can read."""
    found = {folder: _read_spec(folder) for folder in set_folders(root)}
    return {folder: spec for folder, spec in found.items() if spec}


def set_folders(root: Path) -> list[Path]:
    """Folders of the sets in `root`, readable or not."""
    for moved in root.glob(f"{OLD}*/layout.json"):
        finish_conversion(moved.parent.with_name(moved.parent.name.removeprefix(OLD)))
    # folders whose name begins with a dot are conversions under way
    return sorted({path.parent for name in OF_A_SET for path in root.glob(f"[!.]*/{name}")})


def is_set(folder: Path) -> bool:
    """The folder is a set's, readable or not."""
    return any((folder / name).is_file() for name in OF_A_SET)


def open_set(folder: Path) -> FeatureSet:
    """The set in a folder; EpalmError when it is none."""
    finish_conversion(folder)
    spec = _read_spec(folder)
    if spec is None:
        inside = ", ".join(sorted(f.name for f in specs(folder))[:3])
        hint = f"; the sets in it are {inside}" if inside else ""
        if is_set(folder):
            hint = "; `extract` (of text states: `train`) with the recipe it is of writes it again"
        raise EpalmError(f"{folder}: not a feature set, it has no readable spec.json{hint}")
    path = folder / "layout.json"
    try:
        layout = Layout(**json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(layout.shard_rows, int) or layout.shard_rows < 1:
            raise ValueError(f"shard_rows: {layout.shard_rows!r}")
        check_backend(layout.backend)
    except (OSError, ValueError, TypeError, EpalmError) as error:
        raise EpalmError(
            f"{path}: not readable ({error}); write it anew: backend, shard_rows and "
            "weights_address, as in another feature set of this kind"
        ) from None
    return FeatureSet(folder, spec, layout)


def folder_name(spec: FeatureSpec) -> str:
    """Name of a set's folder: the architecture, for people, and the fingerprint."""
    return f"{spec.encoder.rsplit('/', 1)[-1]}-{spec.fingerprint}"


def _check_kinds(records: dict[str, list[Any]], kinds: list[type]) -> None:
    """TypeError when a record's fields are of other kinds: `cache gc` relies on the hashes."""
    for fields in records.values():
        if [*map(type, fields)] != kinds:
            raise TypeError


def _is_made(folder: Path) -> bool:
    return (folder / "layout.json").is_file() and _read_spec(folder) is not None


def _read_spec(folder: Path) -> FeatureSpec | None:
    """The spec of a set, or None when it cannot be read (another format version, say)."""
    try:
        return FeatureSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
