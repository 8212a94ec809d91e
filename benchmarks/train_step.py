"""A training step from cached features, rewrite by rewrite, beside what it cannot do without.

    python benchmarks/train_step.py [--small] [--repeats 5] [--device auto] [--dtype auto]

Shapes: ViT-B/16 features of 12 layers, OPT-125M, 16 text tokens of which 2 are learnt, batches of 8
and 64, one and four questions about each image; random weights. Two variants: eP-ALM (soft prompt
of 10 with MLP, a connection per level) and eP-ALM_lin (one connection, no prompt). A step is
forward, backward and AdamW, on batches that `TrainingBatches` draws from a feature store.

encoder in loop  every example's image through the encoder, then the naive step; the encoder is in
                 float32, as recipes have it unless they say otherwise
encoder, bf16    the same with the encoder in bfloat16, where the LM is
video encoder    and audio's, alone, for a batch of 64
naive            [token | prompt | text] of every example at once, all logits, attention as Hugging
                 Face has it, and (in lin) a graph down to the words
logits           logits only where there is a label
graph            no graph below the lowest trained input; nothing to gain where a prompt is trained
attention        as ours: on a CPU written out
prefix           prefix once per media, prompt below the first injection layer once per step; from
                 here on the ReLUs keep booleans, and logits are made 128 labels at a time
packed           prefix and texts in one sequence
last             in the last layer, keys and values alone where no token is predicted from
linears          on a CPU in bfloat16, with batches of 8 weights in oneDNN's order, and with larger
                 ones, where there is AMX, products in pieces; with it, the step that `train` takes
states           and text states at the first injection layer from their cache, as `train` has them
                 for variants that train nothing below
halves           that step with `train.accumulate: 2`: in two pieces, for the memory's sake
three, together  that step for three runs at once, per run, as `sweep --together 3` has it

bound            the matrix products that the sample-dependent work needs, back to back on the same
                 weights: text tokens in all layers, one token per media from the first injection
                 layer on, logits at labels; forward, and backward where a trained parameter is
                 reached. Attention's own products are not counted, nor are prompt tokens. For
                 `states` there is a bound of its own, without the lower layers.
bound, prompts   the same with those of prompt tokens, a layer's text and prefix in one product
bound, linears   the bound's products as `train` makes them

Steps take turns within a repeat, so that all see the same machine, and the bound comes right after
the step that `train` takes; medians count, of seconds and of each repeat's ratio to the bound. Peak
memory is the median of three processes of their own, without the interpreter and its libraries,
weights included; that of the step alone leaves out weights and optimiser, too. Data wait is the
time that drawing a batch takes, as a share of the step. The encoders of video and audio, which take
minutes for 64 media, are measured with two; a step with one in the loop is that and a naive one.
"""

import argparse
import ctypes
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import machine
import psutil
import torch
import weights
from step_world import MEDIA_SHAPES, VARIANTS, Case, World
from steps import IN_LOOP, Bound, Steps

from epalm.extract.encoder import build
from epalm.memory import keep_freed_memory

