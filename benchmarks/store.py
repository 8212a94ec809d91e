"""The feature store beside other ways to keep the same features on disk.

    python benchmarks/store.py [--rows 20000] [--batches 300] [--folder DIR]

The same rows, (rows, 12, 1, 768) float16 random numbers, are written once per contender and read
in one process, all files being in the page cache (a warm pass over everything comes first:
it maps pages, opens what is opened lazily, and compares our checksums).

random      Batches of 64 rows drawn uniformly, with repetition, the same batches for everyone. Each
            batch ends as a float16 array of its own, (64, 12, 1, 768), in the order asked for. Ours
            is `Column.gather(row numbers)`; that the trainer first finds the numbers by content
            hash is printed on a line of its own (`+ look-up`).
last 6      The same with the last 6 of the 12 layers, which training takes by default.
sequential  All rows in order, 512 at a time, into one array allocated before: (rows, 12, 1, 768).
write       All rows to disk, flushed when the clock stops. Ours is the `Publisher` that extraction
            has, shard by shard: range check, file, SHA-256, fsync, rename, marker with its own
            fsync and rename, and the clock stops when all is published. It is given float16 rows;
            the line `from float32` is the same with the float32 rows that the extraction has, so
            conversion included. Planning and claiming the shards is not in it; the former is
            printed. A file copy is `shutil.copyfile` of the one memmap file, in the page
            cache, and one fsync; beside it as many files as there are shards, each with its fsync.
            The best of the rounds counts, each beginning with nothing left to flush.

Contenders take turns within a round, in an order that moves on with each round, so that a machine
that slows down or speeds up does so for all. A figure is the median over the rounds; a ratio is the
median of the rounds' ratios. A contender that is slow gets fewer batches in its turn (the first
ones), and one pass over everything, so that a run ends.

The memmap is one file of the rows, `numpy.memmap(...)[numbers]`; `np.take` is the same file read by
the faster of numpy's two ways, for the record. The last line holds our ratios to memmap indexing,
and to the file copy.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import machine
import numpy as np
import zarr
from numpy.typing import NDArray

from epalm.store.backend import BACKENDS
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet, Layout
from epalm.store.marker import Row
from epalm.store.publisher import Publisher
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.writer import ColumnWriter

LAYERS, DIM, BATCH, BLOCK, SHARD_ROWS = 12, 768, 64, 512, 512
LAST = slice(6, 12)
ROUNDS = 15
PASSES = 7  # rounds of sequential reading
TURN_SECONDS = 0.1  # after which a slow contender's turn in a random round ends
SLOW_PASS_SECONDS = 3.0  # a sequential pass that takes longer is not repeated
WRITE_ROUNDS = 5

Array = NDArray[Any]
Rates = dict[str, list[float]]  # rows per second, round by round, by contender


class Contender(ABC):
    """One way to keep the rows. It reads what `write` left in its folder."""

    name: str

    @abstractmethod
    def write(self, folder: Path, rows: Array) -> None:
        """Put all rows on disk."""

    @abstractmethod
    def open(self, folder: Path, rows: Array) -> None:
        """Get ready to read them; `rows` are for their shape."""

    @abstractmethod
    def random(self, numbers: Array) -> Array:
        """The rows of these numbers, in this order."""

    @abstractmethod
    def last(self, numbers: Array) -> Array | None:
        """The last 6 layers of them; None: it cannot read less than a row."""

    @abstractmethod
    def sequential(self, out: Array) -> None:
        """All rows in order into `out`."""


class BlockReader(Contender):
    """Reads in order by blocks."""

    def sequential(self, out: Array) -> None:
        for begin in range(0, len(out), BLOCK):
            self.block(begin, min(begin + BLOCK, len(out)), out)

    @abstractmethod
    def block(self, begin: int, end: int, out: Array) -> None:
        """Rows `begin` to `end` into their places in `out`."""


class Ours(BlockReader):
    """The feature store, with one of its backends."""

    def __init__(self, backend: str):
        self.name, self.backend = f"epalm {backend}", backend

    def write(self, folder: Path, rows: Array) -> None:
        _write_ours(folder, self.backend, rows, [0.0])

    def open(self, folder: Path, rows: Array) -> None:
        [found] = [path.parent for path in folder.glob("*/layout.json")]
        self.column = _column(folder, self.backend)
        assert found == self.column.folder.parent
        start = time.perf_counter()
        self.column.gather(np.arange(0, len(rows), SHARD_ROWS))  # opens every shard
        self.first_use = time.perf_counter() - start
        self.wanted = [Row(h, 0) for h in _hashes(len(rows))]
        assert np.array_equal(self.column.rows(self.wanted), np.arange(len(rows)))

    def random(self, numbers: Array) -> Array:
        return self.column.gather(numbers)

    def with_look_up(self, wanted: list[Row]) -> Array:
        return self.column.gather(self.column.rows(wanted))

    def last(self, numbers: Array) -> Array:
        return self.column.gather(numbers, LAST)

    def block(self, begin: int, end: int, out: Array) -> None:
        self.column.gather(np.arange(begin, end), out=out[begin:end])


class Memmap(BlockReader):
    """One file, indexed."""

    name = "numpy memmap"

    def write(self, folder: Path, rows: Array) -> None:
        rows.tofile(folder / "rows.bin")

    def open(self, folder: Path, rows: Array) -> None:
        self.rows = np.memmap(folder / "rows.bin", np.float16, "r", shape=rows.shape)

    def random(self, numbers: Array) -> Array:
        return self.rows[numbers]

    def last(self, numbers: Array) -> Array:
        return self.rows[numbers, LAST]

    def block(self, begin: int, end: int, out: Array) -> None:
        out[begin:end] = self.rows[begin:end]


class MemmapTake(Memmap):
    """One file, with np.take, which numpy does faster than indexing."""

    name = "numpy memmap, np.take"

    def open(self, folder: Path, rows: Array) -> None:
        super().open(folder, rows)
        self.rows = np.asarray(self.rows)

    def random(self, numbers: Array) -> Array:
        return self.rows.take(numbers, axis=0)

    def last(self, numbers: Array) -> None:
        return None  # would read all layers first


class ZarrDefault(BlockReader):
    """zarr-python with nothing said about chunks and compression."""

    name = "zarr, default chunks"
    layout: dict[str, Any] = {}

    def write(self, folder: Path, rows: Array) -> None:
        array = zarr.create_array(
            folder / "rows.zarr", shape=rows.shape, dtype=rows.dtype, **self.layout
        )
        step = (array.shards or array.chunks)[0]
        for begin in range(0, len(rows), step):
            array[begin : begin + step] = rows[begin : begin + step]

    def open(self, folder: Path, rows: Array) -> None:
        self.rows = zarr.open_array(folder / "rows.zarr", mode="r")

    def random(self, numbers: Array) -> Array:
        return np.asarray(self.rows.oindex[numbers])

    def last(self, numbers: Array) -> Array:
        return np.asarray(self.rows.oindex[numbers, LAST])

    def block(self, begin: int, end: int, out: Array) -> None:
        out[begin:end] = self.rows[begin:end]


class ZarrSharded(ZarrDefault):
    """zarr-python, shards of 512 rows with one uncompressed chunk a row."""

    name = "zarr, sharded by row"
    layout = {
        "shards": (SHARD_ROWS, LAYERS, 1, DIM),
        "chunks": (1, LAYERS, 1, DIM),
        "compressors": None,
    }


class Tensorstore(BlockReader):
    """TensorStore on the files of the sharded zarr array."""

    name = "tensorstore, sharded zarr"

    def write(self, folder: Path, rows: Array) -> None:
        ZarrSharded().write(folder, rows)

    def open(self, folder: Path, rows: Array) -> None:
        import tensorstore

        store = {"driver": "file", "path": str(folder / "rows.zarr")}
        self.rows = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()

    def random(self, numbers: Array) -> Array:
        return self.rows[numbers].read().result()

    def last(self, numbers: Array) -> Array:
        return self.rows[numbers, LAST].read().result()

    def block(self, begin: int, end: int, out: Array) -> None:
        out[begin:end] = self.rows[begin:end].read().result()


class H5Contiguous(BlockReader):
    """h5py, contiguous; h5py wants ascending numbers without repetition."""

    name = "h5py, contiguous"
    chunks: tuple[int, ...] | None = None

    def write(self, folder: Path, rows: Array) -> None:
        with h5py.File(folder / "rows.h5", "w") as file:
            file.create_dataset("rows", data=rows, chunks=self.chunks)

    def open(self, folder: Path, rows: Array) -> None:
        self.rows = h5py.File(folder / "rows.h5")["rows"]

    def random(self, numbers: Array) -> Array:
        ascending, back = np.unique(numbers, return_inverse=True)
        return self.rows[ascending][back]

    def last(self, numbers: Array) -> Array:
        ascending, back = np.unique(numbers, return_inverse=True)
        return self.rows[ascending, LAST][back]

    def block(self, begin: int, end: int, out: Array) -> None:
        self.rows.read_direct(out, np.s_[begin:end], np.s_[begin:end])


class H5Chunked(H5Contiguous):
    """h5py, one chunk a row."""

    name = "h5py, chunked by row"
    chunks = (1, LAYERS, 1, DIM)


class Lance(Contender):
    """Lance, one fixed-size list of 9,216 half-precision numbers a row."""

    name = "lance"

    def write(self, folder: Path, rows: Array) -> None:
        import lance
        import pyarrow as pa

        numbers = pa.array(rows.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(numbers, LAYERS * DIM)
        lance.write_dataset(pa.table({"rows": column}), str(folder / "rows.lance"))

    def open(self, folder: Path, rows: Array) -> None:
        import lance

        self.rows = lance.dataset(str(folder / "rows.lance"))

    def random(self, numbers: Array) -> Array:
        return self._array(self.rows.take(numbers)["rows"].combine_chunks())

    def last(self, numbers: Array) -> None:
        return None

    def sequential(self, out: Array) -> None:
        begin = 0
        for batch in self.rows.to_batches(batch_size=BLOCK, scan_in_order=True):
            out[begin : begin + len(batch)] = self._array(batch["rows"])
            begin += len(batch)

    def _array(self, column: Any) -> Array:
        flat = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(column), LAYERS, 1, DIM)


CONTENDERS: list[Callable[[], Contender]] = [
    *(lambda backend=backend: Ours(backend) for backend in BACKENDS),
    Memmap,
    MemmapTake,
    ZarrDefault,
    ZarrSharded,
    Tensorstore,
    H5Contiguous,
    H5Chunked,
    Lance,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=300, help="random batches of 64")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="epalm-store-") as name:
        _run(Path(name), options.rows, options.batches)


def _run(folder: Path, count: int, batches: int) -> None:
    print(machine.describe(folder, ["numpy", "zarr", "h5py", "tensorstore", "pylance"]))
    shape = (count, LAYERS, 1, DIM)
    generator = np.random.default_rng(0)
    rows = np.empty(shape, np.float16)
    for begin in range(0, count, BLOCK):
        some = rows[begin : begin + BLOCK]
        some[...] = generator.standard_normal(some.shape, np.float32)
    print(f"data      {shape} float16, {rows.nbytes / 1e6:.0f} MB; {batches} batches of {BATCH}\n")
    ratios = _writing(folder, rows)
    ready = _written(folder, rows)
    draws = [generator.integers(0, count, BATCH) for _ in range(batches)]
    ratios |= _reading(ready, rows, draws)
    print(json.dumps(ratios))


def _writing(folder: Path, rows: Array) -> dict[str, float]:
    """Print the write table; ours / file copy."""
    source = folder / "source.bin"
    rows.tofile(source)
    planning = [0.0]

    def copy(into: Path) -> None:
        shutil.copyfile(source, into / "copy.bin")
        _sync(into / "copy.bin")

    def copies(into: Path) -> None:
        with source.open("rb") as stream:
            for number, begin in enumerate(range(0, rows.nbytes, SHARD_ROWS * rows[0].nbytes)):
                stream.seek(begin)
                (into / str(number)).write_bytes(stream.read(SHARD_ROWS * rows[0].nbytes))
                _sync(into / str(number))

    jobs: dict[str, Callable[[Path], object]] = {
        "file copy + fsync": copy,
        "as many files as shards, + fsync each": copies,
    }
    for backend in BACKENDS:
        jobs[f"epalm {backend}"] = lambda into, b=backend: _write_ours(into, b, rows, planning)
        jobs[f"epalm {backend}, from float32"] = lambda into, b=backend: _write_ours(
            into, b, rows, planning, np.float32
        )
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for name in _turns(list(jobs), WRITE_ROUNDS):
        into = folder / "write"
        into.mkdir()
        os.sync()
        start = time.perf_counter()
        taken = jobs[name](into)
        seconds[name].append(taken if isinstance(taken, float) else time.perf_counter() - start)
        shutil.rmtree(into)
    source.unlink()
    speed = {name: rows.nbytes / 1e6 / min(some) for name, some in seconds.items()}
    base = speed["file copy + fsync"]
    print(f"{'write':40}{'MB/s':>10}{'of copy':>10}   (best of {WRITE_ROUNDS})")
    for name, value in speed.items():
        print(f"{name:40}{value:10.0f}{value / base:10.2f}")
    shards = -(-len(rows) // SHARD_ROWS)
    print(f"planning {shards} shards, not in these figures: {planning[0]:.3f} s\n")
    return {f"write_{b}": round(speed[f"epalm {b}"] / base, 3) for b in BACKENDS}


def _written(folder: Path, rows: Array) -> list[Contender]:
    """The contenders whose packages are here, each with its files written and opened."""
    ready = []
    for make in CONTENDERS:
        contender = make()
        into = folder / contender.name.replace(" ", "-")
        into.mkdir()
        try:
            contender.write(into, rows)
            contender.open(into, rows)
        except ImportError as error:
            print(f"skipped: {contender.name} ({error})")
            continue
        ready.append(contender)
        if isinstance(contender, Ours):
            speed = rows.nbytes / 1e6 / contender.first_use
            print(f"first use of {contender.name}: {contender.first_use:.3f} s to map all shards "
                  f"and compare their checksums, {speed:.0f} MB/s")  # fmt: skip
    os.sync()
    return ready


def _reading(ready: list[Contender], rows: Array, draws: list[Array]) -> dict[str, float]:
    """Print the read table; ours / memmap."""
    out = _aligned(rows.shape)
    slow = len(rows) / SLOW_PASS_SECONDS
    names = [c.name for c in ready]
    by_name = {c.name: c for c in ready}
    sequential: Rates = {name: [] for name in names}
    warm: set[str] = set()
    for name in _turns(names, PASSES + 1):  # the first round is the warm pass
        if name in warm and sequential[name] and sequential[name][0] < slow:
            continue
        start = time.perf_counter()
        by_name[name].sequential(out)
        rate = len(rows) / (time.perf_counter() - start)
        if name in warm:
            sequential[name].append(rate)
            continue
        warm.add(name)
        if rate < slow:  # one pass must do
            sequential[name].append(rate)
        assert np.array_equal(out.view(np.uint16), rows.view(np.uint16)), name
        out[...] = 0

    reads: dict[str, dict[str, Callable[[Any], Array]]] = {"random": {}, "last 6": {}}
    for contender in ready:
        reads["random"][contender.name] = contender.random
        last = contender.last(draws[0])
        if last is not None:
            assert np.array_equal(last.view(np.uint16), rows[draws[0], LAST].view(np.uint16))
            reads["last 6"][contender.name] = contender.last
        found = contender.random(draws[0])
        assert found.dtype == np.float16
        assert np.array_equal(found.view(np.uint16), rows[draws[0]].view(np.uint16))
    rates = {kind: _random_rates(some, draws) for kind, some in reads.items()}
    base = Memmap.name
    print(f"\n{'read, rows/s':28}{'random':>10}{'ratio':>7}{'last 6':>10}{'ratio':>7}"
          f"{'sequential':>12}{'ratio':>7}   (ratios to {base})")  # fmt: skip
    for name in names:
        line = f"{name:28}"
        for rate, width in ((rates["random"], 10), (rates["last 6"], 10), (sequential, 12)):
            line += _figures(rate, name, width) if name in rate else " " * (width + 7)
        print(line)
    for contender in ready:
        if isinstance(contender, Ours):
            wanted = [[contender.wanted[n] for n in some] for some in draws]
            pairs = [*zip(wanted, draws, strict=True)]
            name = f"{contender.name} + look-up"
            rate = _random_rates(
                {
                    name: lambda pair, c=contender: c.with_look_up(pair[0]),
                    base: lambda pair: by_name[base].random(pair[1]),
                },
                pairs,
            )
            print(f"{name:28}{_figures(rate, name, 10)}")
    print()
    return {
        f"{kind}_{backend}": round(_ratio(rate, f"epalm {backend}"), 3)
        for kind, rate in (("random", rates["random"]), ("sequential", sequential))
        for backend in BACKENDS
    }


def _figures(rates: Rates, name: str, width: int) -> str:
    return f"{statistics.median(rates[name]):{width},.0f}{_ratio(rates, name):7.2f}"


def _ratio(rates: Rates, name: str) -> float:
    """To the memmap: the median over rounds."""
    pairs = zip(rates[name], rates[Memmap.name], strict=False)
    return statistics.median(mine / base for mine, base in pairs)


def _random_rates(reads: dict[str, Callable[[Any], Array]], draws: Sequence[Any]) -> Rates:
    """Rows per second of each reader in each round, in which they take turns."""
    rates: Rates = {name: [] for name in reads}
    for name in _turns(list(reads), ROUNDS):
        read = reads[name]
        done = 0
        start = time.perf_counter()
        while done < len(draws) and time.perf_counter() - start < TURN_SECONDS:
            read(draws[done])
            done += 1
        rates[name].append(done * BATCH / (time.perf_counter() - start))
    return rates


def _turns(names: list[str], rounds: int) -> Iterator[str]:
    """Every name once a round, each round beginning with the next one."""
    for number in range(rounds):
        first = number % len(names)
        yield from names[first:] + names[:first]


def _write_ours(
    folder: Path, backend: str, rows: Array, planning: list[float], dtype: type = np.float16
) -> float:
    """Write all rows into a new feature set; seconds that the `Publisher` took."""
    column = _column(folder, backend)
    writer = ColumnWriter(column)
    start = time.perf_counter()
    pending = writer.plan([Row(h, 0) for h in _hashes(len(rows))])
    planning[0] = time.perf_counter() - start
    claims = [claim for claim in map(writer.claim, pending) if claim is not None]
    pieces = np.split(rows, range(SHARD_ROWS, len(rows), SHARD_ROWS))
    pieces = [some.astype(dtype, copy=False) for some in pieces]
    start = time.perf_counter()
    with Publisher(writer) as publisher:
        for claim, some in zip(claims, pieces, strict=True):
            publisher.write(claim, some, {})
    return time.perf_counter() - start


def _column(root: Path, backend: str) -> Column:
    """The column of a feature set as ViT-B/16 would have it; made when it is not there."""
    spec = FeatureSpec(
        "image", "benchmark", {}, 0, "", LAYERS, 197, DIM, True, "float32", {}, "float16"
    )
    features = FeatureSet.create(root, spec, Layout(backend, SHARD_ROWS, ""))
    [column] = features.columns_for(ColumnSpec("cls", 1, tuple(range(LAYERS))))
    return column


def _hashes(count: int) -> list[str]:
    """A content hash for each row."""
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def _aligned(shape: tuple[int, ...]) -> Array:
    """Zeros that begin at a multiple of 64 bytes, as torch's tensors do.

    numpy's big arrays begin 16 bytes behind a page, and rows copied there from the beginning of a
    page, where a mapped file begins, are three times as slow (the processor takes the addresses for
    the same).
    """
    memory = np.zeros(int(np.prod(shape)) + 32, np.float16)
    first = -memory.ctypes.data % 64 // 2
    return memory[first : first + int(np.prod(shape))].reshape(shape)


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
