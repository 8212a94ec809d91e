"""Trained models as folders: saved, exported, moved, loaded, and refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import PreTrainedModel

from epalm.config import (
    AdapterConfig,
    DecodeConfig,
    EncoderConfig,
    LMConfig,
    TextConfig,
    VariantConfig,
)
from epalm.errors import EpalmError
from epalm.evaluate.predict import Predictor
from epalm.model.augmented import AugmentedLM
from epalm.model.load import lm_digest, load_lm, load_tokenizer
from epalm.model.pretrained import CONFIG, WEIGHTS, AugmentedConfig
from epalm.model.text import TextCodec
from epalm.train.run import Run
from tests.conftest import tiny_opt
from tests.test_cli import refused

CPU = torch.device("cpu")
VARIANTS = {
    "epalm": VariantConfig(encoder_layers=3, prompt_length=4),
    "ada": VariantConfig(
        encoder_layers=3,
        connection="shared",
        prompt_length=0,
        attention_adapters=AdapterConfig(reduction=8, layer_norm=True),
        feed_forward_adapters=AdapterConfig(reduction=4, placement="scaled"),
    ),
    "deep": VariantConfig(encoder_layers=2, prompt_length=0, deep_prompt=3, token_norm="lm"),
    "train_lm": VariantConfig(encoder_layers=2, prompt_length=2, train_lm=True),
}


def built(lm_folder: Path, variant: VariantConfig, dtype: str = "float32") -> AugmentedLM:
    """As a recipe makes it, with features of four layers, 24 wide."""
    text = TextConfig(template="Q: {prompt} A:", special_tokens=("</a>",))
    config = LMConfig(weights=str(lm_folder), dtype=dtype)
    lm = load_lm(config, CPU, variant.train_lm)
    torch.manual_seed(0)
    model = AugmentedLM.from_config(lm, variant, encoder_layers=4, encoder_dim=24)
    model.origin = AugmentedConfig(
        lm=config,
        encoder=EncoderConfig(weights="timm:some_vit"),
        features={"layers": 4, "dim": 24},
        fingerprint="0123456789abcdef",
        variant=variant,
        text=text,
        decode=DecodeConfig(num_beams=2),
    )
    model.codec = TextCodec(load_tokenizer(str(lm_folder), text, 384), text)
    return model


@torch.no_grad()
def states(model: AugmentedLM) -> torch.Tensor:
    assert model.codec is not None
    ids = torch.tensor([model.codec.prompt("what color is the shape?")])
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(1, model.trained["connection"].levels, 24, generator=generator)
    return model.states(ids, torch.ones_like(ids), features)


@pytest.fixture
def lm_folder(opt_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small OPT that a test may change."""
    return Path(shutil.copytree(opt_folder, tmp_path / "lm"))


@pytest.fixture
def saved(lm_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    built(lm_folder, VARIANTS["epalm"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in VARIANTS), ("epalm", "bfloat16"), ("epalm", "auto")],
)
def test_loaded_is_what_was_saved(name: str, dtype: str, opt_folder: Path, tmp_path: Path) -> None:
    """Bit for bit, on an LM loaded anew and on one that is given."""
    model = built(opt_folder, VARIANTS[name], dtype)
    for parameter in model.trained.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "saved")
    anew = AugmentedLM.from_pretrained(tmp_path / "saved", device="cpu")
    on_given = AugmentedLM.from_pretrained(tmp_path / "saved", lm=load_lm(model.origin.lm, CPU))
    for loaded in (anew, on_given):
        assert torch.equal(states(loaded), states(model))
        assert loaded.origin.decode == model.origin.decode
        assert loaded.codec.config == model.codec.config
        assert loaded.codec.prompt("</a>red") == model.codec.prompt("</a>red")
        assert not any(module.training for module in loaded.lm.modules())


