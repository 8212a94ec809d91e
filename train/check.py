"""What would stop a training, found before features are extracted."""

from collections.abc import Iterable

from epalm.config import Recipe
from epalm.data.example import Dataset, Example
from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.extract.encoder import describe
from epalm.model.augmented import AugmentedLM
from epalm.model.load import lm_dtype, lm_without_weights, load_tokenizer
from epalm.model.text import TextCodec
from epalm.store.spec import FeatureSpec, JointSpec
from epalm.train.answer_start import check_answers
from epalm.train.batches import check_examples
from epalm.train.parts import check_prompts, room_of

_SPECIAL_TOKENS = 8  # more than tokenizers put around a text


def check_splits(dataset: Dataset, recipe: Recipe) -> None:
    """EpalmError when there is nothing to train on, or to start from or validate on where that is
    asked for."""
    if not dataset.split("train"):
        there = ", ".join(dataset.counts())
        raise EpalmError(f"data: there are no train examples; splits that have some: {there}")
    for field in ("patience", "val_every"):
        if getattr(recipe.train, field) is not None and not dataset.split("val"):
            raise EpalmError(
                f"train.{field}: there are no val examples; data.val_from_train holds some out of "
                "the training examples, or set it to null"
            )
    if recipe.train.connection_start == "answers":
        check_answers(dataset.split("train"), recipe)


def check_training(recipe: Recipe, dataset: Dataset) -> None:
    """Put the recipe's model together without the LM's weights, and look at its prompts.

    Raises:
        EpalmError: there are too few examples, none of a split, or no answer to start from; LM,
            tokenizer or encoder cannot be had; the variant does not fit them; a prompt has no token
            or no room, or a training text has none.
    """
    check_splits(dataset, recipe)
    check_examples(dataset.split("train"), recipe)
    specs = {name: describe(alone) for name, alone in recipe.sources().items()}
    spec: FeatureSpec | JointSpec = JointSpec(specs) if recipe.also else next(iter(specs.values()))
    dtype = lm_dtype(recipe.lm, choose_device(recipe.device), recipe.variant.train_lm)
    lm = lm_without_weights(recipe.lm.weights).to(dtype)
    rows = lm.get_input_embeddings().weight.shape[0]
    codec = TextCodec(load_tokenizer(recipe.lm.weights, recipe.text, rows), recipe.text)
    model = AugmentedLM.from_config(lm, recipe.variant, spec.layers, spec.dim)
    codec.prompt(min((example.prompt for example in dataset.examples), key=len))
    room = room_of(recipe, model, spec)
    check_prompts(recipe, dataset, room, codec)
    room.check_training(_longest(dataset.split("train"), codec, room.positions - room.taken))


def _longest(examples: Iterable[Example], codec: TextCodec, places: int) -> int:
    """Tokens of the longest text with its answer, if it may be more than so many; else 0.

    A token is a byte or more, so that few texts, if any, have to be tokenised. Of one that a
    tokenizer makes longer first, `train` says the same once its batches are planned.
    """
    text = codec.config
    fixed = len(text.template.encode()) + len(text.answer_prefix.encode()) + _SPECIAL_TOKENS
    enough = min(places, text.max_prompt_tokens) - fixed
    long = {
        (e.prompt, r)
        for e in examples
        for r in e.references
        if len(e.prompt.encode()) + len(r.encode()) > enough
    }
    return max((len(codec.prompt(p)) + len(codec.answer(r)) - 1 for p, r in long), default=0)
