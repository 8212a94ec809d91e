"""A training step from cached features, rewrite by rewrite, beside what it cannot do without.

    python benchmarks/train_step.py [--small] [--repeats 5] [--device auto] [--dtype auto]

Shapes: ViT-B/16 features of 12 layers, OPT-125M, 16 text tokens of which 2 are learnt, batches of 8
and 64, one and four questions about each image; random weights. Two variants: eP-ALM (soft prompt
of 10 with MLP, a connection per level) and eP-ALM_lin (one connection, no prompt). A step is
forward, backward and AdamW, on batches that `TrainingBatches` draws from a feature store.

encoder in loop  every example's image through the encoder, then the naive step
encoder, bf16    the same with the encoder in bfloat16 as well, where the LM is; else in float32, as
                 recipes have it unless they say otherwise
naive            [token | prompt | text] of every example at once, all logits, attention as Hugging
                 Face has it, and (in lin) a graph down to the words
logits           logits only where there is a label
graph            no graph below the lowest trained input; nothing to gain where a prompt is trained
attention        as ours: on a CPU written out
prefix           prefix once per media, prompt below the first injection layer once per step; from
                 here on the ReLUs keep booleans, and logits are made 128 labels at a time
packed           prefix and texts in one sequence
last             in the last layer, keys and values alone where no token is predicted from: with it,
                 the step that `train` takes
states           and text states at the first injection layer from their cache, as `train` has them
                 for variants that train nothing below
halves           the step of `last` with `train.accumulate: 2`: in two pieces, for the memory's sake
three, together  the step of `last` for three runs at once, per run, as `sweep --together 3` has it

bound            the matrix products that the sample-dependent work needs, back to back on the same
                 weights: text tokens in all layers, one token per media from the first injection
                 layer on, logits at labels; forward, and backward where a trained parameter is
                 reached. Attention's own products are not counted, nor are prompt tokens. For
                 `states` there is a bound of its own, without the lower layers.

Steps take turns within a repeat, so that all see the same machine; medians count. Peak memory is
measured in a process of its own, without the interpreter and its libraries, weights included; that
of the step alone leaves out weights and optimiser, too. Data wait is the time that drawing a batch
takes, as a share of the step. The encoders of video and audio are measured on one batch, since they
take minutes.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import machine
import numpy as np
import psutil
import torch
import weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from epalm.config import Recipe, parse_recipe
from epalm.data.example import Example
from epalm.device import choose_device, choose_dtype
from epalm.extract.encoder import Encoder, build, describe
from epalm.extract.lookup import FeatureTable
from epalm.model import attention
from epalm.model.augmented import AugmentedLM
from epalm.model.shared import SharedLM
from epalm.model.text import Equal, TextCodec
from epalm.store.feature_set import Catalogue, CatalogueEntry, FeatureSet, Layout
from epalm.store.marker import Row
from epalm.store.spec import ColumnSpec
from epalm.store.writer import ColumnWriter
from epalm.train.batches import Batch, TrainingBatches
from epalm.train.loss import losses_of
from epalm.train.optimiser import make_optimiser, set_learning_rates
from epalm.train.text_states import open_text_states
from epalm.train.together import join

WORDS = 500
MEDIA = 512
PROMPT = 15  # words; the answer's word and EOS follow: 16 tokens enter the LM, 2 are learnt
VARIANTS: dict[str, dict[str, Any]] = {
    "epalm": {"connection": "separate", "prompt_length": 10},
    "lin": {"connection": "shared", "prompt_length": 0},
}
MEDIA_SHAPES = {"image": (3, 224, 224), "video": (8, 3, 224, 224), "audio": (1024, 128)}

_IN_LOOP = {"float32": "encoder in loop", "bfloat16": "encoder, bf16"}
_ENDING = {"float32": "", "bfloat16": "_bf16"}


class Case(NamedTuple):
    """A variant, examples per step, and examples about one image among them."""

    variant: str
    batch: int
    questions: int

    def __str__(self) -> str:
        return f"{self.variant}, batch {self.batch}, {self.questions} per image"


class World:
    """The dataset, the features and the LM, shared by all cases.

    `small`: a narrow encoder and LM, for a quick look.
    """

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.small = folder, options.small
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.device)
        torch.manual_seed(0)
        size = {"hidden_size": 192, "num_attention_heads": 3, "ffn_dim": 768,
                "word_embed_proj_dim": 192} if self.small else {}  # fmt: skip
        config = OPTConfig(**size)
        self.lm = OPTForCausalLM(config).to(self.device, self.dtype).eval()
        self.lm.save_pretrained(folder / "lm")
        self.tokenizer = _tokenizer()
        (folder / "image").mkdir()
        weights.vit(folder / "image", self.small)
        self.features: FeatureSet | None = None

    def recipe(self, case: Case, modality: str = "image", dtype: str = "float32") -> Recipe:
        """`dtype`: of the encoder."""
        kinds = {"image": "timm", "video": "timesformer", "audio": "ast"}
        tree = {
            "name": "benchmark",
            "device": str(self.device),
            "data": {"kind": "jsonl", "path": "none"},
            "text": {"template": "{prompt}", "answer_prefix": ""},
            "encoder": {
                "kind": kinds[modality],
                "weights": str(self.folder / modality),
                "dtype": dtype,
            },
            "store": {"root": str(self.folder / "features")},
            "lm": {"weights": str(self.folder / "lm")},
            "variant": VARIANTS[case.variant],
            "train": {
                "steps": 1000,
                "batch_size": case.batch,
                "examples_per_media": case.questions,
            },
        }
        return parse_recipe(tree, "benchmark")

    def batches(self, case: Case) -> TrainingBatches:
        """Of all images, from a feature store that is made at the first call."""
        recipe = self.recipe(case)
        names = [f"{n:06}" for n in range(MEDIA)]
        if self.features is None:
            self.features = _random_features(recipe, names)
        table = FeatureTable(recipe, self.features, Catalogue(
            media={n: CatalogueEntry(n, 0, 0) for n in names}))  # fmt: skip
        table.needed = [(n, 0) for n in names]
        table.place("auto", self.device)
        draw = np.random.default_rng(0)
        examples = [
            Example(
                f"{name} {question}",
                name,
                " ".join(f"w{n}" for n in draw.integers(WORDS, size=PROMPT)),
                (f"w{draw.integers(WORDS)}",),
                "train",
            )
            for name in names
            for question in range(case.questions)
        ]
        codec = TextCodec(self.tokenizer, recipe.text)
        return TrainingBatches(examples, table, codec, recipe, self.device)

    def model(self, case: Case) -> AugmentedLM:
        torch.manual_seed(0)
        dim = self.lm.config.hidden_size  # the encoder's too, in these shapes
        return AugmentedLM.from_config(self.lm, self.recipe(case).variant, 12, dim)


class Steps:
    """The steps of one case, by name; each returns its loss."""

    def __init__(self, world: World, case: Case):
        self.world, self.case = world, case
        self.config = world.recipe(case).train
        self.model = world.model(case)
        self.batches = world.batches(case)
        self.optimiser = make_optimiser(self.model, self.config)
        self.number = 0
        self.image = torch.randn(case.batch, *MEDIA_SHAPES["image"])
        fused = self._with_fused_attention
        self.by_name: dict[str, Callable[[], torch.Tensor]] = {
            "encoder in loop": fused(lambda: self._step(self._encoder_in_loop("float32"))),
            "naive": fused(lambda: self._step(self._naive(logits_at_labels=False, graph=True))),
            "logits": fused(lambda: self._step(self._naive(logits_at_labels=True, graph=True))),
            "graph": fused(lambda: self._step(self._naive(logits_at_labels=True, graph=False))),
            "attention": lambda: self._step(self._naive(logits_at_labels=True, graph=False)),
            "prefix": lambda: self._step(self._apart),
            "packed": lambda: self._step(self._whole_last_layer),
            "last": lambda: self._step(self._shared),
            "halves": self._step_in_halves,
            "three, together": self._step_of_three,
        }
        if world.dtype == torch.bfloat16:
            in_bf16 = fused(lambda: self._step(self._encoder_in_loop("bfloat16")))
            self.by_name = {"encoder, bf16": in_bf16, **self.by_name}
        if self.model.lower_is_frozen:
            self.with_states = world.batches(case)
            self.with_states.text_states = open_text_states(
                world.recipe(case), self.model, self.with_states.texts
            )
            self.by_name["states"] = lambda: self._step(self._shared, self.with_states)

    def data_seconds(self, count: int = 20) -> float:
        """What drawing a batch takes."""
        start = time.perf_counter()
        for step in range(count):
            self.batches[self.number + step]
        return (time.perf_counter() - start) / count

    @cached_property
    def _three(self) -> tuple[SharedLM, list[torch.optim.AdamW]]:
        models = [self.world.model(self.case) for _ in range(3)]
        return SharedLM(models), [make_optimiser(model, self.config) for model in models]

    def _step_in_halves(self) -> torch.Tensor:
        set_learning_rates(self.optimiser, self.number, self.config)
        self.optimiser.zero_grad(set_to_none=True)
        labels = self.batches.size(self.number).labels
        total = torch.zeros((), device=self.world.device)
        for index in range(2):
            sums, _ = losses_of(self.model, self.batches.piece(self.number, index, 2))
            loss = sums.sum() / labels
            loss.backward()
            total += loss.detach()
        self.optimiser.step()
        self.number += 1
        return total

    def _step_of_three(self) -> torch.Tensor:
        shared, optimisers = self._three
        for optimiser in optimisers:
            set_learning_rates(optimiser, self.number, self.config)
            optimiser.zero_grad(set_to_none=True)
        batch = join([self.batches[self.number + run] for run in range(3)])
        sums, counts = losses_of(shared, batch)
        loss = 3 * sums.sum() / counts.sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        self.number += 3
        return loss.detach() / 3

    def _step(
        self,
        loss_of: Callable[[AugmentedLM, Batch], torch.Tensor],
        batches: TrainingBatches | None = None,
    ) -> torch.Tensor:
        batch = (batches or self.batches)[self.number]
        set_learning_rates(self.optimiser, self.number, self.config)
        self.optimiser.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch)
        loss.backward()
        self.optimiser.step()
        self.number += 1
        return loss.detach()

    @staticmethod
    def _with_fused_attention(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The step with torch's own attention, as Hugging Face's models have it."""

        def stepped() -> torch.Tensor:
            written_out = attention.WRITTEN_OUT_ON.copy()
            attention.WRITTEN_OUT_ON.clear()
            try:
                return step()
            finally:
                attention.WRITTEN_OUT_ON.update(written_out)

        return stepped

    @cached_property
    def _encoders(self) -> dict[str, Encoder]:
        return {
            dtype: build(self.world.recipe(self.case, dtype=dtype), self.world.device)
            for dtype in _IN_LOOP
        }

    def _naive(self, logits_at_labels: bool, graph: bool) -> Callable[..., torch.Tensor]:
        """As usually written: everything for every example, at once."""

        def loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
            own = batch.features[batch.rows]
            return _joint_loss(model, batch, own, logits_at_labels, graph)

        return loss

    def _encoder_in_loop(self, dtype: str) -> Callable[..., torch.Tensor]:
        def loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
            features = self._encoders[dtype].encode(self.image, range(12)).squeeze(2)[:, -6:]
            return _joint_loss(model, batch, features.clone().to(model.device), False, True)

        return loss

    def _apart(self, model: AugmentedLM, batch: Batch) -> torch.Tensor:
        """First the prefixes, then the texts."""

        def states(
            ids: torch.Tensor,
            mask: torch.Tensor,
            features: torch.Tensor,
            rows: torch.Tensor,
            equal: Equal,
            *_: Any,
        ) -> torch.Tensor:
            return model.extend(model.perceive(features, rows), ids, mask, equal)[:, -batch.last :]

        apart = SimpleNamespace(
            lm=model.lm, trained=model.trained, family=model.family, states=states
        )
        return self._shared(apart, batch)

    def _whole_last_layer(self, model: AugmentedLM, batch: Batch) -> torch.Tensor:
        length = batch.input_ids.shape[1]
        offset = length - batch.last
        row, place = batch.labelled // batch.last, batch.labelled % batch.last
        whole = replace(batch, last=length, labelled=row * length + offset + place)
        return self._shared(model, whole)

    def _shared(self, model: Any, batch: Batch) -> torch.Tensor:
        sums, counts = losses_of(model, batch)
        return sums.sum() / counts.sum()


