"""Checkpoints of the official code, through the command, against the golden vectors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from epalm.config import load_recipe
from epalm.errors import EpalmError
from epalm.extract.encoder import describe
from epalm.model.augmented import AugmentedLM
from epalm.model.official import read_official
from epalm.train.checkpoint import load_weights
from epalm.train.parts import build_model
from epalm.train.run import Run
from tests.conftest import tiny_opt
from tests.test_cli import refused
from tests.test_golden import FOLDER, LOGIT_TOLERANCE, Case, adapter_config
from tests.test_golden import from_official as named

Cli = Callable[..., Result]
RECIPES = Path(__file__).parents[1] / "recipes" / "official"
CASES = [
    "adapters_pre",
    "epalm_pre",
    "epalm_post",
    "lin_pre",
    "pt_pre",
    "short_pre",
    "single_post",
    "tstep2_pre",
]


@pytest.fixture(scope="module")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Few enough words for the golden LMs' 256 rows."""
    words = ["<s>", "<pad>", "</s>", "</a>", "<unk>", "what", "red", "blue", "?"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    whole = Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def vit48(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with the depth and width of the golden encoders."""
    folder = tmp_path_factory.mktemp("vit48")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(model, folder, model_args=size, safe_serialization=True)
    return folder


class Official:
    """A golden case as its authors would have left it: LM folder, checkpoint, and our recipe."""

    def __init__(self, name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, vit: Path):
        self.case = Case(FOLDER / f"{name}.npz")
        lm = folder / "opt"
        self.case.model.lm.save_pretrained(lm)
        tokenizer.save_pretrained(lm)
        self.file, self.recipe = folder / "checkpoint_best.pth", folder / "recipe.yaml"
        self.entries: dict[str, Any] = {
            "model": self.case.group("ckpt/"),
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": []},
            "lr_scheduler": {"base_values": [2e-5]},
            "config": self.config(),
            "epoch": 7,
            "best_valid": np.float64(53.3),
            "best_epoch": 6,
        }
        torch.save(self.entries, self.file)
        self.tree: dict[str, Any] = {
            "name": name,
            "device": "cpu",
            "runs": str(folder / "runs"),
            "data": {"kind": "jsonl", "path": "none"},
            "text": {"template": "{prompt}?</a>", "answer_prefix": "", "special_tokens": ["</a>"]},
            "encoder": {"weights": str(vit), "preprocess": "reference", "image_size": 32},
            "lm": {"weights": str(lm), "dtype": "float32"},
            "variant": self.variant() | {"mask": "reference"},
            "train": {"steps": 1},
        }
        self.recipe.write_text(yaml.safe_dump(self.tree))

    def config(self) -> dict[str, Any]:
        names = ("start_layer_idx", "end_layer_idx", "injected_hidden_states", "text_step")
        return {name: int(self.case[name]) for name in names} | {"special_answer_token": "</a>"}

    def variant(self) -> dict[str, Any]:
        """As a user would write it, from the official YAML."""
        state = named(self.case.group("ckpt/"))
        found: dict[str, Any] = {
            "encoder_layers": len(self.encoder_layers()),
            "connection": "separate" if "connection.linears.1.weight" in state else "shared",
            "prompt_length": int(self.case["prompt_len"]),
            "prompt_mlp": "soft_prompt.mlp.0.weight" in state,
        }
        # starts at a layer that its step does not divide, or leaves encoder layers unused
        if int(self.case["text_step"]) > 1 or len(self.encoder_layers()) < self.case.n:
            sources = self.case["layer_enc_index"].tolist()
            found["levels"] = {layer: int(s) for layer, s in enumerate(sources) if s >= 0}
        else:
            found["inject_start"] = int(self.case["start_layer_idx"])
            found["inject_end"] = int(self.case["end_layer_idx"])
        for part in ("attention", "feed_forward"):
            found[f"{part}_adapters"] = adapter_config(state, part).model_dump()
        return found

    def encoder_layers(self) -> list[int]:
        """Those that are used."""
        return sorted({int(s) for s in self.case["layer_enc_index"].tolist() if s >= 0})

    def imported(self) -> AugmentedLM:
        """The model of the run that the command made."""
        run = Run.open(Path(self.tree["runs"]) / self.tree["name"])
        model, _ = build_model(run.recipe, describe(run.recipe), torch.device("cpu"))
        load_weights(run.best, model)
        return model


@pytest.fixture
def official(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, vit48: Path
) -> Callable[[str], Official]:
    return lambda name: Official(name, tmp_path, word_tokenizer, vit48)


@pytest.mark.parametrize("name", CASES)
def test_an_imported_checkpoint_computes_what_the_official_code_did(
    name: str, official: Callable[[str], Official], cli: Cli
) -> None:
    made = official(name)
    done = cli("import-official", made.file, made.recipe)
    assert done.exit_code == 0, done.output
    assert "ignored in the file: optimizer, lr_scheduler, config, epoch, best_valid" in done.output
    assert "mask" not in done.output
    assert ("1 of its 3 connections are never used" in done.output) == (name == "short_pre")
    case, model, layers = made.case, made.imported(), made.encoder_layers()
    features = case["raw_cls"][:, layers]
    with torch.no_grad():
        states = model.joint_states(case["input_ids"], case["attention_mask"], features)
        torch.testing.assert_close(model.family.logits(states), case["logits"], **LOGIT_TOLERANCE)
    ids = case["gen_input_ids"]
    features = case["gen_raw_cls"][:, layers]
    found = model.generate(ids, torch.ones_like(ids), features, do_sample=False, max_length=14)
    assert torch.equal(found, case["gen_greedy_ids"])


def test_both_ways_of_reading_answer_alike_and_what_is_there_is_kept(
    official: Callable[[str], Official], cli: Cli
) -> None:
    """A second import does not touch the first; --overwrite replaces it."""
    made = official("lin_pre")
    assert cli("import-official", made.file, made.recipe).exit_code == 0
    run = Run.open(Path(made.tree["runs"]) / "lin_pre")
    before = run.best.read_bytes()
    made.entries["model"] = {k: v + 1 for k, v in made.entries["model"].items()}
    torch.save(made.entries, made.file)
    refused(cli("import-official", made.file, made.recipe), "holds trained weights", "--overwrite")
    assert run.best.read_bytes() == before
    assert cli("import-official", made.file, made.recipe, "--overwrite").exit_code == 0
    assert run.best.read_bytes() != before


def test_notes_say_where_the_recipe_departs(official: Callable[[str], Official], cli: Cli) -> None:
    made = official("lin_pre")
    sets = ["variant.mask=causal", "encoder.preprocess=model", "text.special_tokens=[]"]
    done = cli("import-official", made.file, made.recipe, *(w for s in sets for w in ("--set", s)))
    assert done.exit_code == 0, done.output
    for words in ("variant.mask=reference", "encoder.preprocess=reference", "special token </a>"):
        assert words in done.output


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("epalm_pre", "variant.prompt_length=4", ["prompt_length: 5 in the checkpoint, 4 in"]),
        ("epalm_pre", "variant.prompt_mlp=false", ["prompt_mlp: True in the checkpoint, False"]),
        ("epalm_pre", "variant.connection=shared", ["connection: 'separate' in the checkpoint"]),
        ("epalm_pre", "variant.token_norm=lm", ["token_norm: 'free' in the checkpoint, 'lm' in"]),
        ("epalm_pre", "variant.inject_start=2", ["start_layer_idx 1, end_layer_idx 7",
                                                 "- 0 0 1 1 2 2 - in the checkpoint's config"]),
        ("adapters_pre", "variant.attention_adapters.reduction=4",
         ["attention_adapters.reduction: 8 in the checkpoint, 4 in the recipe"]),
        ("adapters_pre", "variant.feed_forward_adapters.placement=parallel",
         ["placement: 'sequential' in the checkpoint, 'parallel'"]),
        ("tstep2_pre", "variant.levels={2: 0, 4: 1, 6: 2}",
         ["encoder layers [3, 4, 5] of 6 in the checkpoint", "[0, 1, 2] in the recipe"]),
        ("short_pre", "variant={encoder_layers: 3, inject_start: 5, inject_end: 7}",
         ["encoder layers [3, 4] of 6 in the checkpoint", "[3, 4, 5] in the recipe",
          "variant.encoder_layers: 2", "variant.levels: {5: 3, 6: 4}"]),
    ],
)  # fmt: skip
def test_another_variant_is_refused(
    name: str, override: str, words: list[str], official: Callable[[str], Official], cli: Cli
) -> None:
    made = official(name)
    refused(cli("import-official", made.file, made.recipe, "--set", override), *words)
    assert not (Path(made.tree["runs"]) / name).exists()


def test_another_lm_and_another_encoder_are_refused(
    official: Callable[[str], Official], cli: Cli, opt_folder: Path, vit_folder: Path
) -> None:
    made = official("epalm_pre")
    for field, folder, shapes in (
        ("lm.weights", opt_folder, ["shape (64, 48) in the checkpoint, (48, 48) for"]),
        ("encoder.weights", vit_folder, ["shape (64, 48) in the checkpoint, (64, 24) for"]),
    ):
        sets = ["--set", f"{field}={folder}", "--set", "variant.inject_end=-1"]
        refused(cli("import-official", made.file, made.recipe, *sets), *shapes)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_nothing_but_data_is_unpickled(tmp_path: Path) -> None:
    target, file = tmp_path / "executed", tmp_path / "bad.pth"
    torch.save({"model": {}, "config": Malicious(target)}, file)
    with pytest.raises(EpalmError, match=r"bad\.pth: holds posix.mkdir, which is not unpickled"):
        read_official(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {}}, "holds no `model` entry"),
        ({"model": {"a": 1}}, "holds no `model` entry of tensors"),
        ([1, 2], "holds no `model` entry"),
        (b"PK\3\4 cut short", "cannot be read"),
        (b"", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "file.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(EpalmError, match=words):
        read_official(file)


def test_the_shipped_recipe_evaluates_what_it_imports(
    cli: Cli,
    toy: Callable[..., Path],
    tmp_path: Path,
    vit_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """With a small random OPT of the same depth, and a checkpoint under official names."""
    toy()  # the data
    folder, file = tmp_path / "opt", tmp_path / "checkpoint_best.pth"
    tiny_opt(num_hidden_layers=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shapes = {f"connector.{i}.{kind}": size for i in range(6)
              for kind, size in (("weight", (48, 24)), ("bias", (48,)))}  # fmt: skip
    prompt = "prompt_module.prefix_embedding"
    shapes |= {f"{prompt}.0.weight": (10, 48)}
    shapes |= {f"{prompt}.{i}.{kind}": size for i in (1, 3)
               for kind, size in (("weight", (48, 48)), ("bias", (48,)))}  # fmt: skip
    torch.save({"model": {name: torch.randn(size) for name, size in shapes.items()}}, file)
    overrides = {
        "data.kind": "jsonl",
        "data.path": tmp_path / "toy.jsonl",
        "data.media_root": tmp_path,
        "encoder.weights": vit_folder,
        "encoder.image_size": 32,
        "lm.weights": folder,
        "store.root": tmp_path / "features",
        "runs": tmp_path / "runs",
        "device": "cpu",
        "decode.max_new_tokens": 3,
        "evaluate.examples": 3,
        "evaluate.control": False,
        "evaluate.metrics": "null",  # the toy questions have one answer, not ten
    }
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    recipe = RECIPES / "vqa2-opt-2.7b.yaml"
    for command in (("import-official", file, recipe), ("extract", recipe)):
        done = cli(*command, *sets)
        assert done.exit_code == 0, done.output
    assert "note" not in done.output
    run = tmp_path / "runs" / load_recipe(recipe).name
    done = cli("evaluate", run)
    assert done.exit_code == 0, done.output
    assert (run / "scores.json").is_file()
    assert not (run / "loss.png").exists()
