"""Recipes: every knob there is, typed, documented and validated when loaded.

A recipe is one YAML file. It may extend another (`extends: other.yaml`, relative to itself), and
the command line may override any field (`--set train.lr=1e-3`). Unknown keys are errors that name
the nearest real key. The resolved recipe is written into every run folder.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from epalm.errors import EpalmError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
# before a slash, such names sort as they do alone
SourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
MAIN = "main"
"""Name of the source that a recipe's own `data` and `encoder` are."""


class Section(BaseModel):
    """Base of all sections: unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Section):
    """How many media of each split are used; a seeded choice. None means all."""

    train: Positive | None = None
    val: Positive | None = None
    test: Positive | None = None


class FewShotConfig(Section):
    """A seeded choice of training examples; with one seed, a larger one holds a smaller one."""

    fraction: float | None = Field(
        None, gt=0, le=1, description="share of the training examples; None: all of them"
    )
    count: Positive | None = Field(None, description="number of examples, instead of a fraction")
    balanced: bool = Field(
        False, description="as many examples of each answer as of any other, while they last"
    )

    @model_validator(mode="after")
    def _one_size(self) -> "FewShotConfig":
        if self.fraction is not None and self.count is not None:
            raise ValueError("give fraction or count, not both")
        if self.balanced and self.fraction is None and self.count is None:
            raise ValueError("balanced says how to choose; give fraction or count too")
        return self


class DataConfig(Section):
    """Which dataset, and which part of it."""

    kind: str = Field(description="a reader of data/, see READERS there")
    path: str = Field(description="annotation file, folder of such files, or wheel: address")
    splits: str = Field(
        "standard", description="which of a dataset's published splits, e.g. karpathy for VQA v2"
    )
    files: dict[Literal["train", "val", "test"], str] = Field(
        {},
        description="annotation file of each split, in the folder `path`; default: the names that "
        "the dataset is distributed with; a split that is left out is not read",
    )
    media_root: str | None = Field(
        None,
        description="folder, zip or tar archive, or several of these by glob or brace list, that "
        "media paths are relative to; default: beside the annotations",
    )
    media_name: str | None = Field(
        None,
        description="media paths as a pattern such as {video}.mp4, where files are named otherwise "
        "than the reader expects; its file lists the names that may stand in braces",
    )
    name: str | None = Field(
        None, description="dataset name under which the feature set lists media; default from path"
    )
    limits: Limits = Limits()
    seed: int | None = Field(
        None, ge=0, description="of subsets and held-out media; default: the recipe's seed"
    )
    val_from_train: int = Field(
        0, ge=0, description="training media held out as `val` where the dataset has no such split"
    )
    few_shot: FewShotConfig = Field(
        FewShotConfig(), description="examples that are trained on, of those that limits leaves"
    )
    bad_media: Literal["stop", "skip"] = Field(
        "stop", description="media that are missing or cannot be decoded: stop, or leave them out"
    )


class TextConfig(Section):
    """How a prompt and an answer become the LM's text."""

    template: str = Field("Question: {prompt} Answer:", description="must contain {prompt}")
    answer_prefix: str = Field(" ", description="put between prompt and answer")
    special_tokens: tuple[str, ...] = Field(
        (), description="added to the tokenizer; must fall in rows the LM already has"
    )
    max_prompt_tokens: Positive = Field(256, description="longer prompts are an error")

    @model_validator(mode="after")
    def _has_slot(self) -> "TextConfig":
        try:
            filled = self.template.format(prompt="\0")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"template may hold no other braces than {{prompt}} ({error})"
            ) from None
        if "\0" not in filled:
            raise ValueError("template must contain {prompt}")
        return self


class ViewsConfig(Section):
    """Seeded augmentations of the media, cached beside view 0 (convention 20 to 22; Table 16)."""

    count: int = Field(
        0, ge=0, description="K: views 1..K of each training media; 0: train on view 0"
    )
    seed: int = Field(0, ge=0, description="a view follows from seed, media hash and view number")
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.5, 1.0), description="area of the random resized crop, as a share of the frame's"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    randaugment_ops: int = Field(2, ge=0, description="RandAugment operations per view; 0: none")
    randaugment_magnitude: int = Field(7, ge=0, le=30, description="of 30")
    frequency_mask: int = Field(24, ge=0, description="audio: widest masked band, mel bins")
    time_mask: int = Field(96, ge=0, description="audio: longest masked stretch, fbank frames")


