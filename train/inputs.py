"""What a training learns from beside its features: the LM, its tokenizer and the examples.

The recipe says where they are, inputs.json in the run folder what was found there, as hashes. With
anything else there the run would go on as another one, or be scored as another, under its name.
"""

import hashlib
import json

from epalm.errors import EpalmError
from epalm.model.load import lm_digest
from epalm.model.text import TextCodec
from epalm.store.atomic import wrong_field
from epalm.train.parts import Parts
from epalm.train.run import Run

_PROBE = "How many people aren't at the café by 10:45? Two: one (left), and a dog's owner."
"""A tokenizer may have the same vocabulary as another, and cut words elsewhere."""
_WORDS = {
    "lm": "lm.weights: {lm} holds another LM than",
    "tokenizer": "lm.weights: {lm} holds another tokenizer than",
    "examples": "data: the train and val examples, or their media, are not those that",
}


def bind_inputs(run: Run, parts: Parts) -> None:
    """Record what a training begins with, or compare what it goes on with.

    Raises:
        EpalmError: something is not what it was, or the record cannot be read.
    """
    found = {**_language(run, parts.codec), "examples": _examples(parts)}
    if run.inputs.is_file():
        _compare(run, found)
    else:
        run.write(run.inputs, json.dumps(found, indent=2))


def check_lm(run: Run, codec: TextCodec) -> None:
    """EpalmError where the LM or its tokenizer is not the one that the run was trained with."""
    if run.inputs.is_file():  # else it was imported
        _compare(run, _language(run, codec))


def _language(run: Run, codec: TextCodec) -> dict[str, str]:
    vocabulary = sorted(codec.tokenizer.get_vocab().items())
    cut = codec.tokenizer(_PROBE).input_ids
    tokenizer = hashlib.sha256(json.dumps([vocabulary, cut]).encode()).hexdigest()
    return {"lm": lm_digest(run.recipe.lm.weights), "tokenizer": tokenizer}


def _examples(parts: Parts) -> str:
    """SHA-256 of the examples that are learnt from or validated on, in order."""
    digest = hashlib.sha256()
    for e in parts.dataset.examples:
        if e.split != "test":
            content = parts.features.content_hash(e.media)
            line = [e.id, e.split, e.prompt, e.references, e.media, content]
            digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _compare(run: Run, found: dict[str, str]) -> None:
    try:
        recorded = json.loads(run.inputs.read_text(encoding="utf-8"))
        wrong = wrong_field(recorded, dict.fromkeys(_WORDS, str))
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise EpalmError(
            f"{run.inputs}: not as a training wrote it ({wrong}); restore it, or delete it, and "
            "nothing is compared with what the run was trained on before"
        )
    for name, value in found.items():
        if recorded[name] != value:
            raise EpalmError(
                f"{_WORDS[name].format(lm=run.recipe.lm.weights)} {run.folder} was trained with; "
                "bring them back, or train again: under another name (--set name=…), or with "
                "--overwrite"
            )
