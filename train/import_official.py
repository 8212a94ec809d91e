"""A run made of a checkpoint of the official code, to be evaluated like any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epalm.config import Recipe, VariantConfig
from epalm.errors import EpalmError, NotHereError
from epalm.extract.encoder import describe
from epalm.model.augmented import AugmentedLM
from epalm.model.families import family_of
from epalm.model.injection import InjectionPlan
from epalm.model.load import lm_without_weights
from epalm.model.official import from_official, read_official, variant_of
from epalm.train.checkpoint import save_weights
from epalm.train.official_plan import OfficialPlan
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
    lm = lm_without_weights(recipe.lm.weights)
    settings = others.get("config")
    settings = settings if isinstance(settings, Mapping) else {}
    official = OfficialPlan.of(settings, len(family_of(lm).layers))
    if official is not None:
        state = official.without_unused(state)
    try:
        spec = describe(recipe)
    except NotHereError:
        spec = describe(recipe, weights_at_hand=False)
    if official is not None:
        _check_encoder_layers(file, official, recipe.variant, spec.layers)
    _check_fields(file, variant_of(state), recipe)
    model = AugmentedLM.from_config(lm, recipe.variant, spec.layers, spec.dim)
    _check_shapes(file, state, model)
    if official is not None:
        _check_plan(file, official, model.plan)
    model.trained.load_state_dict(state, assign=True)
    run = Run.create(recipe, overwrite)
    if run.best.is_file() or run.last.is_file():
        raise EpalmError(
            f"{run.folder}: holds trained weights already; choose another name (--set name=…), or "
            "replace that run with --overwrite"
        )
    save_weights(run.best, model, Progress())
    notes = _notes(recipe, settings, others)
    if official is not None and len(official.used) < official.n:
        notes.append(
            f"{official.n - len(official.used)} of its {official.n} connections are never used "
            "(bug 3) and were left out"
        )
    return run, notes


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


def _check_encoder_layers(
    file: Path, official: OfficialPlan, variant: VariantConfig, encoder_layers: int
) -> None:
    """Compare which encoder layers are seen (convention 1)."""
    levels = official.levels(encoder_layers)
    theirs = sorted(set(levels.values()))
    ours = list(range(encoder_layers - variant.encoder_layers, encoder_layers))
    if variant.levels is not None:
        ours = sorted(set(variant.levels.values()))
    if ours != theirs:
        line = (
            f"encoder layers {theirs} of {encoder_layers} in the checkpoint's config "
            f"({official.said}), {ours} in the recipe; set variant.encoder_layers: {len(theirs)} "
            f"and variant.levels: {levels}, without inject_start, inject_end and text_step"
        )
        _refuse(file, [line])


def _check_plan(file: Path, official: OfficialPlan, plan: InjectionPlan) -> None:
    """Compare the injection layers (conventions 2 and 3)."""
    if official.plan != plan:
        line = (
            f"the LM's layers take encoder layers {_words(official.plan)} in the checkpoint's "
            f"config ({official.said}), {_words(plan)} in the recipe"
        )
        _refuse(file, [line])


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
