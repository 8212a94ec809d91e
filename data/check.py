"""`data check`: what is wrong with a dataset, said before hours are spent on it."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from epalm.config import Recipe
from epalm.data import read, reader, select
from epalm.data.annotations import shown
from epalm.data.example import SPLITS, Counts, Dataset, Example

NAMED = 3  # media or examples that a finding names


@dataclass
class Report:
    """What was found.

    Attributes:
        dataset: as it was read, before the recipe's limits.
        chosen: what the recipe uses of it.
        published: counts of the official files, by split, where they are known.
        skip: the recipe leaves out media that cannot be used.
        unusable: their ids.
        stops: what would stop extraction, training or evaluation.
        warnings: what would not.
    """

    dataset: Dataset
    chosen: Dataset
    published: dict[str, Counts]
    skip: bool
    unusable: set[str] = field(default_factory=set)
    stops: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def left(self) -> Dataset:
        """What the recipe uses, once unusable media are left out."""
        return self.chosen.without_media(self.unusable if self.skip else set())

    def judge(self, bad: dict[str, str], what: str) -> None:
        """Note media that cannot be used; they stop a recipe that uses them and skips none.

        Args:
            bad: how each is named, by id.
            what: is wrong with them.
        """
        if not bad:
            return
        self.unusable |= bad.keys()
        words = f"{len(bad):,} {what}: {_names(bad.values())}"
        if self.skip or not bad.keys() & self.chosen.media.keys():
            self.warnings.append(words)
        else:
            self.stops.append(f"extraction: {words}; data.bad_media: skip would leave them out")

    def text(self, rows: int) -> str:
        """All of it for people, with so many examples of each split."""
        lines = [f"{self.dataset.name}, media in {self.dataset.root.name}", *self._table()]
        for split in SPLITS:
            for example in self.dataset.split(split)[:rows]:
                lines += _shown(example)
        lines += [f"warning: {words}" for words in self.warnings]
        lines += [f"stops: {words}" for words in self.stops]
        return "\n".join(lines + ([] if self.stops else ["nothing stops the recipe"]))

    def _table(self) -> list[str]:
        found, chosen = self.dataset.counts(), self.chosen.counts()
        head = ("split", "examples", "published", "media", "published", "used")
        lines = [f"{head[0]:6}" + "".join(f"{word:>12}" for word in head[1:])]
        for split in SPLITS:
            ours, theirs = found.get(split), self.published.get(split)
            if not (ours or theirs or split in chosen):
                continue
            numbers = (
                ours.examples if ours else 0,
                theirs.examples if theirs else None,
                ours.media if ours else 0,
                theirs.media if theirs else None,
                chosen[split].examples if split in chosen else 0,
            )
            cells = ("-" if number is None else f"{number:,}" for number in numbers)
            lines.append(f"{split:6}" + "".join(f"{cell:>12}" for cell in cells))
        return lines


def check(recipe: Recipe, hashes: bool, whole: bool = True) -> Report:
    """Look at the data of a recipe with one source.

    Args:
        recipe: whose data.
        hashes: look at the media's content too.
        whole: training and evaluation have no other data than these.

    Raises:
        EpalmError: annotation files that cannot be read, or a media root.
    """
    module = reader(recipe.data.kind)
    dataset = read(recipe.data)
    published = module.published(recipe.data) if hasattr(module, "published") else {}
    report = Report(dataset, select(dataset, recipe), published, recipe.data.bad_media == "skip")
    _compare_counts(report)
    _look_for_media(report)
    _look_at_texts(report)
    _look_for_leaks(report)
    if hashes:
        _look_at_content(report)
    _look_at_splits(report, recipe, whole)
    return report


def _compare_counts(report: Report) -> None:
    found = report.dataset.counts()
    for split, theirs in report.published.items():
        ours = found.get(split, Counts(0, 0))
        if ours != theirs:
            report.warnings.append(
                f"{split} has {ours.examples:,} examples about {ours.media:,} media; published are "
                f"{theirs.examples:,} about {theirs.media:,}"
            )


def _look_at_splits(report: Report, recipe: Recipe, whole: bool) -> None:
    """What is left to train and evaluate on, once unusable media are left out."""
    left = report.left
    if not left.examples:
        report.stops.append(
            f"extraction: of {len(report.chosen.media):,} media none can be used; is "
            "data.media_root the right one?"
        )
    elif whole:
        usable = " with usable media" if report.skip and report.unusable else ""
        training, wanted = len(left.split("train")), recipe.train.batch_size
        if not report.dataset.split("train"):
            report.warnings.append(
                "there is no train split: this is for runs trained on other data (evaluate --on)"
            )
        elif training < wanted:
            report.stops.append(
                f"training: train.batch_size is {wanted}, there are {training} training examples"
                + usable
            )
        split = recipe.evaluate.split
        if not left.split(split):
            report.stops.append(
                f"evaluation: evaluate.split is {split}, which has no examples{usable}"
            )


def _look_for_media(report: Report) -> None:
    root = report.dataset.root
    if root.absent:
        report.warnings.append(f"archives that are not here: {_names(map(str, root.absent))}")
    missing, empty = {}, {}
    for media in tqdm(report.dataset.media.values(), "media", unit="file", leave=False):
        try:
            size, _ = media.version()
        except OSError:
            missing[media.id] = media.id + _look_alike(report.dataset, media.id)
        else:
            if not size:
                empty[media.id] = media.id
    report.judge(missing, f"media are missing in {root.name}")
    report.judge(empty, "media files are empty")


def _look_alike(dataset: Dataset, name: str) -> str:
    """What to say where a name is there in Unicode's other normal form, as files from a Mac are."""
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")} - {name}
    there = any(dataset.root.find(other).exists() for other in forms)
    return " (there in another Unicode form: rename it, or change the annotations)" if there else ""


