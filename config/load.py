"""Reading a recipe: a file, what it extends, the command line's overrides; and writing it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from epalm.config.mistakes import describe_mistakes
from epalm.config.read_yaml import read_yaml
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


def override_recipe(recipe: Recipe, overrides: tuple[str, ...], source: str) -> Recipe:
    """A recipe with some fields changed, as in `load_recipe`; `source` names it in errors."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, source)


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a nested mapping; `source` names it in error messages."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {line}" for line in describe_mistakes(error, Recipe)]
        raise EpalmError("\n".join([f"{source}: not a valid recipe", *lines])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says with all that it extends; `heirs`: the files that extend it."""
    if path.resolve() in [heir.resolve() for heir in heirs]:
        chain = " extends ".join(map(str, (*heirs, path)))
        raise EpalmError(f"{path}: extends itself ({chain}); remove one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        wanted = f", which {heirs[-1]} extends" if heirs else ""
        raise EpalmError(f"{path}: cannot read the recipe{wanted}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EpalmError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise EpalmError(f"{path}: a recipe is a mapping of sections, e.g. `name: demo`")
    if "axes" in tree or "base" in tree:
        raise EpalmError(f"{path}: a sweep, not a recipe; it goes to `sweep`")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise EpalmError(f"{path}: extends: must be the name of one recipe (given: {parent!r})")
    return _merge(_read_tree(path.parent / parent, (*heirs, path)), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = [part.strip() for part in dotted.split(".")]
    if not equals or not all((*sections, key)):
        raise EpalmError(f"--set {override}: write it as section.key=value, e.g. train.lr=1e-3")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise EpalmError(f"--set {override}: {section} is a value, it has no keys")
    try:
        node[key] = read_yaml(text, f"--set {dotted}")
    except EpalmError as error:
        raise EpalmError(f"{error}; put text in quotes: --set '{dotted}=\"…\"'") from None
