"""Small groupings that every stage needs."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of `size` items; the last may be shorter."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def unique_rows(items: Iterable[H]) -> tuple[list[H], list[int]]:
    """Distinct items in order of appearance, and for each given one its row among them."""
    row_of: dict[H, int] = {}
    rows = [row_of.setdefault(item, len(row_of)) for item in items]
    return list(row_of), rows