def _look_at_texts(report: Report) -> None:
    empty = [e.id for e in report.dataset.examples if not all(e.references)]
    if empty:
        report.warnings.append(
            f"{len(empty):,} examples have empty answers or captions: {_names(empty)}"
        )


def _look_for_leaks(report: Report) -> None:
    splits = _splits_of_media(report.dataset)
    shared = [media for media, some in splits.items() if len(some) > 1]
    if shared:
        report.warnings.append(f"{len(shared):,} media stand in several splits: {_names(shared)}")
    asked = Counter((e.media, e.prompt) for e in report.dataset.examples)
    again = [f"{shown(prompt)} about {media}" for (media, prompt), n in asked.items() if n > 1]
    if again:
        report.warnings.append(
            f"{len(again):,} questions are asked about their media more than once: {_names(again)}"
        )


def _look_at_content(report: Report) -> None:
    """Media with the same bytes, and media that cannot be read."""
    everything = list(report.dataset.media.values())
    same: dict[str, list[str]] = defaultdict(list)
    unreadable = {}
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(media.sha256) for media in everything]
        bar = tqdm(zip(everything, futures, strict=True), "hash", len(everything), leave=False)
        for media, future in bar:
            try:
                same[future.result()].append(media.id)
            except FileNotFoundError:
                pass  # said already
            except OSError as error:
                unreadable[media.id] = f"{media.id} ({error.strerror})"
    report.judge(unreadable, "media cannot be read")
    splits = _splits_of_media(report.dataset)
    groups = [some for some in same.values() if len(some) > 1]
    if groups:
        report.warnings.append(
            f"{sum(len(some) - 1 for some in groups):,} media have the content of another: "
            f"{_names(' = '.join(some[:NAMED]) for some in groups)}"
        )
    leaks = [some for some in groups if len(set.union(*(splits[m] for m in some))) > 1]
    if leaks:
        report.warnings.append(
            f"{len(leaks):,} contents stand in several splits under different names: "
            f"{_names(' = '.join(some[:NAMED]) for some in leaks)}"
        )


def _splits_of_media(dataset: Dataset) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for example in dataset.examples:
        found[example.media].add(example.split)
    return found


def _names(items: Iterable[str]) -> str:
    """The first few, in one line."""
    some = list(items)
    return ", ".join(some[:NAMED]) + (", …" if len(some) > NAMED else "")


def _shown(example: Example) -> list[str]:
    answers = ", ".join(
        text if n == 1 else f"{text} ({n})" for text, n in Counter(example.references).items()
    )
    kinds = ", ".join(filter(None, [example.type, *example.types.values()]))
    head = f"  {example.split} {example.id}: {example.media}" + (f" [{kinds}]" if kinds else "")
    return [head, *([f"    {example.prompt}"] if example.prompt else []), f"    -> {answers}"]
