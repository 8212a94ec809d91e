"""Generation with perceptual token and soft prompt beside plain Hugging Face generation.

    python benchmarks/generate.py [--small] [--repeats 9] [--device auto] [--dtype auto]

Both are greedy, with a cache of keys and values, on the same LM in memory (OPT-125M's shapes,
random weights), the same prompts of 16 tokens without padding, and 20 new tokens; EOS is disabled,
so that nobody stops earlier.

ours        `AugmentedLM.generate`: a perceptual token for each text, every text about a media of
            its own, and a soft prompt of 10 with MLP; injection into the upper half of the layers.
            The prefix is computed in the time that is measured.
shared      the same with four texts about each media.
HF          `generate` of the LM on the text alone. It reads 11 tokens less.
HF prefix   the same with 11 more tokens of text before the prompt: as many as ours reads in all.

In a repeat the contenders take turns, in an order that moves on with each repeat. A rate is new
tokens per second, the median of the repeats; a ratio is the median of the repeats' ratios.
`generate_vs_hf` in the last line is ours / HF with 8 texts; the other ratios to HF stand beside it.

With `--profile`, no measurement: where the time of one batch of 8 goes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from epalm.config import VariantConfig
from epalm.device import choose_device, choose_dtype
from epalm.memory import keep_freed_memory
from epalm.model.augmented import AugmentedLM

BATCHES = (1, 8, 32)
PROMPT, NEW = 16, 20
SHARED = 4
LAYERS, DIM = 12, 768  # of ViT-B/16
VARIANT = VariantConfig(encoder_layers=6, prompt_length=10)

Call = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="a narrow LM, for a quick look")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the LM, as lm.dtype of a recipe")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    device = choose_device(options.device)
    lm = _lm(options.small).to(device, choose_dtype(options.dtype, device))
    torch.manual_seed(0)
    model = AugmentedLM.from_config(lm, VARIANT, LAYERS, DIM)
    print(machine.describe(Path(tempfile.gettempdir()), ["torch", "transformers"]))
    print(f"device    {device}, {lm.dtype}, {torch.get_num_threads()} torch threads\n")
    if options.profile:
        _profile(_calls(lm, model, 8))
        return
    print(f"{'new tokens/s':14}" + "".join(f"{name:>12}" for name in _calls(lm, model, 1))
          + f"{'ours / HF':>12}   of each repeat")  # fmt: skip
    result: dict[str, float] = {}
    for batch in BATCHES:
        seconds = _measure(_calls(lm, model, batch), options.repeats, device)
        ratios = {
            name: [hf / mine for hf, mine in zip(seconds["HF"], seconds[name], strict=True)]
            for name in seconds
        }
        rates = [batch * NEW / statistics.median(times) for times in seconds.values()]
        print(f"{batch:>3} texts     " + "".join(f"{rate:12.1f}" for rate in rates)
              + f"{statistics.median(ratios['ours']):12.3f}   "
              + " ".join(f"{r:.2f}" for r in ratios["ours"]), flush=True)  # fmt: skip
        for name in ("ours", "shared", "HF prefix"):
            result[f"{name.replace(' ', '_')}_vs_hf_{batch}"] = statistics.median(ratios[name])
    rounded = {name: round(value, 3) for name, value in result.items()}
    print(json.dumps({"generate_vs_hf": rounded["ours_vs_hf_8"], **rounded}))


def _lm(small: bool) -> PreTrainedModel:
    """OPT-125M's shapes, without an end token."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 384, "vocab_size": 5000}
    return OPTForCausalLM(OPTConfig(eos_token_id=None, **(narrow if small else {}))).eval()


def _calls(lm: PreTrainedModel, model: AugmentedLM, batch: int) -> dict[str, Call]:
    """The contenders on so many texts."""
    generator = torch.Generator().manual_seed(batch)
    length = PROMPT + 1 + VARIANT.prompt_length
    long = torch.randint(3, lm.config.vocab_size, (batch, length), generator=generator)
    long = long.to(lm.device)
    ids = long[:, -PROMPT:]
    features = torch.randn(batch, VARIANT.encoder_layers, DIM, generator=generator).to(lm.device)
    alone = torch.arange(batch, device=lm.device)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}

    def ours(rows: torch.Tensor) -> torch.Tensor:
        media = features[: int(rows.max()) + 1]
        return model.generate(ids, torch.ones_like(ids), media, rows, **settings)

    def plain(text: torch.Tensor) -> torch.Tensor:
        return lm.generate(text, attention_mask=torch.ones_like(text), **settings)

    return {
        "ours": lambda: ours(alone),
        "shared": lambda: ours(alone // SHARED),
        "HF": lambda: plain(ids),
        "HF prefix": lambda: plain(long),
    }


def _measure(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender, repeat by repeat; one call of each before them warms up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            start = time.perf_counter()
            answers = calls[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
            assert answers.shape[1] >= PROMPT + NEW, "a text ended early"
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(calls: dict[str, Call]) -> None:
    """By operation, of ours and of Hugging Face's."""
    from torch.profiler import ProfilerActivity, profile

    for name in ("ours", "HF"):
        calls[name]()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            calls[name]()
        print(name)
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