def test_the_frozen_lm_is_not_saved(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    assert {name.split(".")[1] for name in weights} == {"connection", "soft_prompt"}
    assert not list(saved.glob("model*"))
    config = json.loads((saved / CONFIG).read_text())
    assert config["lm_identity"].keys() == {"model_type", "layers", "width", "digest"}
    assert config["features"]["dim"] == 24 and config["fingerprint"] == "0123456789abcdef"
    assert config["text"]["template"] == "Q: {prompt} A:"


def test_the_digest_is_of_the_weights_that_are_loaded(saved: Path, tmp_path: Path) -> None:
    """A hub's snapshot may hold them in an older format too."""
    before = lm_digest(str(tmp_path / "lm"))
    (tmp_path / "lm" / "pytorch_model.bin").write_bytes(b"an older format")
    assert lm_digest(str(tmp_path / "lm")) == before
    AugmentedLM.from_pretrained(saved)
    (tmp_path / "lm" / "model.safetensors").unlink()
    assert lm_digest(str(tmp_path / "lm")) != before


def test_on_one_device_though_it_was_spread(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved / CONFIG
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lm": {**config["lm"], "device_map": "auto"}}))
    asked = []

    def watched(config: LMConfig, *others: Any) -> PreTrainedModel:
        asked.append(config.device_map)  # one device alone leaves no other trace
        return load_lm(config, *others)

    monkeypatch.setattr("epalm.model.pretrained.load_lm", watched)
    for device in ("auto", "cpu"):
        AugmentedLM.from_pretrained(saved, device=device)
    assert asked == ["auto", None]


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    AugmentedLM.from_pretrained(saved, device="cpu").save_pretrained(tmp_path / "again")
    for file in saved.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_relative_lm_moves_with_the_folder(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in one working directory, used after a move and from another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = built(Path("../lm"), VARIANTS["epalm"])
    model.save_pretrained("out/saved")
    assert json.loads((Path("out/saved") / CONFIG).read_text())["lm"]["weights"] == "../../../lm"
    (tmp_path / "there").mkdir()
    for name in ("here", "lm"):
        (tmp_path / name).rename(tmp_path / "there" / name)
    monkeypatch.chdir(tmp_path)
    loaded = AugmentedLM.from_pretrained("there/here/out/saved", device="cpu")
    assert torch.equal(states(loaded), states(model))


def test_an_absent_lm_is_named_and_another_address_helps(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "lm").rename(tmp_path / "elsewhere")
    with pytest.raises(EpalmError, match="lm: no such file or folder"):
        AugmentedLM.from_pretrained(saved, device="cpu")
    loaded = AugmentedLM.from_pretrained(saved, str(tmp_path / "elsewhere"), "cpu")
    assert loaded.origin.lm.weights == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 8}, "opt with 6 layers of width 48; this one is opt with 8 layers"),
        ({"hidden_size": 32, "word_embed_proj_dim": 32}, "opt with 6 layers of width 32"),
        ({"bos_token_id": 3}, None),  # the same shape, another file
    ],
)
def test_another_lm_is_refused(
    changes: dict[str, Any], words: str | None, saved: Path, tmp_path: Path
) -> None:
    other = tiny_opt(**changes)
    shutil.copytree(tmp_path / "lm", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(EpalmError, match=words or "files have the digest .* Give the LM it was"):
        AugmentedLM.from_pretrained(saved, str(tmp_path / "other"), "cpu")
    if words is None:
        AugmentedLM.from_pretrained(saved, other)  # whoever loads it must know
    else:
        with pytest.raises(EpalmError, match=words):
            AugmentedLM.from_pretrained(saved, other)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / CONFIG).read_text())
        change(tree)
        (folder / CONFIG).write_text(json.dumps(tree))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / CONFIG).unlink(), rf"{CONFIG}: no such file; give a folder made"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not a config of a trained model"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "not a config of a trained model"),
        (rewrite(lambda tree: tree.update(format_version=2)), "format version 2, .* up to 1"),
        (rewrite(lambda tree: tree.update(extra=1)), r"not valid\n  extra: Extra inputs"),
        (rewrite(lambda tree: tree["text"].update(templat="")), r"\n  text.templat: Extra inputs"),
        (rewrite(lambda tree: tree.pop("variant")), r"\n  variant: Field required"),
        (rewrite(lambda tree: tree["features"].pop("dim")), r"\n  features: .*dim"),
        (rewrite(lambda tree: tree["variant"].update(prompt_length=5)),
         r"size mismatch for soft_prompt"),
        (rewrite(lambda tree: tree["variant"].update(prompt_mlp=False)),
         r"soft_prompt.mlp.0.bias has no place"),
        (rewrite(lambda tree: tree["features"].update(dim=25)), "size mismatch for connection"),
        (lambda folder: (folder / WEIGHTS).unlink(), rf"{WEIGHTS}: not readable"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"cut"), rf"{WEIGHTS}: not readable"),
        (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], "cannot be loaded"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused(
    damage: Callable[[Path], object], words: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(EpalmError, match=words):
        AugmentedLM.from_pretrained(saved, device="cpu")


def test_a_model_made_by_hand_says_what_it_lacks(opt_folder: Path, tmp_path: Path) -> None:
    model = AugmentedLM.from_config(tiny_opt(), VARIANTS["epalm"], 4, 24)
    with pytest.raises(EpalmError, match="not made from a recipe; set model.origin"):
        model.save_pretrained(tmp_path / "saved")


ANSWERS = """
import json, sys
from epalm.evaluate.predict import Predictor

predictor = Predictor.from_pretrained(sys.argv[1], device="cpu")
features = predictor.encode(sys.argv[3:])
questions = json.loads(sys.argv[2])
print(json.dumps(predictor.ask(features, *questions)))
"""


def test_an_exported_run_answers_alike_in_another_process(
    cli: Callable[..., Result], toy: Callable[..., Path], tmp_path: Path
) -> None:
    """The best checkpoint, by Python from another directory, and by command."""
    recipe = toy(train={"steps": 2}, decode={"max_new_tokens": 8})
    for command in ("extract", "train"):
        assert cli(command, recipe).exit_code == 0
    run, out = Run.open(tmp_path / "runs" / "toy"), tmp_path / "out"
    done = cli("export", run.folder, out)
    assert done.exit_code == 0, done.output
    media = [str(tmp_path / "images" / f"{number}.png") for number in (8, 9)]
    prompts, rows = ["what color is the shape?", "what shape is it?", "is it red?"] * 2, [0, 1] * 3
    predictor = Predictor.from_run(run, run.best)
    expected = predictor.ask(predictor.encode(media), prompts, rows)
    assert len(set(expected)) > 1
    asked = subprocess.run(
        [sys.executable, "-c", ANSWERS, out, json.dumps([prompts, rows]), *media],
        capture_output=True, text=True, cwd=tmp_path / "images",
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout.splitlines()[-1]) == expected
    asks = [word for prompt in prompts[::2] for word in ("--ask", prompt)]
    assert cli("predict", out, "--image", media[0], *asks).stdout.split("\n")[:-1] == expected[::2]


def test_an_exported_model_is_asked_otherwise_than_it_was_trained(
    cli: Callable[..., Result],
    toy: Callable[..., Path],
    tmp_path: Path,
    vit_folder: Path,
    lm_folder: Path,
) -> None:
    """Where LM and encoder are, how answers are made and on which device."""
    recipe = toy(train={"steps": 1}, decode={"max_new_tokens": 8})
    out, there = tmp_path / "out", tmp_path / "there"
    for command in (("extract", recipe), ("train", recipe), ("export", tmp_path / "runs/toy", out)):
        assert cli(*command).exit_code == 0
    image = tmp_path / "images" / "8.png"
    ask = ("predict", out, "--image", image, "--ask", "what color is the shape?")
    usual = cli(*ask).stdout
    shutil.copytree(lm_folder, there / "lm")
    shutil.copytree(vit_folder, there / "vit")
    lost = rewrite(
        lambda tree: (tree["lm"].update(weights="no-lm"), tree["encoder"].update(weights="no-vit"))
    )
    lost(out)
    refused(cli(*ask), "no-vit")
    found = ("--set", f"encoder.weights={there / 'vit'}", "--set", "device=cpu")
    refused(cli(*ask, *found), "no-lm")
    found = (*found, "--set", f"lm.weights={there / 'lm'}")
    answer = cli(*ask, *found)
    assert answer.exit_code == 0 and answer.stdout == usual, answer.output
    short = cli(*ask, *found, "--set", "decode.max_new_tokens=1").stdout
    assert len(short) < len(usual) and usual.startswith(short.rstrip())


def test_the_documented_example_runs(
    cli: Callable[..., Result],
    toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = toy(train={"steps": 1})
    folders = tmp_path / "runs" / "toy", tmp_path / "exported" / "demo"
    for command in (("extract", recipe), ("train", recipe), ("export", *folders)):
        assert cli(*command).exit_code == 0
    (tmp_path / "images" / "1.png").rename(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[1] / "docs" / "python-api.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    scope: dict[str, Any] = {"torch": torch}
    exec(first, scope)
    assert [line.split("?")[0] for line in capsys.readouterr().out.splitlines()] == [
        "what shape is in the image", "what color is the shape",
    ]  # fmt: skip
    exec(second, scope)
    assert len(scope["answers"]) == 3


def test_export_and_predict_refuse_what_they_cannot_do(
    cli: Callable[..., Result], toy: Callable[..., Path], tmp_path: Path, vit_folder: Path
) -> None:
    recipe = toy(train={"steps": 1})
    for command in ("extract", "train"):
        assert cli(command, recipe).exit_code == 0
    run, out = tmp_path / "runs" / "toy", tmp_path / "out"
    refused(cli("export", run, tmp_path / "images"), "not empty and not an exported model")
    refused(cli("export", tmp_path, out), "not a run folder")
    assert cli("export", run, out, "--checkpoint", "last").exit_code == 0
    assert cli("export", run, out).exit_code == 0  # again, over it
    ask = ("--image", tmp_path / "images" / "1.png", "--ask", "what?")
    refused(cli("predict", out, *ask, "--set", "seed=1"), "seed: 0 there", "what may be set: ")
    refused(cli("predict", out, *ask, "--set", "device=abacus"), "device: 'abacus' cannot be used")
    refused(cli("predict", out, *ask, "--checkpoint", "last"), "takes no --checkpoint")
    rewrite(lambda tree: tree["features"].update(weights="0" * 64))(out)
    refused(cli("predict", out, *ask), "trained on other features", "weights: '000000")
    (run / "features.json").unlink()
    refused(cli("export", run, out), "holds no features.json")
    with pytest.raises(EpalmError, match="no such file or folder"):
        Predictor.from_pretrained(tmp_path / "gone")