def _joint_loss(
    model: AugmentedLM, batch: Batch, features: torch.Tensor, at_labels: bool, graph: bool
) -> torch.Tensor:
    """Loss of the whole sequences, run at once; `graph`: down to the words."""
    if graph:
        model.lm.enable_input_require_grads()
    states = model.joint_states(batch.input_ids, batch.attention_mask, features)
    if graph:
        model.lm.disable_input_require_grads()
    if at_labels:
        text = states[:, -batch.last :].flatten(0, 1)[batch.labelled]
        labels = batch.labels[:, -batch.last :].flatten()[batch.labelled]
        return cross_entropy(model.family.logits(text).float(), labels)
    logits = model.family.logits(states)[:, -batch.labels.shape[1] :].flatten(0, 1)
    return cross_entropy(logits.float(), batch.labels.flatten())


class Bound:
    """The matrix products of a case, ready to be run back to back."""

    def __init__(self, world: World, case: Case, lower_cached: bool = False):
        lm = world.lm
        layers = lm.model.decoder.layers
        half = len(layers) // 2
        texts, media = case.batch * (PROMPT + 1), case.batch // case.questions
        trains_prompt = case.variant == "epalm"
        self.products: list[tuple[torch.Tensor, torch.Tensor]] = []
        weights_of = [
            [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight,
             layer.self_attn.v_proj.weight, layer.self_attn.out_proj.weight,
             layer.fc1.weight, layer.fc2.weight]
            for layer in layers
        ]  # fmt: skip
        for index, some in enumerate(weights_of):
            upper = index >= half
            if upper or not lower_cached:
                self._forward(texts, some)
            if upper:
                self._forward(media, some)
        self._forward(2 * case.batch, [lm.lm_head.weight])
        self._backward(2 * case.batch, [lm.lm_head.weight])
        lowest = 0 if trains_prompt else half
        for index in reversed(range(lowest, len(layers))):
            # in the lowest layer text is reached as keys' queries are, but not its own input
            some = weights_of[index]
            self._backward(texts, some[3:] if index == lowest else some)
            if index >= half:
                self._backward(media, some)

    def _forward(self, rows: int, some: list[torch.Tensor]) -> None:
        self._add(rows, [w.detach().t() for w in some])

    def _backward(self, rows: int, some: list[torch.Tensor]) -> None:
        self._add(rows, [w.detach() for w in reversed(some)])

    def _add(self, rows: int, some: list[torch.Tensor]) -> None:
        for weight in some:
            left = torch.randn(rows, weight.shape[0], device=weight.device, dtype=weight.dtype)
            self.products.append((left, weight))

    def __call__(self) -> None:
        for left, weight in self.products:
            torch.mm(left, weight)


