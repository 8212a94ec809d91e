"""What a dataset is made of: examples that ask about media."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

from epalm.data.media import Media, MediaRoot

SPLITS = ("train", "val", "test")


class Counts(NamedTuple):
    """Examples of a split, and the media they ask about."""

    examples: int
    media: int


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation item.

    Attributes:
        id: unique within the dataset.
        media: id of the media it asks about.
        prompt: the question, or empty for captioning.
        references: reference answers or captions, at least one to learn from; a text that several
            annotators gave stands there as often, so that training draws it as often.
        split: train, val or test.
        type: question type that scores are broken down by; empty: none.
        types: further types to break scores down by, by name, such as question_type.
        entails: ids of questions that whoever answers this one rightly can answer too (GQA); they
            need not be in the dataset.
        source: name of its source, where a recipe has several; ids of examples and media then begin
            with it.
    """

    id: str
    media: str
    prompt: str
    references: tuple[str, ...]
    split: str
    type: str = ""
    types: dict[str, str] = field(default_factory=dict)
    entails: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Dataset:
    """Examples and the media they ask about, by media id, relative to `root`."""

    name: str
    examples: tuple[Example, ...]
    media: dict[str, Media]
    root: MediaRoot = field(compare=False)

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split, in order."""
        return tuple(e for e in self.examples if e.split == name)

    def counts(self) -> dict[str, Counts]:
        """By split, where it has any examples."""
        found = {name: self.split(name) for name in SPLITS}
        return {
            name: Counts(len(some), len({e.media for e in some}))
            for name, some in found.items()
            if some
        }

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

    def few_shot(self, count: int, balanced: bool, seed: int) -> "Dataset":
        """Keep `count` training examples, and the media that are still asked about.

        A seeded choice; for one seed, a smaller one lies within a larger one.

        Args:
            count: at most as many as there are.
            balanced: as many of each answer as of any other, while they last; an example's answer
                is its most frequent reference.
        """
        training = sorted(self.split("train"), key=lambda e: e.id)
        random.Random(f"{seed} few-shot").shuffle(training)
        if balanced:
            training = _in_turn(training)
        chosen = {e.id for e in training[:count]}
        examples = tuple(e for e in self.examples if e.split != "train" or e.id in chosen)
        return self._of(examples)

    def limit(self, counts: dict[str, int | None], seed: int) -> "Dataset":
        """Keep at most so many media of each split; a seeded choice."""
        kept: set[tuple[str, str]] = set()
        for split in SPLITS:
            ids = {e.media for e in self.split(split)}
            count = counts.get(split)
            chosen = ids if count is None else _choose(ids, count, f"{seed} limit {split}")
            kept.update((split, media) for media in chosen)
        return self._of(tuple(e for e in self.examples if (e.split, e.media) in kept))

    def _of(self, examples: "tuple[Example, ...]") -> "Dataset":
        """These examples, and the media that they ask about."""
        used = {e.media for e in examples}
        media = {key: value for key, value in self.media.items() if key in used}
        return replace(self, examples=examples, media=media)


def _choose(ids: set[str], count: int, seed: str) -> list[str]:
    """A seeded sample that does not depend on the set's iteration order."""
    ordered = sorted(ids)
    return random.Random(seed).sample(ordered, min(count, len(ordered)))


def _in_turn(examples: Sequence[Example]) -> list[Example]:
    """One example of each answer, then another of each that has more, and so on."""
    by_answer: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        counts = Counter(example.references)
        answer = min(counts, key=lambda text: (-counts[text], text))
        by_answer[answer].append(example)
    rounds = zip_longest(*by_answer.values())
    return [example for some in rounds for example in some if example is not None]
