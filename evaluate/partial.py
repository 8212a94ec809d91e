"""Answers of an evaluation that may be interrupted, kept as they come."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from epalm.config import Recipe
from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.load import lm_digest
from epalm.model.weights import trained_weights
from epalm.store.atomic import NUMBER, naming_file, read_json_lines

_PREFIX = "partial-"


class PartialAnswers:
    """What one pass over the examples has answered so far, in files of the run folder.

    Each process appends to a file of its own, a line per batch, and reads those of all: a pass
    goes on with another number of processes too. A line that a kill cut short does not count. The
    files' names say what the answers follow from, so that those of anything else are not taken.

    Attributes:
        answers: by position of the example.
        seconds: that they took.
    """

    def __init__(self, folder: Path, label: str, binding: str, place: int = 0, places: int = 1):
        """
        Args:
            label: of the pass.
            binding: of `binding_of`.
            place: this process's among `places`.
        """
        self.answers: dict[int, str] = {}
        self.seconds = 0.0
        self._places = places
        name = f"{_PREFIX}{label}-{binding}"
        self._file = folder / f"{name}-{place}.jsonl"
        for file in sorted(folder.glob(f"{name}-*.jsonl")):
            for line in read_json_lines(file, {"answers": dict, "seconds": NUMBER}):
                if line.get("seal") != _seal(line["answers"]):
                    raise EpalmError(
                        f"{file}: its answers are not as they were written; delete the file, what "
                        "it holds is answered again"
                    )
                self.answers |= {int(key): text for key, text in line["answers"].items()}
                self.seconds += line["seconds"]
        self._cut = self._file.is_file() and not self._file.read_bytes().endswith(b"\n")

    def add(self, answers: Mapping[int, str], seconds: float) -> None:
        """Keep a batch's answers; `seconds`: that it took this process."""
        self.answers |= answers
        spent = round(seconds / self._places, 4)
        line = json.dumps({"answers": answers, "seconds": spent, "seal": _seal(answers)})
        with naming_file(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write("\n" * self._cut + line + "\n")
        self._cut = False


def _seal(answers: Mapping[Any, str]) -> str:
    """16 hex digits of a line's answers: a bit that has changed would be in a prediction."""
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]


def discard_partial(folder: Path) -> None:
    """Delete all partial answers in a run folder."""
    for file in folder.glob(f"{_PREFIX}*.jsonl"):
        file.unlink(missing_ok=True)


def binding_of(
    recipe: Recipe,
    features: str,
    model: AugmentedLM,
    examples: Sequence[Example],
    shown: Sequence[tuple[str, str]],
) -> str:
    """16 hex digits that follow from all that decides the answers.

    Greedy answers and those of beams do not depend on the batches, but for rounding; draws do.

    Args:
        features: what made them, in canonical form.
        model: its trained weights and the number format of its LM, which `lm.dtype: auto` leaves to
            the device.
        shown: id and content hash of the media shown with each example.
    """
    decode = recipe.decode.model_dump(exclude=None if recipe.decode.do_sample else {"batch_size"})
    asked = [(e.id, e.prompt, *media) for e, media in zip(examples, shown, strict=True)]
    tree: dict[str, Any] = {
        "lm": recipe.lm.weights,
        "lm_dtype": str(model.dtype),
        "lm_digest": lm_digest(recipe.lm.weights),
        "text": recipe.text.model_dump(),
        "variant": recipe.variant.model_dump(),
        "features": features,
        "decode": decode,
        "asked": asked,
    }
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name, value in sorted(trained_weights(model.trained).items()):
        digest.update(name.encode())
        # as bytes, since NumPy knows no bfloat16
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()[:16]