def _random_features(recipe: Recipe, names: list[str]) -> FeatureSet:
    """A feature set as `extract` leaves it."""
    spec = describe(recipe)
    layout = Layout("zarr", 512, recipe.encoder.weights)
    features = FeatureSet.create(Path(recipe.store.root), spec, layout)
    (column,) = features.columns_for(ColumnSpec("cls", 1, tuple(range(spec.layers))))
    writer = ColumnWriter(column)
    draw = np.random.default_rng(0)
    for shard in writer.plan([Row(name, 0) for name in names]):
        claim = writer.claim(shard)
        assert claim is not None
        with claim.stream:
            shape = (len(claim.plan.hashes), *column.row_shape)
            writer.write(claim.plan, draw.standard_normal(shape, np.float32), {})
    return features


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for every word."""
    words = ["<pad>", "</s>", *(f"w{n}" for n in range(WORDS))]
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="narrow models, for a quick look")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the LM")
    parser.add_argument("--peak", choices=["naive", "last", "halves"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="epalm-step-") as name:
        if options.peak:
            print(json.dumps(_peak(Path(name), options)))
            return
        print(machine.describe(Path(name), ["torch", "transformers", "timm"]))
        world = World(Path(name), options)
        print(f"device    {world.device}, {torch.get_num_threads()} torch threads, LM in "
              f"{world.dtype}\n")  # fmt: skip
        result: dict[str, Any] = {}
        for variant in VARIANTS:
            for batch in (8, 64):
                for questions in (1, 4):
                    case = Case(variant, batch, questions)
                    result[str(case)] = _measure(world, case, options)
        main_case = result[str(Case("epalm", 64, 4))]
        print(json.dumps(_summary(world, options, result, main_case)))


def _measure(world: World, case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Print a case's table; median seconds by step, with both bounds and the data's."""
    steps = Steps(world, case)
    timed: dict[str, Callable[[], Any]] = {**steps.by_name, "bound": Bound(world, case)}
    if "states" in timed:
        timed["bound of states"] = Bound(world, case, lower_cached=True)
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
    found["data"] = steps.data_seconds()
    print(f"{case}")
    for name, value in found.items():
        bound = found["bound of states" if name == "states" else "bound"]
        ratio = f"{value / bound:8.2f} of bound" if name in steps.by_name else ""
        print(f"  {name:16}{value:9.4f} s {ratio}")
    print(flush=True)
    return found


