"""What the steps of `train_step.py` are taken in: dataset, features, LM, random weights."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from epalm.config import Recipe, parse_recipe
from epalm.data.example import Example
from epalm.device import choose_device, choose_dtype
from epalm.extract.encoder import describe
from epalm.extract.lookup import FeatureTable
from epalm.model.augmented import AugmentedLM
from epalm.model.text import TextCodec
from epalm.store.feature_set import Catalogue, CatalogueEntry, FeatureSet, Layout
from epalm.store.marker import Row
from epalm.store.spec import ColumnSpec
from epalm.store.writer import ColumnWriter
from epalm.train.batches import TrainingBatches

WORDS = 500
MEDIA = 512
PROMPT = 15  # words; the answer's word and EOS follow: 16 tokens enter the LM, 2 are learnt
VARIANTS: dict[str, dict[str, Any]] = {
    "epalm": {"connection": "separate", "prompt_length": 10},
    "lin": {"connection": "shared", "prompt_length": 0},
}
MEDIA_SHAPES = {"image": (3, 224, 224), "video": (8, 3, 224, 224), "audio": (1024, 128)}


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
