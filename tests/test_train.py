"""Training on cached features: batches, schedule, learning, and resuming bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from epalm.config import Recipe, TrainConfig, load_recipe
from epalm.errors import EpalmError
from epalm.evaluate.scores import validate
from epalm.model.text import TextCodec
from epalm.train.batches import TrainingBatches
from epalm.train.checkpoint import load_weights, save_weights
from epalm.train.optimiser import learning_rates, make_optimiser
from epalm.train.parts import Parts, assemble
from epalm.train.progress import Progress
from epalm.train.run import Run
from tests.conftest import batches_of, fit
from tests.test_cli import refused


def test_batches_hold_prompts_answers_and_their_media(prepare: Callable[..., Parts]) -> None:
    parts = prepare()
    batches, tokenizer = batches_of(parts), parts.codec.tokenizer
    by_text = {
        (parts.recipe.text.template.format(prompt=e.prompt), e.references[0], e.media)
        for e in parts.dataset.split("train")
    }
    batch = batches[0]
    media = {tuple(parts.features.fetch([m]).flatten().tolist()): m for m in parts.dataset.media}
    for row in range(8):
        real = batch.attention_mask[row].bool()
        ids, labels = batch.input_ids[row][real].tolist(), batch.labels[row][real].tolist()
        learnt = [label for label in labels if label != -100]
        assert learnt[-1] == tokenizer.eos_token_id
        assert ids[0] == tokenizer.bos_token_id
        answer = tokenizer.decode(learnt[:-1]).strip()
        prompt = tokenizer.decode(ids[1 : len(ids) - len(learnt) + 1])
        shown = media[tuple(batch.features[batch.rows[row]].flatten().tolist())]
        assert (prompt, answer, shown) in by_text
        assert labels[-len(learnt) :] == learnt
        assert ids[len(ids) - len(learnt) + 1 :] == learnt[:-1]


def test_all_text_is_learnt_when_the_recipe_says_so(prepare: Callable[..., Parts]) -> None:
    batch = batches_of(prepare("train.loss=all"))[0]
    assert torch.equal(batch.labels != -100, batch.attention_mask.bool())
    inside = (batch.labels != -100)[:, :-1]
    assert torch.equal(batch.labels[:, :-1][inside], batch.input_ids[:, 1:][inside])


def test_an_epoch_shows_every_example_once_in_its_own_order(
    prepare: Callable[..., Parts],
) -> None:
    batches = batches_of(prepare("train.examples_per_media=2"))
    count = len(batches.examples) // 8
    epochs = [[e.id for step in range(count) for e, _ in batches.chosen(n * count + step)]
              for n in (0, 1, 0)]  # fmt: skip
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(epochs[0]) == count * 8 == len(set(epochs[0]))


def test_each_epoch_learns_from_one_view_of_each_media(prepare: Callable[..., Parts]) -> None:
    parts = prepare("encoder.views.count=3")
    batches = batches_of(parts)
    steps = len(batches.examples) // 8
    shown = []
    for epoch in range(12):
        views: dict[str, set[int]] = {}
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches[step]
            media = [e.media for e in batches.examples]
            for row in batch.features:
                found = {
                    (m, view)
                    for m in set(media)
                    for view in range(4)
                    if torch.equal(parts.features.fetch([m], [view])[0], row)
                }
                assert len(found) == 1
                ((name, view),) = found
                views.setdefault(name, set()).add(view)
        assert all(len(some) == 1 for some in views.values())
        shown.append({name: view for name, (view,) in views.items()})
    for media in shown[0]:
        assert {epoch[media] for epoch in shown if media in epoch} == {1, 2, 3}
    again = batches_of(parts)
    assert torch.equal(again[steps].features, batches[steps].features)


def test_features_are_the_same_wherever_they_are_placed(prepare: Callable[..., Parts]) -> None:
    parts = [prepare(f"store.placement={place}") for place in ("auto", "ram", "disk", "device")]
    batches = [batches_of(p)[2].features for p in parts]
    assert all(torch.equal(batches[0], other) for other in batches[1:])


def test_too_few_examples(prepare: Callable[..., Parts]) -> None:
    with pytest.raises(EpalmError, match="train.batch_size: 1000 wanted, the dataset has only"):
        batches_of(prepare("train.batch_size=1000"))


def test_schedule() -> None:
    config = TrainConfig(
        steps=101, lr=2e-5, warmup_lr=1e-5, min_lr=1e-6, warmup=0.2, prompt_lr=1e-5
    )
    rates = [learning_rates(step, config)[0] for step in range(101)]
    assert rates[0] == pytest.approx(1e-5 + 1e-5 / 20)
    assert max(rates) == rates[19] == pytest.approx(2e-5)
    assert rates[60] == pytest.approx((2e-5 + 1e-6) / 2)
    assert rates[100] == pytest.approx(1e-6)
    assert learning_rates(60, config)[1] == pytest.approx(rates[60] / 2)
    constant = config.model_copy(update={"prompt_schedule": "constant"})
    assert {learning_rates(step, constant)[1] for step in range(101)} == {1e-5}


def test_optimiser_holds_exactly_the_trained_parts(prepare: Callable[..., Parts]) -> None:
    model = prepare().model
    groups = make_optimiser(model, TrainConfig(steps=1)).param_groups
    assert [len(g["params"]) for g in groups] == [6, 5]
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in model.trained.parameters()}


def test_it_learns_and_leaves_the_lm_alone(prepare: Callable[..., Parts]) -> None:
    parts = prepare("train.steps=60", "train.lr=0.03", "variant.prompt_mlp=false")
    frozen = {name: value.clone() for name, value in parts.model.lm.state_dict().items()}
    run = Run.create(parts.recipe)
    progress = fit(run, parts, validate)
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert sum(losses[-10:]) / 10 < 0.65 * losses[0]  # ten batches are an epoch
    assert progress.step == 60
    assert all(
        torch.equal(value, frozen[name]) for name, value in parts.model.lm.state_dict().items()
    )
    saved = load_file(run.best)
    assert saved.keys() == {f"trained.{name}" for name, _ in parts.model.trained.named_parameters()}
    assert run.stages()["train"].seconds > 0
    assert any((run.folder / "tensorboard").iterdir())
    assert load_recipe(run.folder / "recipe.yaml") == parts.recipe


MOVED = ("store.placement=ram", "store.shard_rows=100", "encoder.workers=2", "encoder.batch_size=3",
         "encoder.decode_timeout=9", "decode.batch_size=7", "train.checkpoint_every=5")  # fmt: skip
"""Bytes are moved otherwise, and nothing else."""


@pytest.mark.parametrize("killed_at", [1, 3])  # before and after the first checkpoint
def test_resuming_gives_the_same_weights_bit_for_bit(
    prepare: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = prepare(f"runs={tmp_path / 'whole'}")
    fit(Run.create(whole.recipe), whole, validate)

    cut = prepare(f"runs={tmp_path / 'cut'}")
    real = TrainingBatches.piece

    def killed(self: TrainingBatches, step: int, index: int, count: int) -> object:
        if step == killed_at:
            raise KeyboardInterrupt
        return real(self, step, index, count)

    monkeypatch.setattr(TrainingBatches, "piece", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(Run.create(cut.recipe), cut, validate)
    monkeypatch.undo()
    moved = MOVED if killed_at == 3 else ()
    recipe = load_recipe(tmp_path / "toy.yaml", (f"runs={tmp_path / 'cut'}", *moved))
    resumed = assemble(recipe)
    run = Run.create(recipe)
    assert fit(run, resumed, validate).step == 6

    for name in ("last", "best"):
        files = [
            tmp_path / kind / "toy" / "checkpoints" / f"{name}.safetensors"
            for kind in ("whole", "cut")
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    lines = [
        [
            json.loads(line)
            for line in (tmp_path / kind / "toy" / "metrics.jsonl").read_text().splitlines()
        ]
        for kind in ("whole", "cut")
    ]
    kept = ("step", "loss", "lr", "val_score")
    one, other = ([{k: line[k] for k in kept if k in line} for line in some] for some in lines)
    assert one == other


def test_a_finished_run_is_not_trained_again(prepare: Callable[..., Parts]) -> None:
    parts = prepare()
    run = Run.create(parts.recipe)
    fit(run, parts, validate)
    before = run.last.read_bytes()
    assert fit(Run.create(parts.recipe), parts, validate).step == 6
    assert run.last.read_bytes() == before


def test_a_run_of_another_recipe_is_not_touched(prepare: Callable[..., Parts]) -> None:
    parts = prepare()
    run = Run.create(parts.recipe)
    fit(run, parts, validate)
    changed = parts.recipe.model_copy(
        update={"train": parts.recipe.train.model_copy(update={"lr": 0.5})}
    )
    with pytest.raises(EpalmError, match=r"train\.lr: 0\.01 there, 0\.5 wanted"):
        Run.create(changed)
    assert run.last.is_file()
    assert not Run.create(changed, overwrite=True).last.exists()


def test_a_run_may_go_on_with_bytes_moved_otherwise(
    toy: Callable[..., Path], vit_folder: Path
) -> None:
    """Those of further sources too; but its examples are bound by nothing else than their path."""
    data = {"kind": "jsonl", "path": "more.jsonl"}
    path = toy(also={"more": {"data": data, "encoder": {"weights": str(vit_folder)}}})
    begun = Run.create(load_recipe(path))
    begun.metrics.touch()
    for override in (
        *MOVED, "train.log_every=3", "store.root=elsewhere", "store.backend=hdf5",
        "data.media_root=images.zip", "data.name=other", "also.more.data.media_root=more.zip",
        "also.more.encoder.workers=1",
    ):  # fmt: skip
        changed = load_recipe(path, (override,))
        assert changed != load_recipe(path)
        Run.planned(changed)
    for override, said in (
        ("data.path=x", "  data.path: '.*toy.jsonl' there, 'x' wanted"),
        ("data.limits.train=3", "  data.limits.train: None there, 3 wanted"),
        ("also.more.data.path=x", "  also.more.data.path: 'more.jsonl' there, 'x' wanted"),
        ("also={}", r"  also: \{'more'"),
        ("store.dtype=float32", "  store.dtype: 'float16' there, 'float32' wanted"),
    ):
        with pytest.raises(EpalmError, match=f"of another recipe:\n{said}.*\n"):
            Run.planned(load_recipe(path, (override,)))


def test_a_run_without_a_step_is_begun_anew(toy: Callable[..., Path]) -> None:
    path = toy()
    first, other = load_recipe(path), load_recipe(path, ("train.lr=0.5",))
    run = Run.create(first)
    (run.folder / "features.json").write_text("{}")
    assert Run.create(other).recorded_features() is None
    assert load_recipe(run.folder / "recipe.yaml") == other
    run.metrics.touch()
    with pytest.raises(EpalmError, match=r"train\.lr: 0\.5 there, 0\.01 wanted"):
        Run.create(first)


def test_imported_weights_are_not_trained_over(prepare: Callable[..., Parts]) -> None:
    parts = prepare("train.steps=1")
    run = Run.create(parts.recipe)
    save_weights(run.best, parts.model, Progress())  # as import-official leaves it
    before = run.best.read_bytes()
    with pytest.raises(EpalmError, match="were imported.*--overwrite"):
        fit(Run.create(parts.recipe), parts, validate)
    assert run.best.read_bytes() == before
    assert fit(Run.create(parts.recipe, overwrite=True), parts, validate).step == 1


def test_without_validation_the_last_weights_are_the_best(prepare: Callable[..., Parts]) -> None:
    parts = prepare()
    run = Run.create(parts.recipe)
    assert fit(run, parts, None).best_step == 6
    assert load_weights(run.best, parts.model) == Progress(6, -1.0, 6)


def test_a_diverging_loss_stops_and_keeps_the_checkpoint(
    prepare: Callable[..., Parts],
) -> None:
    parts = prepare("train.lr=1e30", "train.checkpoint_every=1", "train.steps=20")
    run = Run.create(parts.recipe)
    with pytest.raises(EpalmError, match="lower train.lr"):
        fit(run, parts, None)
    assert run.last.is_file()


def test_checkpoint_errors(prepare: Callable[..., Parts], tmp_path: Path) -> None:
    parts = prepare()
    run = Run.create(parts.recipe)
    fit(run, parts, None)
    other = prepare("variant.prompt_length=2", f"runs={tmp_path / 'other'}")
    with pytest.raises(EpalmError, match="does not fit the recipe's variant"):
        load_weights(run.best, other.model)
    run.best.write_bytes(run.best.read_bytes()[:100])
    with pytest.raises(EpalmError, match="not a readable checkpoint .*; restore it, or train"):
        load_weights(run.best, parts.model)
    with pytest.raises(EpalmError, match="no such checkpoint"):
        load_weights(tmp_path / "gone.safetensors", parts.model)


@pytest.fixture
def half(toy: Callable[..., Path], cli: Callable[..., Result]) -> tuple[Path, Run]:
    """A recipe, and its run after a validation and some more steps."""
    recipe = toy(train={"val_every": 2, "checkpoint_every": 3})
    assert cli("run", recipe, "--max-steps", 3).exit_code == 0
    return recipe, Run.of(load_recipe(recipe))


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("place", ["end", "middle", "progress"])
def test_a_changed_bit_of_a_checkpoint_is_noticed(
    half: tuple[Path, Run], cli: Callable[..., Result], name: str, place: str
) -> None:
    """In its weights, in the optimiser's state, and in what it says of the training."""
    recipe, run = half
    path = getattr(run, name)
    whole = path.read_bytes()
    content = bytearray(whole)
    at = {"end": -3, "middle": len(whole) * 2 // 3, "progress": whole.index(b"best_step") + 13}
    content[at[place]] ^= 1
    path.write_bytes(content)
    refused(cli("train", recipe), f"{path}: not a readable checkpoint (it is not as it was")
    words = ("evaluate", run.folder, "--checkpoint", name)
    refused(cli(*words), f"{path}: not a readable checkpoint (it is not as it was")
    path.write_bytes(whole)
    assert cli("train", recipe).exit_code == 0


def test_best_weights_that_are_gone_are_missed(
    half: tuple[Path, Run], cli: Callable[..., Result]
) -> None:
    """The last ones do not take their place in silence."""
    recipe, run = half
    for _ in range(2):  # on the way, and at the end
        weights = run.best.read_bytes()
        run.best.unlink()
        for words in (("train", recipe), ("evaluate", run.folder)):
            refused(cli(*words), f"{run.best}: not there", "the best so far", "--overwrite")
        run.best.write_bytes(weights)
        assert cli("train", recipe).exit_code == 0


def test_small_files_that_were_changed(toy_recipe: Recipe) -> None:
    run = Run.create(toy_recipe)
    for name, said, read, texts in (
        ("stages.json", "must give `seconds` and `rate`", run.stages,
         ("{", "[]", '{"train": []}', '{"train": {"seconds": "1", "rate": ""}}')),
        ("metrics.jsonl", "line 1: loss", run.read_metrics, ('{"step": 1, "loss": null}',)),
        ("metrics.jsonl", "line 1: .* 'step'", lambda: run.truncate_metrics(1), ('{"loss": 1}',)),
        ("features.json", "not readable by this version", run.recorded_features,
         ("{", "[]", "7", "{}", '{"sources": [1]}', '{"sources": {"main": {}}}')),
    ):  # fmt: skip
        for text in texts:
            (run.folder / name).write_text(text)
            with pytest.raises(EpalmError, match=f"{name}.*{said}"):
                read()


def test_prompts_too_long_or_empty(prepare: Callable[..., Parts], toy_recipe: Recipe) -> None:
    codec = prepare().codec
    with pytest.raises(EpalmError, match="shorten it or raise text.max_prompt_tokens"):
        codec.prompt("word " * 400)
    tokenizer = codec.tokenizer
    tokenizer.backend_tokenizer.post_processor = None
    bare = TextCodec(tokenizer, toy_recipe.text.model_copy(update={"template": "{prompt}"}))
    with pytest.raises(EpalmError, match="add a word to it"):
        bare.prompt("")
