"""Rows of mapped blocks, read as if they stood in one array.

numpy gathers rows of one array in a loop of its own, rows of many arrays only one by one, which
takes half as long again. Blocks are mapped anywhere in memory, but at multiples of their numbers'
size: a row begins a whole count of numbers behind the lowest block. So an array over all addresses
from the lowest block to the highest, with an item at every number, has each row as an item. Items
between the blocks are not memory of ours, and are never asked for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray


class Window:
    """Blocks of equal row shape and number format.

    Args:
        row_shape: (layers, tokens, D).
        dtype: of the blocks.
        shard_rows: rows of a full block.
        shards: block numbers there may be, from 0.
        opened: a block by number, which must stay mapped; called when a row of it is first read.
    """

    def __init__(
        self,
        row_shape: tuple[int, ...],
        dtype: str,
        shard_rows: int,
        shards: int,
        opened: Callable[[int], NDArray[np.generic]],
    ):
        self.row_shape, self.dtype = row_shape, np.dtype(dtype)
        self.shard_rows, self.opened = shard_rows, opened
        self._layer = int(np.prod(row_shape[1:])) * self.dtype.itemsize  # bytes
        self._row = row_shape[0] * self._layer
        self._address = np.zeros(shards * shard_rows, np.int64)  # of each row; 0: not opened yet
        self._lowest: NDArray[np.generic] | None = None
        self._low = self._high = 0
        self._items: dict[tuple[int, int], NDArray[Any]] = {}  # by first and last layer

    def take(self, rows: NDArray[np.int64], layers: slice) -> NDArray[np.generic]:
        """A copy of these layers of these rows: (n, layers, tokens, D), n > 0."""
        places = self._address[rows]
        if not places.all():
            for shard in sorted(set((rows[places == 0] // self.shard_rows).tolist())):
                self._add(shard)
            places = self._address[rows]
            if not places.all():  # an address that is none must never be read
                raise IndexError("a row that no block has")
        first, last, step = layers.indices(self.row_shape[0])
        if step != 1:
            raise ValueError("only layers that stand side by side can be gathered")
        items = self._items.get((first, last))
        if items is None:
            items = self._items[first, last] = self._over_all(first, last)
        places -= self._low
        places //= self.dtype.itemsize
        found = items[places].view(self.dtype)
        return found.reshape(len(rows), last - first, *self.row_shape[1:])

    def _over_all(self, first: int, last: int) -> NDArray[Any]:
        """Layers `first` to `last` of a row that would begin at each number."""
        kind = np.dtype((np.void, (last - first) * self._layer))
        anchor = np.ndarray((1,), kind, self._lowest, first * self._layer)
        count = (self._high - self._low - self._row) // self.dtype.itemsize + 1
        return as_strided(anchor, (count,), (self.dtype.itemsize,), writeable=False)

    def _add(self, shard: int) -> None:
        block = self.opened(shard)
        if block.dtype != self.dtype or not (block.flags.c_contiguous and block.flags.aligned):
            raise ValueError(f"block {shard} is not of aligned {self.dtype} numbers in C order")
        begin, first = block.ctypes.data, shard * self.shard_rows
        self._address[first : first + len(block)] = begin + self._row * np.arange(len(block))
        if self._lowest is None or begin < self._low:
            self._lowest, self._low = block, begin
        self._high = max(self._high, begin + block.nbytes)
        self._items.clear()
