"""What a dataset is made of: examples that ask about media."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Media:
    """One image, video or audio file.

    Attributes:
        id: path relative to the dataset's media root, with forward slashes.
        path: where the file is on this machine; it may be missing.
    """

    id: str
    path: Path


@dataclass(frozen=True)
class Example:
    """One training or evaluation item.

    Attributes:
        id: unique within the dataset.
        media: id of the media it asks about.
        prompt: the question, or empty for captioning.
        references: reference answers or captions, at least one.
        split: train, val or test.
        type: question type that scores are broken down by; empty: none.
    """

    id: str
    media: str
    prompt: str
    references: tuple[str, ...]
    split: str
    type: str = ""


@dataclass(frozen=True)
class Dataset:
    """Examples and the media they ask about, by media id, relative to the folder `root`."""

    name: str
    examples: tuple[Example, ...]
    media: dict[str, Media]
    root: Path

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split, in order."""
        return tuple(e for e in self.examples if e.split == name)

    def without_media(self, dropped: Iterable[str]) -> "Dataset":
        """The same dataset without these media and the examples about them."""
        gone = set(dropped)
        return replace(
            self,
            examples=tuple(e for e in self.examples if e.media not in gone),
            media={key: value for key, value in self.media.items() if key not in gone},
        )

    def hold_out(self, count: int, seed: int) -> "Dataset":
        """Move `count` training media and their examples to `val`; a seeded choice."""
        chosen = set(_choose({e.media for e in self.split("train")}, count, f"{seed} hold-out"))
        return replace(
            self,
            examples=tuple(
                replace(e, split="val") if e.split == "train" and e.media in chosen else e
                for e in self.examples
            ),
        )

    def limit(self, counts: dict[str, int | None], seed: int) -> "Dataset":
        """Keep at most so many media of each split; a seeded choice."""
        kept: set[tuple[str, str]] = set()
        for split in SPLITS:
            ids = {e.media for e in self.split(split)}
            count = counts.get(split)
            chosen = ids if count is None else _choose(ids, count, f"{seed} limit {split}")
            kept.update((split, media) for media in chosen)
        examples = tuple(e for e in self.examples if (e.split, e.media) in kept)
        used = {e.media for e in examples}
        return replace(
            self,
            examples=examples,
            media={key: value for key, value in self.media.items() if key in used},
        )


def _choose(ids: set[str], count: int, seed: str) -> list[str]:
    """A seeded sample that does not depend on the set's iteration order."""
    ordered = sorted(ids)
    return random.Random(seed).sample(ordered, min(count, len(ordered)))
