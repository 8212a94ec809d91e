"""A batch in pieces, runs that stop early, batches that are not finite, and what is printed."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from epalm.config import VariantConfig
from epalm.errors import EpalmError
from epalm.evaluate.scores import validate
from epalm.extract.lookup import FeatureTable
from epalm.model.augmented import AugmentedLM
from epalm.model.packing import Packing
from epalm.model.spread import check_room
from epalm.store.atomic import read_json_lines
from epalm.train.batches import TrainingBatches
from epalm.train.checkpoint import load_weights
from epalm.train.loop import Training
from epalm.train.loss import example_losses
from epalm.train.parts import Parts, assemble
from epalm.train.progress import Progress
from epalm.train.run import Run
from tests.conftest import batches_of, fit

Prepare = Callable[..., Parts]
Cli = Callable[..., Result]


def metrics(run: Run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in run.read_metrics() if name in line}


@pytest.mark.parametrize("count", [2, 4])
def test_pieces_make_up_the_batch(prepare: Prepare, count: int) -> None:
    parts = prepare("encoder.views.count=2")
    batches = batches_of(parts)
    split_media = 0
    for step in range(12):  # more than an epoch
        whole = batches[step]
        pieces = [batches.piece(step, index, count) for index in range(count)]
        assert [len(p.input_ids) for p in pieces] == [8 // count] * count
        for name in ("input_ids", "labels"):
            rows = [
                row[mask.bool()].tolist()
                for p in pieces
                for row, mask in zip(getattr(p, name), p.attention_mask, strict=True)
            ]
            assert rows == [
                row[mask.bool()].tolist()
                for row, mask in zip(getattr(whole, name), whole.attention_mask, strict=True)
            ]
        shown = torch.cat([p.features[p.rows] for p in pieces])
        assert torch.equal(shown, whole.features[whole.rows])
        split_media += sum(len(p.features) for p in pieces) - len(whole.features)
        sizes = [batches.size(step, index, count) for index in range(count)]
        assert tuple(map(sum, zip(*sizes, strict=True))) == batches.size(step)
        labels = int((whole.labels != -100).sum())
        assert batches.size(step) == (8, int(whole.attention_mask.sum()), labels)
    assert split_media <= 12 * (count - 1)  # none but those at a cut


@pytest.mark.parametrize("loss", ["answer", "all"])
def test_accumulation_changes_nothing(prepare: Prepare, tmp_path: Path, loss: str) -> None:
    runs = []
    for pieces in (1, 4):
        parts = prepare(
            f"train.accumulate={pieces}", f"train.loss={loss}", "train.loss_scale=0.5",
            "train.clip_norm=0.5", f"runs={tmp_path / str(pieces)}",
        )  # fmt: skip
        run = Run.create(parts.recipe)
        fit(run, parts, None)
        runs.append(run)
    one, four = runs
    assert metrics(one, "loss") == pytest.approx(metrics(four, "loss"), rel=1e-5)
    weights, others = load_file(one.last), load_file(four.last)
    for name, value in weights.items():
        # 4e-7 apart here, from adding gradients in another order
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_float16_lm_loses_no_small_gradient(prepare: Prepare) -> None:
    """A loss scaled so far down that float16 could not hold its gradient: 6e-8 is its smallest."""
    found = []
    for dtype in ("float32", "float16"):
        parts = prepare(f"lm.dtype={dtype}", "train.loss_scale=1e-6", "train.accumulate=2")
        training = Training(Run.create(parts.recipe), parts, batches_of(parts), validate)
        outcome = training.stepper()(0)
        parameters = parts.model.trained.named_parameters()
        gradients = {name: 1e6 * p.grad for name, p in parameters}
        found.append((outcome.loss, outcome.norm, gradients))
        shutil.rmtree(training.run.folder)
    (loss, norm, exact), (rough_loss, rough_norm, rough) = found
    # float16 has eleven binary digits, and six layers to lose some of them
    assert rough_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert rough_norm.item() == pytest.approx(norm.item(), rel=2e-2)
    for name, gradient in exact.items():
        assert rough[name].dtype == torch.float32
        error = (rough[name] - gradient).norm() / gradient.norm()
        assert error < 0.05, name


def test_a_run_may_go_on_with_other_pieces(prepare: Prepare) -> None:
    parts = prepare()
    fit(Run.create(parts.recipe), parts, None, max_steps=2)
    parts = prepare("train.accumulate=2")
    assert fit(Run.create(parts.recipe), parts, None).step == 6


def test_references_are_drawn_as_often_as_they_stand_there(prepare: Prepare) -> None:
    """Convention 18: ten answers of which seven are equal; with 3000 draws, within 4 deviations."""
    parts = prepare()
    answers = ("red",) * 7 + ("blue",) * 2 + ("green",)
    examples = [replace(e, references=answers) for e in parts.dataset.split("train")]
    batches = TrainingBatches(examples, parts.features, parts.codec, parts.recipe, parts.device)
    drawn = Counter(answer for step in range(375) for _, answer in batches.chosen(step))
    assert drawn.total() == 3000
    for answer, share in (("red", 0.7), ("blue", 0.2), ("green", 0.1)):
        deviation = (share * (1 - share) / 3000) ** 0.5
        assert drawn[answer] / 3000 == pytest.approx(share, abs=4 * deviation)
    by_step = Counter(frozenset(a for _, a in batches.chosen(step)) for step in range(20))
    assert len(by_step) > 1  # not the same draws in each step


def test_a_batch_that_is_not_finite_is_saved(
    prepare: Prepare, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Message and files name the step that did it, though it is noticed some steps later."""
    parts = prepare()
    batches = batches_of(parts)
    first = {e.media: step for step in reversed(range(10)) for e, _ in batches.chosen(step)}
    media, bad = max(first.items(), key=lambda item: item[1])
    assert 0 < bad < 8
    fetch = FeatureTable.fetch

    def poisoned(
        self: FeatureTable, ids: list[str], views: list[int] | None = None
    ) -> torch.Tensor:
        features = fetch(self, ids, views).clone()
        features[[i for i, name in enumerate(ids) if name == media]] = torch.inf
        return features

    monkeypatch.setattr(FeatureTable, "fetch", poisoned)
    sets = (f"train.checkpoint_every={bad}", "train.steps=10", "train.log_every=100")
    done = cli("train", tmp_path / "toy.yaml", *(word for s in sets for word in ("--set", s)))
    run = Run.of(parts.recipe)
    saved = run.folder / f"not-finite-{bad}.json"
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert f"at step {bad}" in done.output and str(saved) in done.output
    assert load_weights(run.last, parts.model).step == bad
    content = json.loads(saved.read_text())
    assert (content["step"], content["loss"]) == (bad, "nan")
    assert content["examples"] == [
        {"id": e.id, "media": e.media, "prompt": e.prompt, "answer": answer}
        for e, answer in batches.chosen(bad)
    ]
    tensors = load_file(saved.with_suffix(".safetensors"))
    assert torch.equal(tensors["input_ids"], batches[bad].input_ids)
    assert torch.isinf(tensors["features"]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    prepare: Prepare, cli: Cli, tmp_path: Path, dtype: str
) -> None:
    prepare()
    recipe, runs = tmp_path / "toy.yaml", tmp_path / "runs"
    sets = ("--set", "train.val_every=4", "--set", f"lm.dtype={dtype}")
    assert cli("train", recipe, *sets, "--set", "name=whole").exit_code == 0
    words = (recipe, *sets, "--set", "name=cut", "--max-steps")
    stopped = cli("run", *words, "3")  # before the first validation
    assert "train: 3 steps, none validated yet" in stopped.output
    assert "with last.safetensors" in stopped.output
    assert cli("train", *words, "3").exit_code == 0  # nothing is left to do
    assert "train: 5 steps, best at step 4" in cli("train", *words, "5").output
    assert "train: 6 steps" in cli("train", *words, "99").output
    for name in ("last", "best"):
        files = [runs / run / "checkpoints" / f"{name}.safetensors" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    kept = ("step", "loss", "lr", "val_score")
    whole, cut = (
        [
            {k: line[k] for k in kept if k in line}
            for line in read_json_lines(runs / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut
    assert cli("train", *words, "0").exit_code == 2


def test_patience_ends_a_training(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    parts = prepare("train.val_every=1", "train.patience=3", "train.steps=20")
    scores = iter([0.1, 0.3, 0.3, 0.2, 0.4, 0.1, 0.2, 0.4, 0.9])
    progress = fit(Run.create(parts.recipe), parts, lambda _: next(scores), max_steps=6)
    assert progress == Progress(6, 0.4, 5, 1)
    again = assemble(parts.recipe)
    progress = fit(Run.create(parts.recipe), again, lambda _: next(scores))
    assert progress == Progress(8, 0.4, 5, 3)  # a score that is as good is not better
    assert "step 8: no better score in 3 validations" in capsys.readouterr().out
    run = Run.create(parts.recipe)
    assert load_weights(run.best, parts.model).step == 5
    assert fit(run, assemble(parts.recipe), lambda _: next(scores)) == progress  # it has ended
    assert next(scores) == 0.9


def test_patience_needs_validations(prepare: Prepare) -> None:
    with pytest.raises(EpalmError, match="set val_every too"):
        prepare("train.patience=3")


def test_what_is_printed(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    parts = prepare("train.log_every=2")
    run = Run.create(parts.recipe)
    fit(run, parts, validate)
    lines = {line["step"]: line for line in run.read_metrics() if "loss" in line}
    batches = batches_of(parts)
    masks = [batches[step].attention_mask for step in (4, 5)]  # since the line of step 4
    padding = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    assert lines[6]["padding_share"] == pytest.approx(padding)
    tokens_per_example = sum(int(m.sum()) for m in masks) / 16
    rates = lines[6]["tokens_per_second"], lines[6]["examples_per_second"]
    assert rates[0] / rates[1] == pytest.approx(tokens_per_example)
    assert 0 < lines[6]["data_wait_share"] < 1
    assert lines[6]["peak_memory_bytes"] > 50e6  # torch alone takes more
    out = capsys.readouterr().out
    (summary,) = [line for line in out.splitlines() if line.startswith("train: 6 steps in")]
    for word in ("examples/s", "tokens/s", "waiting for data", "padding", "peak memory"):
        assert word in summary


def test_an_lm_that_is_mapped_to_devices_is_the_same(prepare: Prepare) -> None:
    """On a machine with one device, as far as that shows anything."""
    losses = []
    for device_map in ("null", "auto"):
        parts = prepare(f"lm.device_map={device_map}", f"name=map-{device_map}")
        run = Run.create(parts.recipe)
        fit(run, parts, validate)
        losses.append(metrics(run, "loss"))
    assert losses[0] == losses[1]
    with pytest.raises(EpalmError, match=r"lm\.device_map: an LM with adapters"):
        prepare("lm.device_map=auto", "variant.attention_adapters={reduction: 8}")


def test_an_lm_in_parts_runs_through_hooks(opt_folder: Path, tmp_path: Path) -> None:
    """Layers whose weights lie on disk stand in for layers on another GPU."""
    layers = {f"model.decoder.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    whole, spread = (
        AutoModelForCausalLM.from_pretrained(opt_folder, attn_implementation="sdpa", **options)
        for options in (
            {},
            {
                "device_map": {
                    "model.decoder.embed_tokens": "cpu",
                    "model.decoder.embed_positions": "cpu",
                    "model.decoder.final_layer_norm": "cpu",
                    "lm_head": "cpu",
                    **layers,
                },
                "offload_folder": tmp_path,
            },
        )
    )
    assert {"meta", "cpu"} == {p.device.type for p in spread.parameters()}
    ids = torch.arange(20).view(2, 10)
    features = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    losses = []
    for lm in (whole, spread):
        torch.manual_seed(0)
        variant = VariantConfig(encoder_layers=3, inject_start=1)
        model = AugmentedLM.from_config(lm, variant, 6, 24)
        sums, _ = example_losses(model, ids, torch.ones_like(ids), ids.roll(-1, 1), features)
        sums.sum().backward()
        grads = [p.grad for p in model.trained.parameters() if p.grad is not None]
        losses.append((sums, torch.cat([g.flatten() for g in grads])))
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(EpalmError, match=r"lm\.device_map: the GPUs have not enough"):
        check_room(spread)


def test_masks_follow_the_layers_to_their_devices() -> None:
    """As accelerate's hooks move what a layer is called with."""
    owner, masks = torch.tensor([0, 0, 1]), (torch.zeros(1, 1, 2, 2), torch.zeros(3, 1, 4, 6))
    packing = Packing(2, 3, owner, *masks)
    moved = send_to_device({"packing": packing}, "meta")["packing"]
    assert moved.owner.is_meta and moved.prefix_mask.is_meta and moved.text_mask.is_meta
    assert (moved.prefixes, moved.texts) == (2, 3)
    assert send_to_device({"packing": packing}, "cpu")["packing"] is packing
