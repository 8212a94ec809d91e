"""What GQA's files say for its further scores: groups of questions, and the choices of answers.

The choices stand in `train_choices.json` and `val_choices.json`, beside the questions and as whole
files; there are none of testdev. They are each question's valid answers, and its plausible ones.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from epalm.config import DataConfig
from epalm.data.annotations import Hook, files_by_split, read_object
from epalm.data.gqa import FILES

_QUESTIONS = re.compile(r"(\w+)_(?:balanced|all)_questions\.json")


class Choices(NamedTuple):
    """The answers to one question that are valid, and those that are plausible."""

    valid: tuple[str, ...]
    plausible: tuple[str, ...]


def global_groups(config: DataConfig, split: str) -> dict[str, str]:
    """By question id, the global group (such as furniture) of those questions that have one.

    Raises:
        EpalmError: naming file, record and field.
    """
    path = files_by_split(config, FILES).get(split)
    found: dict[str, str] = {}
    if path is None:
        return found
    questions = read_object(path)
    for identifier in questions.keys():
        group = questions.record(identifier).record("groups").text_or_null("global")
        if group is not None:
            found[identifier] = group
    return found


def choices_file(config: DataConfig, split: str) -> Path | None:
    """The file of the choices that belong to a split's questions; None where there is none."""
    questions = files_by_split(config, FILES).get(split)
    match = _QUESTIONS.fullmatch(questions.name) if questions else None
    if questions is None or match is None:
        return None
    path = questions.with_name(f"{match[1]}_choices.json")
    return path if path.is_file() else None


def read_choices(path: Path, questions: Iterable[str]) -> dict[str, Choices]:
    """The choices of these questions, by id.

    Raises:
        EpalmError: naming file, record and field.
    """
    records = read_object(path, _sharing_lists())
    found = {}
    for identifier in questions:
        record = records.record(identifier)
        valid, plausible = record.identifiers("valid"), record.identifiers("plausible")
        found[identifier] = Choices(tuple(valid), tuple(plausible))
    return found


def _sharing_lists() -> Hook:
    """A hook by which equal lists of texts become one: few kinds of choices serve all questions."""
    kept: dict[tuple[Any, ...], list[Any]] = {}

    def share(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(fields)
        for name, value in fields:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                found[name] = kept.setdefault(tuple(value), value)
        return found

    return share
