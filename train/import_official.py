"""A run made of a checkpoint of the official code, to be evaluated like any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epalm.config import Recipe
from epalm.errors import EpalmError, NotHereError
from epalm.extract.encoder import describe
from epalm.model.augmented import AugmentedLM
from epalm.model.injection import InjectionPlan
from epalm.model.load import lm_without_weights
from epalm.model.official import from_official, read_official, variant_of
from epalm.train.checkpoint import save_weights
from epalm.train.progress import Progress
from epalm.train.run import Run


def import_official(file: Path, recipe: Recipe, overwrite: bool = False) -> tuple[Run, list[str]]:
    """Write the recipe's run folder, with the checkpoint's weights as its best ones.

    Neither features nor the LM's weights are looked at: shapes say whether all fits together.

    Returns:
        The run, and notes for its user: what in the file was ignored, and where the recipe departs
        from the official code in what weights do not tell.

    Raises:
        EpalmError: the file cannot be read, does not fit the recipe, or there is such a run.
    """
    if recipe.also:
        raise EpalmError("also: the official code has one source; leave the others out")
    checkpoint, others = read_official(file)
    state = {name: value.float() for name, value in from_official(checkpoint).items()}
    try:
        spec = describe(recipe)
    except NotHereError:
        spec = describe(recipe, weights_at_hand=False)
    _check_fields(file, variant_of(state), recipe)
    lm = lm_without_weights(recipe.lm.weights)
    model = AugmentedLM.from_config(lm, recipe.variant, spec.layers, spec.dim)
    _check_shapes(file, state, model)
    settings = others.get("config")
    settings = settings if isinstance(settings, Mapping) else {}
    _check_plan(file, settings, model.plan)
    _check_levels(file, settings, recipe, spec.layers)
    model.trained.load_state_dict(state, assign=True)
    run = Run.create(recipe, overwrite)
    if run.best.is_file() or run.last.is_file():
        raise EpalmError(
            f"{run.folder}: holds trained weights already; choose another name (--set name=…), or "
            "replace that run with --overwrite"
        )
    save_weights(run.best, model, Progress())
    return run, _notes(recipe, settings, others)


def _check_fields(file: Path, found: Mapping[str, Any], recipe: Recipe) -> None:
    """Compare what the weights say of the variant with what the recipe says."""
    lines = []
    for name, value in found.items():
        wanted: Any = recipe.variant
        for part in name.split("."):
            wanted = getattr(wanted, part)
        if name == "connection" and recipe.variant.encoder_layers == 1:
            continue  # one of one is both
        if value != wanted:
            lines.append(f"variant.{name}: {value!r} in the checkpoint, {wanted!r} in the recipe")
    _refuse(file, lines)


def _check_shapes(file: Path, state: Mapping[str, torch.Tensor], model: AugmentedLM) -> None:
    ours = {name: tuple(p.shape) for name, p in model.trained.named_parameters()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    _refuse(
        file,
        [
            f"{name}: shape {theirs.get(name, 'none')} in the checkpoint, "
            f"{ours.get(name, 'none')} for the recipe's encoder, LM and variant"
            for name in names
        ],
    )


def _check_plan(file: Path, settings: Mapping[str, Any], plan: InjectionPlan) -> None:
    """Compare the injection layers, where the checkpoint says which (conventions 2 and 3)."""
    keys = ("start_layer_idx", "end_layer_idx", "injected_hidden_states")
    if not all(isinstance(settings.get(key), int) for key in keys):
        return
    start, end, n = (settings[key] for key in keys)
    step = settings.get("text_step") or 1
    official = InjectionPlan.spread(len(plan.source), start, end, n, step)
    if official != plan:
        line = (
            f"the LM's layers take encoder layers {_words(official)} in the checkpoint's config "
            f"(start_layer_idx {start}, end_layer_idx {end}, injected_hidden_states {n}, text_step "
            f"{step}), {_words(plan)} in the recipe"
        )
        _refuse(file, [line])


def _check_levels(
    file: Path, settings: Mapping[str, Any], recipe: Recipe, encoder_layers: int
) -> None:
    """Compare the encoder layers that `variant.levels` names (convention 1: always the last)."""
    n, levels = settings.get("injected_hidden_states"), recipe.variant.levels
    if levels is None or not isinstance(n, int):
        return
    ours, theirs = sorted(set(levels.values())), list(range(encoder_layers - n, encoder_layers))
    if ours != theirs:
        _refuse(
            file,
            [
                f"variant.levels: encoder layers {theirs} in the checkpoint, the last {n} of "
                f"{encoder_layers}; {ours} in the recipe"
            ],
        )


def _words(plan: InjectionPlan) -> str:
    return " ".join("-" if source is None else str(source) for source in plan.source)


def _refuse(file: Path, lines: list[str]) -> None:
    if lines:
        more = [f"… and {len(lines) - 8} more"] if len(lines) > 8 else []
        shown = "".join(f"\n  {line}" for line in lines[:8] + more)
        raise EpalmError(f"{file}: does not fit the recipe:{shown}")


def _notes(recipe: Recipe, settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    notes = []
    if others:
        notes.append(f"ignored in the file: {', '.join(map(str, others))}")
    if recipe.variant.mask != "reference":
        notes.append(
            "these weights were trained with the official mask; variant.mask=reference gives "
            "their own answers"
        )
    if recipe.encoder.preprocess != "reference":
        notes.append(
            "the official code shows its encoders other numbers than they were trained with; "
            "encoder.preprocess=reference does too (bug 23)"
        )
    token = settings.get("special_answer_token")
    if token and token not in recipe.text.special_tokens:
        notes.append(f"the official text has the special token {token}; see text.special_tokens")
    return notes