def _summary(
    world: World, options: argparse.Namespace, result: dict[str, Any], case: dict[str, float]
) -> dict[str, Any]:
    """The last line, of eP-ALM in batches of 64 with four questions about each image.

    What has `_lin` in it is of eP-ALM_lin in these shapes, with text states from their cache; what
    ends in `_bf16`, with an encoder in bfloat16.
    """
    step, lin = case["last"], result[str(Case("lin", 64, 4))]
    encoders = {m: _encoder_seconds(world, m) for m in ("video", "audio")}
    dtypes = [*encoders["video"]]
    peaks = {name: _peak_of(name, options) for name in ("naive", "last", "halves")}
    for name, peak in peaks.items():
        print(f"peak memory, batch 64, {name}: {peak.whole:.0f} MB, {peak.step:.0f} of the step")
    for modality, of_dtype in encoders.items():
        for dtype, seconds in of_dtype.items():
            print(f"{modality} encoder, {dtype}: {seconds:.2f} s a media")
    summary = {
        "step_over_bound": step / case["bound"],
        "step_over_bound_halves": case["halves"] / case["bound"],
        "data_wait_share": case["data"] / step,
        "peak_memory_ratio": peaks["last"].whole / peaks["naive"].whole,
        "peak_memory_ratio_halves": peaks["halves"].whole / peaks["naive"].whole,
        "peak_memory_ratio_of_step": peaks["last"].step / peaks["naive"].step,
        "speedup_three_together": step / case["three, together"],
    }
    for name, of, ours in (("", case, step), ("_lin", lin, lin["states"])):
        for dtype in dtypes:
            in_loop = {m: 64 * s[dtype] + of["naive"] for m, s in encoders.items()}
            in_loop["image"] = of[_IN_LOOP[dtype]]
            for modality, seconds in in_loop.items():
                summary[f"speedup_{modality}{name}{_ENDING[dtype]}"] = seconds / ours
    return {
        **{key: round(value, 4) for key, value in summary.items()},
        "seconds": {
            name: {k: round(v, 4) for k, v in found.items()} for name, found in result.items()
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
    for dtype in _IN_LOOP if world.dtype == torch.bfloat16 else ("float32",):
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
    """What a step at batch 64 needs at its peak, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak", step, "--device", options.device, "--dtype",
               options.dtype, *(["--small"] if options.small else [])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def _peak(folder: Path, options: argparse.Namespace) -> Peak:
    """That of the step `options.peak`, in this process."""
    before = psutil.Process().memory_info().rss
    world = World(folder, options)
    steps = Steps(world, Case("epalm", 64, 4))
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.is_file():
        reset.write_text("5")  # what making the models took does not count
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
