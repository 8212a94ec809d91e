"""Training without a cache: the encoder in the loop, frozen or trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    TimesformerConfig,
    TimesformerModel,
)

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.errors import EpalmError
from epalm.evaluate import generation
from epalm.evaluate.generation import generate_answers
from epalm.evaluate.predict import Predictor
from epalm.evaluate.scores import validate
from epalm.extract.loop import extract
from epalm.model.augmented import AugmentedLM
from epalm.store.atomic import read_json_lines
from epalm.train.batches import Batch, TrainingBatches
from epalm.train.checkpoint import load_weights
from epalm.train.loss import example_losses
from epalm.train.online import OnlineFeatures
from epalm.train.parts import Parts, assemble
from epalm.train.run import Run
from epalm.train.step import PieceLoss
from tests.conftest import batches_of, fit
from tests.test_audio import TINY as TINY_AST
from tests.test_audio import audio_file, tone
from tests.test_video import write_video

Toy = Callable[..., Path]
Cli = Callable[..., Result]

# float32 features of magnitude 3, in batches of other sizes; 1e-6 found
NOISE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def online(toy: Toy) -> Callable[..., Parts]:
    """Assembles an online toy recipe, with one decoding process."""

    def build(*overrides: str, trained: bool = False, **sections: Any) -> Parts:
        encoder = {"online": True, "train": trained, "workers": 1} | sections.pop("encoder", {})
        return assemble(load_recipe(toy(encoder=encoder, **sections), overrides))

    return build


def table_of(parts: Parts) -> OnlineFeatures:
    assert isinstance(parts.features, OnlineFeatures)
    return parts.features


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def killed_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Interrupt a training where it asks for the batch of this step."""
    real = TrainingBatches.piece

    def piece(self: TrainingBatches, step: int, index: int, count: int) -> Batch:
        if step == last:
            raise KeyboardInterrupt
        return real(self, step, index, count)

    monkeypatch.setattr(TrainingBatches, "piece", piece)


def test_a_frozen_encoder_gives_the_cached_features_and_losses(toy: Toy, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "root": str(tmp_path / "features")}
    views = {"views": {"count": 2}}
    found, runs = [], []
    for online in (False, True):
        recipe = load_recipe(
            toy(name=f"online-{online}", store=settings, encoder=views | {"online": online}),
            ("train.accumulate=2", "train.val_every=2"),
        )
        if not online:
            extract(recipe, load_dataset(recipe))
        parts = assemble(recipe)
        media = sorted({e.media for e in parts.dataset.split("train")})
        found.append([parts.features.fetch(media, [view] * len(media)) for view in range(3)])
        run = Run.create(recipe)
        fit(run, parts, validate)
        runs.append(run)
    for cached, fresh in zip(*found, strict=True):
        torch.testing.assert_close(fresh, cached, **NOISE)
    assert not torch.allclose(found[1][0], found[1][1], **NOISE)  # views differ
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    line = runs[1].read_metrics()[0]
    assert 0 < line["encode_share"] < 1
    assert "encode_share" not in runs[0].read_metrics()[0]


def plain_loss(encoder: nn.Module, model: AugmentedLM, batch: Batch, inputs: torch.Tensor) -> Any:
    """The batch's loss as it is usually written: blocks by hooks, one media per text."""
    states: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, x: states.append(x)) for b in encoder.blocks]
    encoder(inputs[batch.rows])
    for hook in hooks:
        hook.remove()
    features = torch.stack([encoder.norm(states[layer])[:, 0] for layer in (1, 2, 3)], dim=1)
    sums, _ = example_losses(model, batch.input_ids, batch.attention_mask, batch.labels, features)
    return sums.sum()


def test_gradients_are_those_of_plain_autograd(online: Callable[..., Parts]) -> None:
    parts = online(
        trained=True,
        variant={"levels": {3: 1, 4: 2, 5: 3}, "encoder_layers": 3, "prompt_length": 3},
    )
    model, table, batch = parts.model, table_of(parts), batches_of(parts)[0]
    assert isinstance(batch.features, torch.Tensor) and batch.features.shape[1:] == (3, 32, 32)
    twin = copy.deepcopy(model)
    loss = PieceLoss(model, table)(batch)
    loss.backward()
    expected = plain_loss(twin.trained["encoder"], twin, batch, batch.features)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    plain = dict(twin.trained.named_parameters())
    reached = set()
    for name, parameter in model.trained.named_parameters():
        grad, other = parameter.grad, plain[name].grad
        if grad is None or other is None:
            assert grad is None and (other is None or not other.any()), name
        else:
            torch.testing.assert_close(grad, other, atol=1e-4, rtol=1e-3, msg=name)
            reached.add(name)
    blocks = {n.split(".")[2] for n in reached if n.startswith("encoder.blocks.")}
    assert blocks == {"0", "1", "2", "3"}  # none above the last that is used
    assert "encoder.patch_embed.proj.weight" in reached and "encoder.norm.weight" in reached


