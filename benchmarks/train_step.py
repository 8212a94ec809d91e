"""A training step from cached features, rewrite by rewrite, beside what it cannot do without.

    python benchmarks/train_step.py [--small] [--repeats 5] [--device auto] [--dtype auto]

Shapes: ViT-B/16 features of 12 layers, OPT-125M, 16 text tokens of which 2 are learnt, batches of 8
and 64, one and four questions about each image; random weights. Two variants: eP-ALM (soft prompt
of 10 with MLP, a connection per level) and eP-ALM_lin (one connection, no prompt). A step is
forward, backward and AdamW, on batches that `TrainingBatches` draws from a feature store.

encoder in loop  every example's image through the encoder, then the naive step; the encoder is in
                 float32, as recipes have it unless they say otherwise
encoder, bf16    the same with the encoder in bfloat16, where the LM is
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
time that drawing a batch takes, as a share of the step. The encoders of video and audio are
measured on one batch, since they take minutes.
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
        print(json.dumps(_summary(world, options, result)))


class Measured(NamedTuple):
    """Of a case, medians by step: seconds, and seconds over those of the bound right after."""

    seconds: dict[str, float]
    of_bound: dict[str, float]


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
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(options.repeats + 1):
        for name, step in timed.items():
            if name.startswith("encoder") and repeat > 2:
                continue
            start = time.perf_counter()
            step()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                runs = 3 if name == "three, together" else 1
                seconds[name].append((time.perf_counter() - start) / runs)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    of_bound = {}
    for name, each in seconds.items():
        bound = seconds["bound of states" if "states" in name else "bound"]
        of_bound[name] = statistics.median(a / b for a, b in zip(each, bound, strict=False))
    found["data"] = steps.data_seconds()
    print(f"{case}")
    for name, value in found.items():
        ratio = f"{of_bound[name]:8.2f} of bound" if name in of_bound else ""
        print(f"  {name:16}{value:9.4f} s {ratio}")
    print(flush=True)
    return Measured(found, of_bound)


def _summary(
    world: World, options: argparse.Namespace, result: dict[str, Measured]
) -> dict[str, Any]:
    """The last line, of eP-ALM in batches of 64 with four questions about each image.

    What has `_lin` in it is of eP-ALM_lin in these shapes, with text states from their cache; what
    ends in `_bf16`, with an encoder in bfloat16.
    """
    case, of_bound = result[str(Case("epalm", 64, 4))]
    step, lin = case["linears"], result[str(Case("lin", 64, 4))].seconds
    encoders = {m: _encoder_seconds(world, m) for m in ("video", "audio")}
    dtypes = [*encoders["video"]]
    peaks = {name: _peak_of(name, options) for name in ("naive", "linears", "halves")}
    for name, peak in peaks.items():
        print(f"peak memory, batch 64, {name}: {peak.whole:.0f} MB, {peak.step:.0f} of the step")
    for modality, of_dtype in encoders.items():
        for dtype, seconds in of_dtype.items():
            print(f"{modality} encoder, {dtype}: {seconds:.2f} s a media")
    summary = {
        "step_over_bound": of_bound["linears"],
        "step_over_bound_halves": of_bound["halves"],
        "step_over_bound_linears": step / case["bound, linears"],
        "data_wait_share": case["data"] / step,
        "peak_memory_ratio": peaks["linears"].whole / peaks["naive"].whole,
        "peak_memory_ratio_halves": peaks["halves"].whole / peaks["naive"].whole,
        "peak_memory_ratio_of_step": peaks["linears"].step / peaks["naive"].step,
        "speedup_three_together": step / case["three, together"],
    }
    for name, of, ours in (("", case, step), ("_lin", lin, lin["states"])):
        for dtype in dtypes:
            in_loop = {m: 64 * s[dtype] + of["naive"] for m, s in encoders.items()}
            in_loop["image"] = of[IN_LOOP[dtype]]
            for modality, seconds in in_loop.items():
                summary[f"speedup_{modality}{name}{_ENDING[dtype]}"] = seconds / ours
    return {
        **{key: round(value, 4) for key, value in summary.items()},
        "seconds": {
            name: {k: round(v, 4) for k, v in found.seconds.items()}
            for name, found in result.items()
        },
    }


def _encoder_seconds(world: World, modality: str) -> dict[str, float]:
    """Seconds that the modality's encoder takes for one media, in a batch of two, by dtype."""
    folder = world.folder / modality
    folder.mkdir()
    {"video": weights.timesformer, "audio": weights.ast}[modality](folder, world.small)
    inputs = torch.randn(2, *MEDIA_SHAPES[modality])
    layers = range(4 if world.small else 12)
    found = {}
    for dtype in IN_LOOP if world.dtype == torch.bfloat16 else ("float32",):
        encoder = build(world.recipe(Case("epalm", 64, 4), modality, dtype), world.device)
        encoder.encode(inputs, layers)
        start = time.perf_counter()
        encoder.encode(inputs, layers)
        found[dtype] = (time.perf_counter() - start) / 2
    return found


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
