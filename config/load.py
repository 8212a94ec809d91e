"""Reading a recipe: a file, what it extends, the command line's overrides; and writing it."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from epalm.config.recipe import Recipe
from epalm.errors import EpalmError


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
