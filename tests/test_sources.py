"""Several modalities in one LM: a connection for each, batches of all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

from epalm.config import AdapterConfig, VariantConfig, load_recipe
from epalm.data.sources import load_sources
from epalm.errors import EpalmError
from epalm.extract.placement import FREE_SHARE
from epalm.extract.sources import open_sources
from epalm.model.augmented import AugmentedLM
from epalm.train.answer_start import start_from_answers
from epalm.train.loss import example_losses
from epalm.train.parts import assemble
from tests.conftest import batches_of, tiny_opt
from tests.test_audio import TINY, audio_file, randomise, tone

Cli = Callable[..., Result]
Recipes = Callable[..., Path]
ADAPTERS = AdapterConfig(reduction=8)
VARIANTS = {
    "epalm": VariantConfig(encoder_layers=3, prompt_length=4),
    "lin": VariantConfig(encoder_layers=3, prompt_length=0, connection="shared"),
    "deep": VariantConfig(encoder_layers=3, prompt_length=0, deep_prompt=2),
    "ada": VariantConfig(encoder_layers=3, prompt_length=0, attention_adapters=ADAPTERS),
    "reference": VariantConfig(encoder_layers=3, prompt_length=4, mask="reference"),
}
DIMS = {"audio": 10, "main": 24}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> AugmentedLM:
    torch.manual_seed(0)
    return AugmentedLM.from_config(tiny_opt(), VARIANTS[request.param], 4, DIMS).double()


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two sounds, three images, five texts."""
    torch.manual_seed(1)
    mask = torch.tensor([[0] * (6 - k) + [1] * k for k in (4, 6, 3, 6, 5)])
    return {
        "input_ids": torch.where(mask.bool(), torch.randint(3, 384, mask.shape), 1),
        "attention_mask": mask,
        "features": {"audio": torch.randn(2, 3, 10), "main": torch.randn(3, 3, 24)},
        "rows": torch.tensor([0, 1, 2, 4, 3]),
    }


