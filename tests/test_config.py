"""Recipes: validation, overrides, extension, and every recipe we ship."""

from pathlib import Path

import pytest
import yaml

from epalm.config import Recipe, dump_recipe, load_recipe
from epalm.errors import EpalmError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "sweeps")
DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).name
    head = path.read_text().split("\n", 1)[0]
    assert head.startswith("# "), "a recipe's head says what it is"


def test_resolved_recipe_loads_back(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, ("train.lr=1e-3",))
    assert recipe.train.lr == 0.001
    written = tmp_path / "recipe.yaml"
    written.write_text(dump_recipe(recipe))
    assert load_recipe(written) == recipe


def test_every_field_is_documented_or_plain() -> None:
    """A field without description is one whose name says it all: short, and listed here."""
    plain = {
        "train", "val", "test", "limits", "arch", "batch_size", "layers", "prompt_schedule",
        "weight_decay", "betas", "num_beams", "max_new_tokens", "split", "steps",
        "data", "text", "encoder", "store", "lm", "variant", "decode", "evaluate",
    }  # fmt: skip
    sections = [Recipe, *(f.annotation for f in Recipe.model_fields.values())]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description or name in plain, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["train.lrr", "did you mean lr?"]),
        ("trian.lr=1", ["trian", "did you mean train?"]),
        ("train.lr=-1", ["train.lr", "greater than 0"]),
        ("train.lr=.nan", ["train.lr", "finite"]),
        ("train.steps=ten", ["train.steps", "'ten'"]),
        ("variant.connection=both", ["variant.connection", "'separate' or 'shared'"]),
        ("text.template=hello", ["text", "{prompt}"]),
        ("text.template='{prompt} {x}'", ["text", "no other braces"]),
        ("name=a/b", ["name", "letters, digits", "'a/b'"]),
        ("name=..", ["name: a folder"]),
        ("name=2024", ["name", "put it in quotes (given: 2024)"]),
        ("batch_size=8", ["batch_size", "encoder.batch_size or train.batch_size or decode."]),
        ("train.prompt_length=8", ["did you mean variant.prompt_length?"]),
        ("train=8", ["train: is a section"]),
        ("train.betas=[0.9, 1.0]", ["train.betas", "less than 1"]),
        (
            "train={steps: 9, schedule: official, epochs: 3, warmup: 0.2}",
            ["train", "warmup is of the cosine schedule"],
        ),
        (
            "variant.feed_forward_adapters={placement: parallel}",
            ["placement is of adapters, and reduction 0 has none"],
        ),
        ("variant.attention_adapters.start=3", ["start is of adapters"]),
        (
            "decode.temperature=2",
            ["decode: temperature is for random draws; set do_sample to true"],
        ),
        ("decode.seed=2", ["decode: seed is for random draws; set do_sample to true"]),
        ("decode.length_penalty=2", ["decode: length_penalty compares beams; set num_beams to 2"]),
        ("encoder.views.frequency_mask=3", ["frequency_mask is of augmented views, and count 0"]),
        ("encoder.views={crop_scale: [0.9, 1.0]}", ["encoder.views: crop_scale is of augmented"]),
        ("encoder.decode_timeout=3e6", ["encoder.decode_timeout", "less than or equal to 86400"]),
        ("train.patience=yes", ["train: patience is no switch; it cannot be true"]),
        ("train.lm_lr=1", ["train.lm_lr: leave it out, or set variant.train_lm to true"]),
        ("train.encoder_lr=1", ["train.encoder_lr: leave it out, or set encoder.train to true"]),
        ("evaluate.metrics=cider", ["evaluate.metrics: must be a list", "'cider'"]),
        ("text.template=Question: {prompt} Answer:", ["text.template", "put text in quotes"]),
        ("train..lr=1", ["--set train..lr=1", "section.key=value"]),
        ("train", ["--set train", "section.key=value"]),
        ("name.first=1", ["name.first=1", "has no keys"]),
    ],
)
def test_bad_overrides(override: str, words: list[str]) -> None:
    with pytest.raises(EpalmError) as error:
        load_recipe(DEMO, (override,))
    for word in words:
        assert word in str(error.value)


def test_what_must_hold_between_fields_is_said_without_the_recipe() -> None:
    spread = ("lm.device_map=auto", "variant.attention_adapters={reduction: 8}")
    with pytest.raises(EpalmError) as error:
        load_recipe(DEMO, spread)
    assert str(error.value).splitlines()[1:] == [
        "  lm.device_map: an LM with adapters cannot be spread over devices"
    ]


def test_spaces_around_an_override() -> None:
    assert load_recipe(DEMO, (" train.lr = 0.5",)).train.lr == 0.5


def test_extends_merges_sections(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    child = tmp_path / "child.yaml"
    child.write_text(
        yaml.safe_dump({"extends": "base.yaml", "name": "child", "train": {"lr": 0.5}})
    )
    recipe, base = load_recipe(child), load_recipe(DEMO)
    assert (recipe.name, recipe.train.lr) == ("child", 0.5)
    assert recipe.train.steps == base.train.steps
    assert recipe.encoder == base.encoder


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"- a list", "mapping"),
        (b"name: [\n", "self.yaml, line 2: not valid YAML"),
        (b"extends: self.yaml", r"extends itself \(.*self.yaml extends .*self.yaml\)"),
        (b"extends: gone.yaml", "gone.yaml: cannot read the recipe, which .*self.yaml extends: No"),
        (b"extends: [a.yaml]", "extends: must be the name of one recipe"),
        (b"name: x", "data: missing; add it"),
        (b"train: {lr: 1}\nseed: 1\ntrain: {steps: 5}", "line 3: .*: the key train stands twice"),
        (b"name: caf\xe9", "not UTF-8"),
        (b"name: x\nbase: demo.yaml", "a sweep, not a recipe"),
        (b"name: " + b"[" * 100_000, "self.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_bad_files(tmp_path: Path, text: bytes, word: str) -> None:
    path = tmp_path / "self.yaml"
    path.write_bytes(text)
    with pytest.raises(EpalmError, match=word):
        load_recipe(path)
