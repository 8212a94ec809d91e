"""From records to a dataset: what all readers check alike."""

import posixpath
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import Record
from epalm.data.example import Dataset, Example
from epalm.data.media import Media, MediaRoot, problem_with_id
from epalm.errors import EpalmError


class Collector:
    """Gathers a dataset's examples, and the media they name."""

    def __init__(
        self,
        config: DataConfig,
        name: str,
        media_name: str = "{media}",
        root: MediaRoot | None = None,
    ):
        """
        Args:
            config: the recipe's.
            name: of the dataset, where the recipe gives none.
            media_name: pattern of media ids, where the recipe gives none.
            root: of the media; default: the recipe's, or beside the annotations.

        Raises:
            EpalmError: a media root that cannot be read.
        """
        path = Path(config.path).expanduser()
        beside = path if path.is_dir() else path.parent
        self.root = root or MediaRoot(config.media_root or str(beside))
        self._name = config.name or name
        self._pattern = config.media_name or media_name
        self._path = path
        self._examples: dict[str, Example] = {}
        self._media: dict[str, Media] = {}  # by name as it is written

    def add(
        self,
        record: Record,
        identifier: str,
        media: Mapping[str, str | int],
        prompt: str,
        references: Iterable[str],
        split: str,
        kind: str = "",
        types: dict[str, str] | None = None,
        entails: Iterable[str] = (),
        unanswered: bool = False,
    ) -> None:
        """One more example.

        Args:
            record: where it stands, for messages.
            identifier: unique in the dataset.
            media: what the media's pattern may name.
            prompt: as in Example.
            references: as in Example.
            split: as in Example.
            kind: Example's type.
            types: as in Example.
            entails: as in Example.
            unanswered: that there is no reference is no mistake: whatever is predicted is wrong.

        Raises:
            EpalmError: an id that was there before, no reference, or an unusable media path.
        """
        if identifier in self._examples:
            raise record.error(f"id {identifier!r} stands in an earlier record too")
        # the same few words are the answers to many questions
        texts = tuple(sys.intern(text) for text in references)
        if not unanswered and not any(texts):
            raise record.error("has no answer or caption that is not empty")
        name = self._file_name(media)
        if name not in self._media:
            if problem := problem_with_id(name):
                raise record.error(f"media {name!r} {problem}")
            self._media[name] = self.root.find(posixpath.normpath(name))
        self._examples[identifier] = Example(
            identifier,
            self._media[name].id,
            prompt,
            texts,
            split,
            sys.intern(kind),
            types or {},
            tuple(entails),
        )

    def dataset(self) -> Dataset:
        """All examples; EpalmError when there are none."""
        if not self._examples:
            raise EpalmError(f"{self._path}: holds no examples")
        media = {found.id: found for found in self._media.values()}
        return Dataset(self._name, tuple(self._examples.values()), media, self.root)

    def _file_name(self, values: Mapping[str, str | int]) -> str:
        try:
            return self._pattern.format_map(values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise EpalmError(
                f"data.media_name: {self._pattern!r} cannot be filled in ({error}); it may name "
                f"{', '.join(values)} in braces"
            ) from None