def of_source(batch: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a batch that is about one source."""
    chosen = torch.tensor([0, 1] if name == "audio" else [2, 3, 4])
    tensors = {key: batch[key][chosen] for key in ("input_ids", "attention_mask", "rows")}
    tensors["rows"] = tensors["rows"] - (0 if name == "audio" else 2)
    return tensors | {"features": {name: batch["features"][name]}}


def loss_of(model: AugmentedLM, batch: dict[str, Any]) -> torch.Tensor:
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100).roll(-1, 1)
    labels[:, -1] = -100
    return example_losses(model, labels=labels, **batch)[0].sum()


def test_a_mixed_batch_is_the_sum_of_its_sources(model: AugmentedLM, batch: dict[str, Any]) -> None:
    whole = loss_of(model, batch)
    parts = [loss_of(model, of_source(batch, name)) for name in DIMS]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-9, atol=0)
    parameters = list(model.trained.parameters())
    wanted = torch.autograd.grad(whole, parameters, materialize_grads=True)
    grads = [torch.autograd.grad(p, parameters, materialize_grads=True) for p in parts]
    for one, first, second in zip(wanted, *grads, strict=True):
        torch.testing.assert_close(one, first + second, rtol=1e-7, atol=1e-9)
    assert all(bool(grad.any()) for grad in wanted)


@pytest.mark.parametrize("model", ["epalm", "reference"], indirect=True)
def test_generation_of_a_mixed_batch(model: AugmentedLM, batch: dict[str, Any]) -> None:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    whole = model.generate(**batch, **options)
    parts = [model.generate(**of_source(batch, name), **options) for name in DIMS]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, model.generate(**batch, **options, use_cache=False))


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AST."""
    folder = tmp_path_factory.mktemp("ast")
    model = ASTModel(ASTConfig(**TINY | {"num_hidden_layers": 4}))
    randomise(model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(max_length=56, num_mel_bins=32, mean=-5.0, std=3.0).save_pretrained(folder)
    return folder


@pytest.fixture
def both(toy: Callable[..., Path], tmp_path: Path, ast_folder: Path) -> Recipes:
    """A recipe about images and sounds; both have media and examples of the same ids."""
    lines = []
    for number in range(12):
        file = tmp_path / "sounds" / "images" / f"{number}.png"  # libsndfile asks for no name
        file.parent.mkdir(parents=True, exist_ok=True)
        hertz = 300 + 100 * number
        file.write_bytes(audio_file(tone(16000, hertz=hertz), 16000, "PCM_16"))
        split = "train" if number < 8 else "val" if number < 10 else "test"
        lines += [
            {"id": len(lines) + i, "media": f"images/{number}.png", "prompt": prompt,
             "answers": [answer], "split": split}
            for i, (prompt, answer) in enumerate(
                [("is it high?", "yes" if hertz > 900 else "no"), ("what is it?", "a tone")]
            )
        ]  # fmt: skip
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(audio: dict[str, Any] | None = None, **sections: Any) -> Path:
        data = {"kind": "jsonl", "path": str(tmp_path / "sounds.jsonl"),
                "media_root": str(tmp_path / "sounds")}  # fmt: skip
        encoder = {"kind": "ast", "weights": str(ast_folder), "workers": 1} | (audio or {})
        sections["encoder"] = {"workers": 1}
        sections["also"] = {"audio": {"data": data, "encoder": encoder}}
        return toy(**sections)

    return write


def test_images_and_sounds_from_files_to_answers(cli: Cli, both: Recipes, tmp_path: Path) -> None:
    recipe = both()
    done = cli("run", recipe)
    assert done.exit_code == 0, done.output
    assert "source audio:" in done.output
    run = tmp_path / "runs" / "toy"
    weights = load_file(run / "checkpoints" / "best.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes["trained.connection.of.main.linears.2.weight"] == (48, 24)
    assert shapes["trained.connection.of.audio.linears.2.weight"] == (48, TINY["hidden_size"])
    assert json.loads((run / "features.json").read_text())["sources"].keys() == {"audio", "main"}

    scores = json.loads((run / "scores.json").read_text())
    assert scores["metrics"].keys() == {"audio: exact_match", "main: exact_match"}
    assert scores["metrics"]["audio: exact_match"]["n"] == 4
    assert scores["examples"] == sum(m["n"] for m in scores["metrics"].values())
    assert scores["accuracy_by_type"].keys() == {"audio", "main what", "main yes/no"}
    assert scores["majority_answer"].keys() == {"audio", "main"}
    rows = [json.loads(r) for r in (run / "predictions.jsonl").read_text().splitlines()]
    assert {row["media"] for row in rows} == {
        f"{source}/images/{n}.png" for source in ("audio", "main") for n in (10, 11)
    }
    for row in map(json.loads, (run / "predictions-shuffled.jsonl").read_text().splitlines()):
        assert row["id"].split("/")[0] == row["media"].split("/")[0]
    table = cli("show", run).output
    assert "main: exact_match" in table and "audio: exact_match" in table

    exported = tmp_path / "exported"
    assert cli("export", run, exported).exit_code == 0
    for row, folder in ((rows[0], run), (rows[0], exported), (rows[-1], exported)):
        source, own = row["media"].split("/", 1)
        flag, root = ("--image", tmp_path) if source == "main" else ("--audio", tmp_path / "sounds")
        asked = cli("predict", folder, flag, root / own, "--ask", row["prompt"])
        assert asked.stdout.strip() == row["prediction"], asked.output
    refusals = {
        ("predict", run, "--video", recipe, "--ask", "?"): "no source of video, only of audio",
        ("predict", exported, "--video", recipe, "--ask", "?"): "no source of video, only of",
        ("predict", run, "--ask", "?"): "give one file",
    }
    for words, message in refusals.items():
        refused = cli(*words)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output

    assert cli("train", recipe, "--set", "name=cut", "--max-steps", 3).exit_code == 0
    assert cli("train", recipe, "--set", "name=cut").exit_code == 0
    resumed = load_file(tmp_path / "runs" / "cut" / "checkpoints" / "last.safetensors")
    for name, value in load_file(run / "checkpoints" / "last.safetensors").items():
        assert torch.equal(resumed[name], value), name


def test_the_answer_start_is_each_sources_own(cli: Cli, both: Recipes) -> None:
    path = both(audio={"views": {"count": 2}})
    assert cli("extract", path).exit_code == 0
    parts = assemble(load_recipe(path))
    examples = parts.dataset.split("train")
    start_from_answers(parts, examples)
    together = {k: v.clone() for k, v in parts.model.trained["connection"].state_dict().items()}
    with pytest.raises(
        EpalmError, match="but yes, no and empty ones in source main; set it to random"
    ):
        start_from_answers(parts, [e for e in examples if e.source == "audio"])
    sounds = {f"of.audio.linears.{n}.{kind}" for n in range(3) for kind in ("weight", "bias")}
    for name, value in parts.model.trained["connection"].state_dict().items():
        assert torch.equal(together[name], value) and name.split(".")[1] in DIMS, name
    # all sounds are answered alike: no feature matters, and the bias is that answer
    assert all(not together[n].any() for n in sounds if n.endswith("weight"))
    assert all(together[n].any() for n in together.keys() - sounds)


def test_batches_mix_sources_and_keep_their_media_apart(
    cli: Cli, both: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = both(audio={"views": {"count": 2}}, train={"batch_size": 16})
    assert cli("extract", path).exit_code == 0
    parts = assemble(load_recipe(path))
    batches = batches_of(parts)
    mixed = 0
    for step in range(4):
        batch, chosen = batches[step], batches.chosen(step)
        shown = batch.features["audio"], batch.features["main"]
        assert [len(f) for f in shown] == [
            len({e.media for e, _ in chosen if e.source == name}) for name in DIMS
        ]
        mixed += all(len(f) for f in shown)
        for row, (example, _) in zip(batch.rows.tolist(), chosen, strict=True):
            view = batches._views(step // batches._steps_per_epoch, [example.media])
            assert view[0] in ((1, 2) if example.source == "audio" else (0,))
            own = parts.features.fetch([example.media], view)[example.source][0]
            place = row if example.source == "audio" else row - len(shown[0])
            assert torch.equal(batch.features[example.source][place], own)
    assert mixed

    # in memory that holds either, but not both, is the smaller
    features, _ = open_sources(parts.recipe)
    size = {name: table.size() for name, table in features.tables.items()}
    assert size["audio"] > size["main"] > 0
    free = SimpleNamespace(available=size["audio"] / FREE_SHARE)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    features.place("auto", torch.device("cpu"))
    placed = {name for name, table in features.tables.items() if table._placed is not None}
    assert placed == {"main"}


def test_mistakes(cli: Cli, both: Recipes, tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match="also.audio.encoder.layer: unknown key; did you mean"):
        load_recipe(both(audio={"layer": [1]}))
    with pytest.raises(EpalmError, match="main is the recipe's own"):
        load_recipe(both(), ("also.main={data: {kind: csv, path: x}, encoder: {weights: x}}",))
    with pytest.raises(EpalmError, match="^source audio: data.path: .*gone: no such"):
        load_sources(load_recipe(both(), ("also.audio.data.path=gone",)))
    for audio, message in (
        ({"layers": [2, 3]}, "source audio: variant.encoder_layers: 3 wanted, the encoder has 2"),
        ({"tokens": "all", "layers": [1, 2, 3]}, "all sources must keep as many"),
    ):
        path = both(audio=audio)
        assert cli("extract", path).exit_code == 0
        refused = cli("train", path)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    taken = {"train": 10, "main": 24}
    with pytest.raises(EpalmError, match="also.train: this name is taken"):
        AugmentedLM.from_config(tiny_opt(), VARIANTS["lin"], 4, taken)