_ENDING = {"float32": "", "bfloat16": "_bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="narrow models, for a quick look")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the LM")
    parser.add_argument("--peak", choices=["naive", "linears", "halves"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(prefix="epalm-step-") as name:
        if options.peak:
            print(json.dumps(_peak(Path(name), options)))
            return
        print(machine.describe(Path(name), ["torch", "transformers", "timm"]))
        world = World(Path(name), options)
        print(f"device    {world.device}, {torch.get_num_threads()} torch threads, LM in "
              f"{world.dtype}\n")  # fmt: skip
        result: dict[str, Measured] = {}
        for variant in VARIANTS:
            for batch in (8, 64):
                for questions in (1, 4):
                    case = Case(variant, batch, questions)
                    result[str(case)] = _measure(world, case, options)
        print(json.dumps(_summary(options, result)))


class Measured(NamedTuple):
    """Of a case, seconds by step: of each repeat, and what drawing a batch takes."""

    repeats: dict[str, list[float]]
    data: float

    @property
    def seconds(self) -> dict[str, float]:
        """Medians."""
        found = {name: statistics.median(each) for name, each in self.repeats.items()}
        return {**found, "data": self.data}

    def ratio(self, name: str, of: str, and_also: str | None = None) -> float:
        """Seconds of a step, and of one more, over those of another: the median of repeats'."""
        own, other = self.repeats[name], self.repeats[of]
        more = [0.0] * len(own) if and_also is None else self.repeats[and_also]
        return statistics.median((a + b) / c for a, b, c in zip(own, more, other, strict=False))


def _measure(world: World, case: Case, options: argparse.Namespace) -> Measured:
    """Print a case's table."""
    steps = Steps(world, case)
    timed: dict[str, Callable[[], Any]] = {}
    for name, step in steps.by_name.items():
        timed[name] = step
        if name == "linears":
            timed["bound"] = Bound(world, case)
            timed["bound, linears"] = Bound(world, case, own=True)
        if name == "states":
            timed["bound of states"] = Bound(world, case, lower_cached=True)
    if VARIANTS[case.variant]["prompt_length"]:
        timed["bound, prompts"] = Bound(world, case, prompts=True)
    if (case.batch, case.questions) == (64, 4):
        timed.update(_encoders(world))
    repeats: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(options.repeats + 1):
        for name, step in timed.items():
            if name.startswith("encoder") and repeat > 2:
                continue
            start = time.perf_counter()
            step()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                repeats[name].append((time.perf_counter() - start) * _times(name))
    found = Measured(repeats, steps.data_seconds())
    print(f"{case}")
    for name, value in found.seconds.items():
        bound = "bound of states" if "states" in name else "bound"
        ratio = f"{found.ratio(name, bound):8.2f} of bound" if name in repeats else ""
        print(f"  {name:20}{value:9.4f} s {ratio}")
    print(flush=True)
    return found


def _times(name: str) -> float:
    """Of what is timed, how much a step takes."""
    if name == "three, together":
        return 1 / 3
    return 32 if name.startswith(("video", "audio")) else 1


def _summary(options: argparse.Namespace, result: dict[str, Measured]) -> dict[str, Any]:
    """The last line, of eP-ALM in batches of 64 with four questions about each image.

    What has `_lin` in it is of eP-ALM_lin in these shapes, with text states from their cache; what
    ends in `_bf16`, with an encoder in bfloat16.
    """
    case, lin = (result[str(Case(variant, 64, 4))] for variant in ("epalm", "lin"))
    peaks = {name: _peak_of(name, options) for name in ("naive", "linears", "halves")}
    for name, peak in peaks.items():
        print(f"peak memory, batch 64, {name}: {peak.whole:.0f} MB, {peak.step:.0f} of the step")
    summary = {
        "step_over_bound": case.ratio("linears", "bound"),
        "step_over_bound_halves": case.ratio("halves", "bound"),
        "step_over_bound_linears": case.ratio("linears", "bound, linears"),
        "data_wait_share": case.data / case.seconds["linears"],
        "peak_memory_ratio": peaks["linears"].whole / peaks["naive"].whole,
        "peak_memory_ratio_halves": peaks["halves"].whole / peaks["naive"].whole,
        "peak_memory_ratio_of_step": peaks["linears"].step / peaks["naive"].step,
        "speedup_three_together": case.ratio("linears", "three, together"),
    }
    for name, of, step in (("", case, "linears"), ("_lin", lin, "states")):
        for dtype, in_loop in IN_LOOP.items():
            if in_loop in of.repeats:
                ending = _ENDING[dtype]
                summary[f"speedup_image{name}{ending}"] = of.ratio(in_loop, step)
                for modality in ("video", "audio"):
                    encoder = _encoder_name(modality, dtype)
                    summary[f"speedup_{modality}{name}{ending}"] = of.ratio(encoder, step, "naive")
    return {
        **{key: round(value, 4) for key, value in summary.items()},
        "seconds": {
            name: {k: round(v, 4) for k, v in found.seconds.items()}
            for name, found in result.items()
        },
    }


@cache
def _encoders(world: World) -> dict[str, Callable[[], Any]]:
    """The encoders of video and audio, each with a batch of two."""
    found = {}
    for modality, make in (("video", weights.timesformer), ("audio", weights.ast)):
        folder = world.folder / modality
        folder.mkdir()
        make(folder, world.small)
        inputs = torch.randn(2, *MEDIA_SHAPES[modality])
        for dtype in IN_LOOP if world.dtype == torch.bfloat16 else ("float32",):
            encoder = build(world.recipe(Case("epalm", 64, 4), modality, dtype), world.device)
            layers = range(4 if world.small else 12)
            found[_encoder_name(modality, dtype)] = partial(encoder.encode, inputs, layers)
    return found


def _encoder_name(modality: str, dtype: str) -> str:
    return f"{modality} encoder" + (", bf16" if dtype == "bfloat16" else "")


class Peak(NamedTuple):
    """MB: of all but the interpreter and its libraries, and of a step beyond what stays."""

    whole: float
    step: float


def _peak_of(step: str, options: argparse.Namespace) -> Peak:
    """What a step at batch 64 needs at its peak: the median of three processes of its own, for
    where memory has holes is chance."""
    command = [sys.executable, __file__, "--peak", step, "--device", options.device, "--dtype",
               options.dtype, *(["--small"] if options.small else [])]  # fmt: skip
    found = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(Peak(*json.loads(done.stdout.splitlines()[-1])))
    return statistics.median_low(found)


def _peak(folder: Path, options: argparse.Namespace) -> Peak:
    """That of the step `options.peak`, in this process."""
    before = psutil.Process().memory_info().rss
    world = World(folder, options)
    steps = Steps(world, Case("epalm", 64, 4))
    _forget_what_making_took()
    for _ in range(2):
        steps.by_name[options.peak]()
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_rss() - before
    parameters = [*steps.model.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    stays = sum(p.nbytes for p in parameters) + 2 * sum(p.nbytes for p in trained)
    return Peak(peak / 1e6, (peak - stays) / 1e6)


def _forget_what_making_took() -> None:
    """Give back what the models were made with, and count the peak from here; on Linux."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    reset = Path("/proc/self/clear_refs")
    if reset.is_file():
        reset.write_text("5")


def _peak_rss() -> int:
    """Bytes; on Linux since the last reset."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
