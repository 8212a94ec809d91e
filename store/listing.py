"""Feature sets in words: the table of `cache ls`, the page of `cache info`."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from epalm.errors import EpalmError
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet, is_set, open_set, set_folders
from epalm.store.needs import needs, unreadable_needs

HEADER = ("set", "modality", "backend", "column", "rows", "failed", "shards", "size")


def table_of_sets(root: Path) -> str:
    """One line per column of every feature set in a folder, or of the set that the folder is.

    Raises:
        EpalmError: no such folder.
    """
    if not root.is_dir():
        raise EpalmError(f"{root}: no such folder")
    folders = [root] if is_set(root) else set_folders(root)
    lines: list[tuple[str, ...]] = [HEADER]
    bad: list[str] = []
    for folder in folders:
        try:
            features = open_set(folder)
        except EpalmError as error:
            bad.append(f"unreadable: {error}")
            continue
        about = (folder.name, _modality(features), features.layout.backend)
        for column in features.columns:
            rows, failed = f"{len(column):,}", f"{len(column.failures):,}"
            size = words_for_bytes(_bytes(column))
            lines.append(
                (*about, column.folder.name, rows, failed, f"{len(column.markers):,}", size)
            )
        if not features.columns:
            lines.append((*about, "-", "0", "0", "0", "0 B"))
    if len(lines) == 1 and not bad:
        return f"{root}: no feature sets"
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join([*(_aligned(line, widths) for line in lines), *bad])


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    words = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
    return "  ".join([*words, *numbers])


def page_of_set(features: FeatureSet) -> str:
    """Everything a person may want to know of one set."""
    of_texts = features.spec.modality == "text"
    lines = [str(features.folder)]
    if of_texts:
        lines.append(
            "  an LM's states of texts at its first injection layer, kept by trainings that run "
            "only the layers above (train.text_states)"
        )
    lines += [f"  {key}: {value}" for key, value in asdict(features.spec).items()]
    lines.append(f"  weights from: {features.layout.weights_address}")
    lines.append(f"  backend: {features.layout.backend}, {features.layout.shard_rows} rows a shard")
    for column in features.columns:
        kept = column.column
        lines.append(f"column {column.folder.name}: {words_for_bytes(_bytes(column))}")
        lines.append(f"  tokens: {kept.tokens}, {kept.token_count} a layer")
        layers = ", ".join(map(str, kept.layers))
        lines.append(f"  {'LM' if of_texts else 'encoder'} layers: {layers}")
        if kept.augmentation is not None:
            lines.append(f"  augmentation: {kept.augmentation}")
        views = Counter(m.view for m in column.markers.values() for _ in m.hashes)
        held = ", ".join(f"view {view}: {count:,}" for view, count in sorted(views.items()))
        lines.append(f"  rows: {held or 'none'}; stored as {column.dtype()}")
        if column.damaged:
            lines.append(f"  damaged shards: {', '.join(str(m.shard) for m in column.damaged)}")
    for dataset in features.datasets():
        known = features.catalogue(dataset)
        lines.append(
            f"dataset {dataset}: {len(known.media):,} media, {len(known.unreadable):,} unreadable; "
            f"files were in {known.root}"
        )
    for need in (n for n in needs(features) if n.is_readable):
        shards = "any" if need.shards is None else sum(map(len, need.shards.values()))
        lines.append(f"needed by {need.run}: {shards} shards")
    lines += unreadable_needs(features)
    for reason, count in Counter(f["reason"] for f in features.failures()).most_common(10):
        lines.append(f"failed: {count:,} x {reason}")
    if stage := features.last_extraction():
        lines.append(f"last extraction: {stage.seconds:.1f} s, {stage.rate}")
    return "\n".join(lines)


def words_for_bytes(count: float) -> str:
    """A size as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _modality(features: FeatureSet) -> str:
    """What the rows are about."""
    kind = features.spec.modality
    return "text states" if kind == "text" else kind


def _bytes(column: Column) -> int:
    return sum(p.stat().st_blocks * 512 for n in column.markers for p in column.backend.files(n))