class EncoderConfig(Section):
    """The encoder, frozen unless it is trained online, and what is kept of it."""

    kind: str = Field("timm", description="an encoder of extract/, see ENCODERS there")
    weights: str = Field(description="address: timm:NAME, hf:ORG/NAME, a folder or file, wheel:…")
    arch: str | None = Field(
        None,
        description="timm's name of the architecture, where the address does not say it (wheel:, a "
        "file); for the other kinds a JSON object of configuration fields, see their files",
    )
    image_size: Positive | None = Field(None, description="pixels; default: the model's own")
    frames: Positive | None = Field(
        None, description="frames taken of a video; default: the model's own"
    )
    tokens: Literal["cls", "mean", "all"] = Field(
        "cls",
        description="tokens kept of a layer: the class token, the mean over its patch tokens (for "
        "encoders without a class token), or all of them",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="encoder layers kept, from 0; default: all of them"
    )
    preprocess: Literal["model", "reference"] = Field(
        "model",
        description="model: as the encoder was trained; reference: as the official code does "
        "(conventions 20 to 22)",
    )
    views: ViewsConfig = Field(ViewsConfig(), description="augmented views of the training media")
    final_norm: bool = Field(True, description="final norm on every layer's tokens (convention 11)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the encoder; part of the fingerprint"
    )
    batch_size: Positive = 32
    workers: Positive | None = Field(
        None, description="decoding processes; default: as many as cores, at most 8"
    )
    decode_timeout: float = Field(
        60.0, gt=0, description="seconds after which a stuck decoder is killed and replaced"
    )
    online: bool = Field(
        False,
        description="keep no features: training and evaluation decode and encode media each time "
        "they need them",
    )
    train: bool = Field(
        False, description="train the encoder's own weights too, and save all of them (table 12)"
    )

    @model_validator(mode="after")
    def _can_be_trained(self) -> "EncoderConfig":
        if self.train and not self.online:
            raise ValueError(
                "features that are kept cannot follow an encoder that is trained; set online to "
                "true too, or train to false"
            )
        if self.train and self.dtype == "float16":
            raise ValueError(
                "float16 is too narrow for the gradients of an encoder; set dtype to bfloat16 or "
                "float32"
            )
        return self

    @property
    def worker_count(self) -> int:
        """Decoding processes."""
        return self.workers or min(os.cpu_count() or 1, 8)

    @model_validator(mode="after")
    def _layers_are_ascending(self) -> "EncoderConfig":
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be ascending, without repetition")
        if self.layers == ():
            raise ValueError("layers must name at least one layer")
        if self.tokens == "all" and self.layers is None:
            raise ValueError("tokens: all needs encoder.layers; all tokens of all layers are huge")
        return self


class StoreConfig(Section):
    """Where features are kept and how."""

    root: str = Field("features", description="folder that holds the feature sets")
    backend: str = Field("zarr", description="a backend of store/: zarr or hdf5")
    dtype: Literal["float16", "float32"] = Field(
        "float16",
        description="stored number format; a shard whose values float16 cannot hold is stored as "
        "float32",
    )
    shard_rows: Positive = Field(512, description="media per shard")
    placement: Literal["auto", "device", "ram", "disk"] = Field(
        "auto",
        description="where features are while training: on the GPU, in memory, or on "
        "disk, mapped; auto: the first of these that has room",
    )


class LMConfig(Section):
    """The frozen language model."""

    weights: str = Field(description="address: hf:ORG/NAME, a folder, or wheel:…/FILE.gguf")
    dtype: ComputeDtype = Field(
        "auto", description="auto: bfloat16 where the device has bf16 arithmetic, else float32"
    )
    device_map: Literal["auto"] | None = Field(
        None,
        description="auto: spread over all GPUs, for an LM too big for one; one process, no "
        "adapters",
    )


