"""What is wrong with a recipe or a sweep, in a line that names field and remedy."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_REMEDIES = {
    "missing": "missing; add it",
    "model_type": "is a section; give its fields, as {field: value} or below it",
    "tuple_type": "must be a list, as [1, 2]",
}


def describe_mistakes(error: ValidationError, top: type[BaseModel]) -> list[str]:
    """A line for each mistake that pydantic found in a `top`."""
    return [_describe(found, top) for found in error.errors()]


def _describe(error: Any, top: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"]]
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{'.'.join(location)}: unknown key; {_hint(location, top)}"
    if kind == "value_error":
        words = str(error["ctx"]["error"])
    else:
        words = _REMEDIES.get(kind, error["msg"])
    if kind == "string_type" and isinstance(given, (int, float)):
        words += "; put it in quotes"
    if kind != "missing" and not isinstance(given, (dict, BaseModel)):
        words += f" (given: {given!r})"
    return ": ".join(filter(None, (".".join(location), words)))


def _hint(location: list[str], top: type[BaseModel]) -> str:
    """The nearest real key, or all that there are."""
    *outer, key = location
    section: Any = top
    for part in outer:
        is_section = hasattr(section, "model_fields")  # else the name of a source
        section = section.model_fields[part].annotation if is_section else get_args(section)[1]
    fields = section.model_fields
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.75)
    elsewhere = [
        f"{name}.{key}"
        for name, field in top.model_fields.items()
        if key in getattr(field.annotation, "model_fields", {})
    ]
    near = near or elsewhere or difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(fields)}"
