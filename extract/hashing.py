"""Content hashes of media files: what features are filed by."""

import time
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from epalm.data.example import Dataset
from epalm.data.grouping import chunks
from epalm.data.media import Media, expand
from epalm.errors import EpalmError
from epalm.store.feature_set import Catalogue, CatalogueEntry, FeatureSet
from epalm.store.marker import Failure

HASH_PIECE = 256  # media given to the threads at a time
SAVE_SECONDS = 30.0  # between two saves of what is hashed so far


def hash_media(dataset: Dataset, features: FeatureSet) -> Catalogue:
    """Hash a dataset's media, and enter what is new into the set's catalogue.

    A file whose size and time of change are known is not read again.

    Returns:
        The dataset's media that could be read, and those that could not.

    Raises:
        EpalmError: another dataset has this name.
    """
    before = features.catalogue(dataset.name)
    found = Catalogue(dataset.root.name)
    # packed, say, or another dataset: of which equal sizes and times would say nothing
    doubtful = found.root != before.root and bool(before.root) and _is_here(before.root)
    known = {} if doubtful else before.media
    saved = time.monotonic()
    everything = list(dataset.media.values())
    with (
        ThreadPoolExecutor(4, thread_name_prefix="hash") as pool,
        tqdm(total=len(everything), desc="hash", unit="media", leave=False) as bar,
    ):
        for piece in chunks(everything, HASH_PIECE):
            results = pool.map(lambda media: _look(media, known.get(media.id)), piece)
            for media, result in zip(piece, results, strict=True):
                if isinstance(result, CatalogueEntry):
                    found.media[media.id] = result
                else:
                    reason = f"cannot be read: {result.strerror or result}"
                    failure = Failure(media.id, reason, type(result).__name__)
                    found.unreadable[media.id] = failure
            if time.monotonic() - saved > SAVE_SECONDS and not doubtful:
                features.add_to_catalogue(dataset.name, found)
                saved = time.monotonic()
            bar.update(len(piece))
    if doubtful:
        _check_same(dataset, before, found)
    if _is_news(found, before):  # else nothing is written: the store may be read-only
        features.add_to_catalogue(dataset.name, found)
    return found


def removed_media(dataset: Dataset, features: FeatureSet) -> list[str]:
    """Ids that the catalogue knows and the dataset no longer has, and whose files are gone."""
    others = features.catalogue(dataset.name).media.keys() - dataset.media.keys()
    return sorted(m for m in others if not dataset.root.find(m).exists())


def _look(media: Media, known: CatalogueEntry | None) -> CatalogueEntry | OSError:
    try:
        version = media.version()
        if known is not None and known[1:] == version:
            return known
        return CatalogueEntry(media.sha256(), *version)
    except OSError as error:
        return error


def _is_news(found: Catalogue, before: Catalogue) -> bool:
    return (
        found.root != before.root
        or not found.media.items() <= before.media.items()
        or not found.unreadable.items() <= before.unreadable.items()
    )


def _check_same(dataset: Dataset, before: Catalogue, found: Catalogue) -> None:
    """Two datasets must not share a name; one that was copied or packed keeps its own."""
    shared = sorted(found.media.keys() & before.media.keys())
    other = [m for m in shared if found.media[m].content_hash != before.media[m].content_hash]
    if shared and not other:
        return
    why = f"where {other[0]} is another file" if other else "none of which it has"
    raise EpalmError(
        f"data.name: {dataset.name!r} already stands for the media in {before.root}, {why}; give "
        "the dataset another name"
    )


def _is_here(root: str) -> bool:
    """The folder, or an archive, that a catalogue names as its media's root."""
    return any(path.exists() for path, _ in expand(root))