def test_weights_stay_float32_where_the_arithmetic_is_not(online: Callable[..., Parts]) -> None:
    parts = online(trained=True, encoder={"dtype": "bfloat16"})
    batch = batches_of(parts)[0]
    PieceLoss(parts.model, table_of(parts))(batch).backward()
    encoder = parts.model.trained["encoder"]
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert {p.dtype for p in encoder.parameters()} == {g.dtype for g in grads} == {torch.float32}
    weight = encoder.blocks[5].mlp.fc2.weight
    assert weight.grad.any() and torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_a_trained_encoder_is_saved_resumed_and_used(
    online: Callable[..., Parts], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ("train.encoder_lr=0.001", "train.val_every=2")
    whole = online(*rates, f"runs={tmp_path / 'whole'}", trained=True)
    before = copy.deepcopy(table_of(whole).encoder.model.state_dict())
    count = sum(p.numel() for p in whole.model.trained["encoder"].parameters())
    assert count == whole.features.spec.encoder_parameters
    lm = sum(p.numel() for p in whole.model.lm.parameters())
    assert whole.total_parameters == whole.trained_parameters + lm
    fit(Run.create(whole.recipe), whole, validate)
    recipe = tmp_path / "toy.yaml"
    sets = [w for r in (*rates, f"runs={tmp_path / 'cut'}") for w in ("--set", r)]
    killed_at(monkeypatch, 3)
    stopped = cli("train", recipe, *sets)
    assert stopped.exit_code == 130, stopped.output
    assert "no features are cached" in stopped.output and "(forward alone)" in stopped.output
    monkeypatch.undo()
    done = cli("run", recipe, *sets)
    assert done.exit_code == 0, done.output
    assert "extract: nothing to cache, the encoder is trained" in done.output
    runs = [tmp_path / name / "toy" for name in ("whole", "cut")]
    for name in ("last", "best"):
        files = [run / "checkpoints" / f"{name}.safetensors" for run in runs]
        assert files[0].read_bytes() == files[1].read_bytes(), name

    saved = load_file(runs[1] / "checkpoints" / "best.safetensors")
    weight = "blocks.5.attn.qkv.weight"
    changed = saved[f"trained.encoder.{weight}"] - before[weight]
    assert 0 < changed.abs().max() < 0.02  # at its own rate: six steps of 1e-3 at most, not 1e-2
    run = Run.open(runs[1])
    predictor = Predictor.from_run(run, run.weights("best"))
    image = tmp_path / "images" / "10.png"
    seen = predictor.encode([image])
    evaluated = assemble(run.recipe)
    untrained = evaluated.features.fetch(["images/10.png"])
    assert isinstance(untrained, torch.Tensor)
    assert not torch.allclose(seen, untrained, atol=1e-3)
    load_weights(run.weights("best"), evaluated.model)
    shown = evaluated.features.fetch(["images/10.png"])
    torch.testing.assert_close(shown, seen, **NOISE)

    asked = ("--image", image, "--ask", "what color is the shape?")
    answers = [cli("predict", runs[1], *asked)]
    exported = cli("export", runs[1], tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    answers.append(cli("predict", tmp_path / "exported", *asked))
    assert [a.exit_code for a in answers] == [0, 0], answers[1].output
    assert answers[0].output == answers[1].output
    again = Predictor.from_pretrained(tmp_path / "exported", device="cpu")
    assert torch.equal(again.encode([image]), seen)
    with pytest.raises(EpalmError, match=r"load both with Predictor\.from_pretrained"):
        AugmentedLM.from_pretrained(tmp_path / "exported", device="cpu")


def note_calls(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, events: list[str], event: str
) -> None:
    """Add the event whenever the owner's function is called."""
    function = getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        events.append(event)
        return function(*arguments)

    monkeypatch.setattr(owner, name, noted)


def test_each_piece_is_decoded_once_ahead_of_its_step(
    online: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = online("train.accumulate=2", "train.steps=3")
    events: list[str] = []
    note_calls(monkeypatch, table_of(parts)._pool, "submit", events, "decode")
    note_calls(monkeypatch, OnlineFeatures, "encode", events, "encode")
    fit(Run.create(parts.recipe), parts, None)
    assert events == ["decode", *["decode", "encode"] * 5, "encode"]


def test_evaluation_decodes_what_comes_next_while_it_encodes_and_answers(
    online: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = online("train.batch_size=2", "encoder.batch_size=2")  # at most 2 media are decoded
    table, examples = table_of(parts), parts.dataset.examples
    one_by_one = {m: table.fetch([m])[0] for m in parts.dataset.media}
    answer = generation.generate_texts
    events: list[str] = []
    shown: list[torch.Tensor] = []

    def answered(model: Any, codec: Any, prompts: Any, features: torch.Tensor, *rest: Any) -> Any:
        events.append("answer")
        shown.append(features)
        return answer(model, codec, prompts, features, *rest)

    note_calls(monkeypatch, table._pool, "submit", events, "decode")
    note_calls(monkeypatch, OnlineFeatures, "_encode", events, "encode")
    monkeypatch.setattr(generation, "generate_texts", answered)
    per_media = [next(e for e in examples if e.media == m) for m in parts.dataset.media]
    for size, pieces, batches in ((1, 1, 12), (64, 6, 1)):
        events.clear()
        shown.clear()
        decode = parts.recipe.decode.model_copy(update={"batch_size": size})
        answers = generate_answers(parts.model, parts.codec, table, per_media, decode)
        assert len(answers) == 12
        each = [*["decode", "encode"] * (pieces - 1), "decode", "encode", "answer"]
        assert events == ["decode", *(each * batches)[:-3], "encode", "answer"]
        found = {tuple(f.flatten().round(decimals=3).tolist()) for f in torch.cat(shown)}
        assert len(found) == 12
        for features in torch.cat(shown):
            assert any(torch.allclose(features, own, **NOISE) for own in one_by_one.values())


def save_encoder(kind: str, folder: Path) -> None:
    """A small random encoder of sounds or videos."""
    torch.manual_seed(4)
    if kind == "ast":
        ASTModel(ASTConfig(**TINY_AST)).save_pretrained(folder)
        ASTFeatureExtractor(max_length=56, num_mel_bins=32).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = TimesformerConfig(image_size=32, num_frames=2, intermediate_size=48, **sizes)
        TimesformerModel(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["ast", "timesformer"])
def test_sound_and_video_are_encoded_alike(
    online: Callable[..., Parts], tmp_path: Path, kind: str
) -> None:
    made = [audio_file(tone(16000, hertz=h), 16000) if kind == "ast" else write_video(n)
            for h, n in ((440, 8), (880, 12))]  # fmt: skip
    lines = []
    for number, content in enumerate(made):
        (tmp_path / f"{number}").write_bytes(content)
        line = {"media": f"{number}", "prompt": "what?", "answers": ["red"], "split": "train"}
        lines += [json.dumps(line | {"id": 2 * number + i}) for i in range(2)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    save_encoder(kind, tmp_path / kind)
    parts = online(
        trained=True,
        data={"path": str(tmp_path / "some.jsonl")},
        encoder={"kind": kind, "weights": str(tmp_path / kind)},
        train={"batch_size": 4},
    )
    table = table_of(parts)
    encoder, media = table.encoder, ["1", "0"]
    inputs = [encoder.preprocess(made[int(m)], None) for m in media]
    direct = encoder.encode(torch.stack(inputs), range(3))[:, :, 0]
    torch.testing.assert_close(table.fetch(media), direct, **NOISE)
    PieceLoss(parts.model, table)(batches_of(parts)[0]).backward()
    patches = [p for n, p in encoder.model.named_parameters() if n.endswith("projection.weight")]
    assert patches and all(p.grad is not None and p.grad.any() for p in patches)


def test_bad_media_mean_what_they_mean_with_a_cache(
    online: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = online()
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(EpalmError, match=r"2 media cannot be decoded(.|\n)*bad_media=skip"):
        assemble(parts.recipe)
    data = parts.recipe.data.model_copy(update={"bad_media": "skip"})
    kept = assemble(parts.recipe.model_copy(update={"data": data})).dataset
    gone = {"images/1.png", "images/2.png"}
    assert set(parts.dataset.media) - set(kept.media) == gone
    assert not any(e.media in gone for e in kept.examples)
    (ledger,) = (tmp_path / "features").glob("*/decoded.jsonl")
    lines = read_json_lines(ledger)
    assert len({line["hash"] for line in lines}) == len(lines) == 13  # nothing is tried twice
    assert [line["media"] for line in lines if line["reason"]] == ["images/2.png"]
    written = ledger.read_text()
    ledger.write_text(written + '{"hash": "ab", "reason": null}\n{"hash": "c')
    with pytest.raises(EpalmError, match=r"decoded\.jsonl, line \d+: reason cannot be None"):
        assemble(parts.recipe)
    ledger.write_text(written + '{"hash": "c')

    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "3.png")
    with pytest.raises(EpalmError, match=r"images/3\.png: could be decoded when it was checked"):
        parts.features.fetch(["images/3.png"])


def test_what_cannot_be(toy: Toy, cli: Cli) -> None:
    for encoder, words in (
        ({"train": True}, "cannot follow an encoder that is trained; set online to true"),
        ({"train": True, "online": True, "dtype": "float16"}, "too narrow for the gradients"),
    ):
        refused = cli("train", toy(encoder=encoder))
        assert refused.exit_code == 2 and words in refused.output, refused.output


def test_nothing_is_extracted(toy: Toy, cli: Cli, tmp_path: Path) -> None:
    done = cli("extract", toy(encoder={"online": True}))
    assert done.exit_code == 0
    assert "nothing to cache, encoder.online is true" in done.output
    assert not (tmp_path / "features").exists()