class AdapterConfig(Section):
    """Adapters in one kind of sub-layer of every LM layer (paper, appendix A; convention 9)."""

    reduction: int = Field(
        0, ge=0, description="r: width H of the LM over the adapter's; 0: no adapters there"
    )
    placement: Literal["sequential", "parallel", "scaled"] = Field(
        "sequential",
        description="sequential: on the sub-layer's output; parallel: beside it, on its input; "
        "scaled: parallel, times a trained scale",
    )
    layer_norm: bool = Field(False, description="LayerNorm before the adapter's first layer")


class VariantConfig(Section):
    """What is trained, and where it enters the LM (paper 3.1, appendix B)."""

    connection: Literal["separate", "shared"] = Field(
        "separate", description="one linear layer per encoder layer used, or one for all"
    )
    encoder_layers: Positive = Field(6, description="n: the last n encoder layers are used")
    inject_start: int | None = Field(
        None,
        description="first injection layer, from 0, or negative: from the top; default: half of "
        "the LM's layers",
    )
    inject_end: int | None = Field(
        None,
        description="layer before which injection ends, from 0, or negative: from the top; "
        "default: the LM's layer count",
    )
    text_step: Positive = Field(1, description="inject only at layers divisible by this")
    levels: dict[int, int] | None = Field(
        None,
        description="LM layer to encoder layer, both from 0, in the place of inject_start, "
        "inject_end and text_step (tables 9 and 14); encoder_layers then says how many different "
        "encoder layers it names",
    )
    token_norm: Literal["free", "lm", "rms"] = Field(
        "free",
        description="length of the perceptual tokens: as the connection makes them (the paper's), "
        "the mean length of the LM's words as they enter it, or the square root of its width",
    )
    token_affine: bool = Field(
        False, description="trained scale and bias of the perceptual tokens of each encoder layer"
    )
    prompt_length: int = Field(10, ge=0, description="soft prompt tokens; 0: none (eP-ALM_lin)")
    prompt_mlp: bool = Field(True, description="two-layer MLP behind the prompt")
    deep_prompt: int = Field(
        0,
        ge=0,
        description="trained tokens at the input of every LM layer, in the place of the soft "
        "prompt, whose length must then be 0; 0: none",
    )
    attention_adapters: AdapterConfig = Field(
        AdapterConfig(), description="adapters on the attention of every LM layer"
    )
    feed_forward_adapters: AdapterConfig = Field(
        AdapterConfig(), description="adapters on the feed-forward part of every LM layer"
    )
    train_lm: bool = Field(
        False, description="train the LM's own weights too, and save all of them (table 12)"
    )
    mask: Literal["causal", "reference"] = Field(
        "causal",
        description="reference: the perceptual token sees later text too, as in the official code "
        "(its bug 2); only for parity with published checkpoints",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "VariantConfig":
        if self.deep_prompt and self.prompt_length:
            raise ValueError("deep_prompt takes the soft prompt's place; set prompt_length to 0")
        if self.levels is None:
            return self
        if (self.inject_start, self.inject_end, self.text_step) != (None, None, 1):
            raise ValueError("levels says all; leave out inject_start, inject_end and text_step")
        named = len(set(self.levels.values()))
        if not named:
            raise ValueError("levels must name at least one LM layer")
        if named != self.encoder_layers:
            raise ValueError(
                f"levels names {named} encoder layers, encoder_layers says {self.encoder_layers}; "
                f"set it to {named}"
            )
        return self


class TrainConfig(Section):
    """Optimisation on features (paper, appendix A; conventions 12, 13, 24, 25)."""

    steps: Positive = Field(description="optimiser steps")
    batch_size: Positive = Field(64, description="examples per step")
    accumulate: Positive = Field(
        1,
        description="pieces in which each process computes its share of a batch, one after the "
        "other; takes less memory, changes nothing else",
    )
    examples_per_media: Positive = Field(
        4, description="at most so many examples about one media stand together in a batch"
    )
    lr: float = Field(2e-5, gt=0, description="peak learning rate of the connections")
    warmup_lr: float = Field(0.0, ge=0, description="learning rate that the warm-up starts from")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step")
    schedule: Literal["cosine", "official", "official-caption"] = Field(
        "cosine",
        description="cosine: linear warm-up, then a cosine over the steps; official: the official "
        "code's stair of 400 steps, then a cosine that moves once an epoch; official-caption: the "
        "same as its caption scripts have it, where only biases are scheduled (bug 4)",
    )
    epochs: Positive | None = Field(
        None, description="equal parts of the steps at which an official schedule moves"
    )
    warmup: Fraction = Field(
        0.1, description="share of the steps spent warming up; of the cosine schedule"
    )
    prompt_lr: float | None = Field(
        None, gt=0, description="of soft prompt, deep prompts and adapters; default: lr"
    )
    prompt_schedule: Literal["cosine", "constant"] = "cosine"
    lm_lr: float | None = Field(
        None, gt=0, description="of the LM's own weights where they are trained; default: lr"
    )
    encoder_lr: float | None = Field(
        None, gt=0, description="of the encoder's own weights where they are trained; default: lr"
    )
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; None: no limit")
    loss: Literal["answer", "all"] = Field(
        "answer",
        description="answer: mean over answer and EOS tokens; all: summed over all text "
        "tokens, divided by the batch, times loss_scale (conventions 12, 13)",
    )
    loss_scale: float = Field(1.0, gt=0, description="factor on the loss; the reference's is 0.1")
    text_states: Literal["auto", "always", "never"] = Field(
        "auto",
        description="keep the states of texts at the first injection layer in the feature store, "
        "where nothing below it is trained (eP-ALM_lin), so that half the LM is not run again; "
        "auto: where the training would run them at least twice; always: an error where it "
        "cannot be",
    )
    log_every: Positive = Field(10, description="steps between metric lines")
    val_every: Positive | None = Field(None, description="steps between validations; None: at end")
    val_examples: Positive | None = Field(None, description="seeded choice; None: all of them")
    patience: Positive | None = Field(
        None, description="validations without a better score that end the training; None: never"
    )
    checkpoint_every: Positive = Field(100, description="steps between checkpoints")

    @model_validator(mode="after")
    def _goes_together(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be divisible by accumulate "
                f"({self.accumulate})"
            )
        if (self.schedule == "cosine") != (self.epochs is None):
            raise ValueError("epochs belongs to the official schedules, and they need it")
        if self.patience is not None and self.val_every is None:
            raise ValueError("patience counts validations; set val_every too")
        return self


class DecodeConfig(Section):
    """Generation at validation, evaluation and prediction."""

    num_beams: Positive = 1
    max_new_tokens: Positive = 10
    length_penalty: float = 1.0
    batch_size: Positive = 64
    do_sample: bool = Field(
        False, description="draw every token at random (the paper's random sampling)"
    )
    temperature: float | None = Field(None, gt=0, description="of the draws; default: 1")
    top_k: int | None = Field(
        None, ge=0, description="draw among the k likeliest tokens; 0: all; default: 50"
    )
    top_p: Fraction | None = Field(
        None, description="draw among the likeliest tokens that have this share; default: 1"
    )
    seed: int = Field(
        0, ge=0, description="of the draws, which depend on decode.batch_size and its order too"
    )

    @model_validator(mode="after")
    def _draws_are_asked_for(self) -> "DecodeConfig":
        given = [
            name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None
        ]
        if given and not self.do_sample:
            raise ValueError(f"{given[0]} is for random draws; set do_sample to true")
        return self


class EvalConfig(Section):
    """What is scored after training."""

    split: Literal["train", "val", "test"] = "test"
    examples: Positive | None = Field(None, description="seeded choice; None: all of them")
    control: bool = Field(True, description="also score with media shuffled between examples")
    metrics: tuple[str, ...] | None = Field(
        None,
        description="names in METRICS of evaluate/metrics, the first of which chooses the best "
        "checkpoint; default: by dataset, see docs/metrics.md",
    )
    official: bool = Field(
        False,
        description="captions: tokenize with Stanford's Java program; adds METEOR, SPICE and "
        "SPIDEr to the default metrics",
    )

    @model_validator(mode="after")
    def _has_metrics(self) -> "EvalConfig":
        if self.metrics is not None and (
            not self.metrics or len(set(self.metrics)) < len(self.metrics)
        ):
            raise ValueError("metrics must name at least one metric, and none twice")
        return self


class Source(Section):
    """A further dataset and the encoder that it is seen or heard through."""

    data: DataConfig
    encoder: EncoderConfig


class Recipe(Section):
    """One whole run."""

    name: str = Field(pattern=r"^[\w.-]+$", description="names the run folder")
    seed: int = Field(0, ge=0, description="of subsets, initialisation, sampling and control")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    runs: str = Field("runs", description="folder that holds the run folders")
    data: DataConfig
    text: TextConfig = TextConfig()
    encoder: EncoderConfig
    also: dict[SourceName, Source] = Field(
        {},
        description="further sources by name, trained on together with data and encoder (the "
        f"source `{MAIN}`), each through a connection of its own",
    )
    store: StoreConfig = StoreConfig()
    lm: LMConfig
    variant: VariantConfig = VariantConfig()
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvalConfig = EvalConfig()

    @property
    def data_seed(self) -> int:
        """Of the choice of media and examples."""
        return self.seed if self.data.seed is None else self.data.seed

    def sources(self) -> dict[str, "Recipe"]:
        """By name in alphabetical order, the recipe that each source would have by itself."""
        alone = {MAIN: self.model_copy(update={"also": {}})}
        for name, source in self.also.items():
            update = {"data": source.data, "encoder": source.encoder, "also": {}}
            alone[name] = self.model_copy(update=update)
        return dict(sorted(alone.items()))

    @model_validator(mode="after")
    def _sources_have_their_own_names(self) -> "Recipe":
        if MAIN in self.also:
            raise ValueError(f"also: {MAIN} is the recipe's own data and encoder; rename it")
        encoders = [self.encoder, *(source.encoder for source in self.also.values())]
        if self.also and any(encoder.online for encoder in encoders):
            raise ValueError("encoder.online: only a recipe with one source; leave out `also`")
        return self

    @model_validator(mode="after")
    def _lm_can_be_spread(self) -> "Recipe":
        variant = self.variant
        adapters = variant.attention_adapters.reduction or variant.feed_forward_adapters.reduction
        if self.lm.device_map and adapters:
            raise ValueError("lm.device_map: an LM with adapters cannot be spread over devices")
        return self


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, extend, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` strings; values are read as YAML.

    Raises:
        EpalmError: unreadable file, malformed override, unknown key or bad value.
    """
    path = Path(path)
    tree = _read_tree(path, ())
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a nested mapping; `source` names it in error messages."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_describe(e)}" for e in error.errors()]
        raise EpalmError(f"{source}: not a valid recipe\n" + "\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise EpalmError(f"{path}: extends itself; remove one `extends`")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EpalmError(f"{path}: cannot read the recipe ({error})") from None
    except yaml.YAMLError as error:
        raise EpalmError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise EpalmError(f"{path}: a recipe is a mapping of sections, e.g. `name: demo`")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    base = _read_tree(path.parent / str(parent), (*seen, path.resolve()))
    return _merge(base, tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise EpalmError(f"--set {override}: write it as section.key=value, e.g. train.lr=1e-3")
    *sections, key = dotted.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise EpalmError(f"--set {override}: {section} is a value, it has no keys")
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EpalmError(f"--set {override}: not a YAML value: {error}") from None


def _describe(error: Any) -> str:
    """One line for one pydantic error, with the nearest real key for a typo."""
    location = [str(part) for part in error["loc"]]
    field = ".".join(location)
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
        return f"{field}: {error['msg']}{given}"
    section: Any = Recipe
    for part in location[:-1]:
        is_section = hasattr(section, "model_fields")  # else the name of a source
        section = section.model_fields[part].annotation if is_section else get_args(section)[1]
    near = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(section.model_fields)}"
    return f"{field}: unknown key; {hint}"
