"""Small groupings that every stage needs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of `size` items; the last may be shorter."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def unique_rows(media: Iterable[str]) -> tuple[list[str], list[int]]:
    """Distinct media in order of appearance, and for each given one its row among them."""
    row_of: dict[str, int] = {}
    rows = [row_of.setdefault(m, len(row_of)) for m in media]
    return list(row_of), rows
