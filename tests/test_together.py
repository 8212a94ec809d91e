"""Runs that train together end as they would have ended alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from epalm.config import AdapterConfig, Recipe, VariantConfig, load_recipe
from epalm.evaluate.scores import validate
from epalm.model.augmented import AugmentedLM
from epalm.model.prefix import Rows
from epalm.model.shared import SharedFeatures, SharedLM
from epalm.model.text import Equal
from epalm.train.loop import Training, train
from epalm.train.loss import losses_of
from epalm.train.parts import Parts
from epalm.train.run import Run
from epalm.train.text_states import open_text_states
from epalm.train.together import (
    SharedStepper,
    assemble_together,
    groups,
    join,
    train_together,
)
from tests.conftest import batches_of
from tests.test_augmented import LMS

ADAPTERS = "{reduction: 8}"
VARIANTS = {
    "lin": ("variant.prompt_length=0", "variant.connection=shared"),
    "lin-states": ("variant.prompt_length=0", "train.text_states=always"),
    "epalm": (),
    "ada": (
        "variant.prompt_length=0",
        f"variant.attention_adapters={ADAPTERS}",
        f"variant.feed_forward_adapters={ADAPTERS}",
    ),
    "all": (
        "variant.prompt_length=0",
        "variant.deep_prompt=2",
        "variant.feed_forward_adapters={reduction: 8, placement: scaled}",
        "train.accumulate=2",
        "train.clip_norm=0.5",
        "data.seed=null",
    ),
}
EVERYWHERE = AdapterConfig(reduction=8)
OWN = (("seed=1",), ("seed=2",), ("seed=1", "train.lr=3e-3", "train.weight_decay=0.2"))


@pytest.fixture(params=VARIANTS)
def recipes(
    request: pytest.FixtureRequest, prepare: Callable[..., Parts], tmp_path: Path
) -> list[Recipe]:
    """Three runs that differ in what is their own."""
    common = ("data.seed=0", "train.steps=4", "train.val_examples=2", *VARIANTS[request.param])
    prepare(*common)
    path = tmp_path / "toy.yaml"
    return [
        load_recipe(path, (*common, *own, f"name=run-{i}", f"runs={tmp_path}/together"))
        for i, own in enumerate(OWN)
    ]


def trainings(recipes: list[Recipe], max_steps: int | None = None) -> list[Training]:
    """In float64: where a gradient is nearly zero, AdamW makes much of float32's rounding."""
    found = []
    for recipe, own in zip(recipes, assemble_together(recipes), strict=True):
        own.model.double()
        batches = batches_of(own)
        batches.text_states = open_text_states(recipe, own.model, batches.texts)
        found.append(Training(Run.create(recipe), own, batches, validate, max_steps))
    return found


def in_folder(recipe: Recipe, name: str) -> Recipe:
    """The same run, in another folder of runs."""
    return recipe.model_copy(update={"runs": str(Path(recipe.runs).with_name(name))})


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.last) | {f"best.{k}": v for k, v in load_file(run.best).items()}


def lines(run: Run) -> list[tuple[int, float]]:
    kept = [{**line} for line in run.read_metrics()]
    return [(line["step"], line.get("loss", line.get("val_score"))) for line in kept]


def same(run: Run, other: Run) -> None:
    """Losses at each step, scores, final weights and optimiser state."""
    assert [step for step, _ in lines(run)] == [step for step, _ in lines(other)]
    for (_, one), (_, two) in zip(lines(run), lines(other), strict=True):
        assert one == pytest.approx(two, rel=1e-6)  # kept in float32
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("recipes", ["lin-states", "epalm", "ada", "all"], indirect=True)
def test_together_as_apart(recipes: list[Recipe]) -> None:
    apart = []
    for recipe in (in_folder(recipe, "apart") for recipe in recipes):
        (training,) = trainings([recipe])
        train(training)
        apart.append(training.run)
    train_together(trainings(recipes))
    ends = [weights(run) for run in apart]
    assert not any(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
    for recipe, run in zip(recipes, apart, strict=True):
        same(Run.of(recipe), run)


@pytest.mark.parametrize("recipes", ["epalm"], indirect=True)
def test_an_interrupted_group_goes_on(recipes: list[Recipe]) -> None:
    whole = [in_folder(recipe, "whole") for recipe in recipes]
    train_together(trainings(whole))
    train_together(trainings(recipes, max_steps=2))
    train_together(trainings(recipes[1:2], max_steps=3))
    assert [t.progress.step for t in trainings(recipes)] == [2, 3, 2]
    train_together(trainings(recipes))
    for recipe, other in zip(recipes, whole, strict=True):
        same(Run.of(recipe), Run.of(other))
    train_together(trainings(recipes))  # nothing is left to do


@pytest.mark.parametrize("recipes", ["epalm"], indirect=True)
def test_one_that_loses_patience_leaves_the_others(recipes: list[Recipe]) -> None:
    given = trainings([
        recipe.model_copy(update={"train": recipe.train.model_copy(
            update={"val_every": 1, "patience": 1})})
        for recipe in recipes
    ])  # fmt: skip
    for index, training in enumerate(given):
        scores = iter([0.5, 0.4 if index == 1 else 0.6, 0.7, 0.8])
        training.validate = lambda _, scores=scores: next(scores)
    train_together(given)
    assert [t.progress.step for t in given] == [4, 2, 4]


def test_gradients_are_each_runs_own(recipes: list[Recipe]) -> None:
    """Of the joined loss, and of each run's loss alone."""
    given = trainings(recipes)
    models = [training.parts.model for training in given]
    batches = [training.batches[0] for training in given]
    for model, batch in zip(models, batches, strict=True):
        losses_of(model, batch)[0].sum().backward()
    alone = [[p.grad for p in model.trained.parameters()] for model in models]
    for model in models:
        model.trained.zero_grad()
    sums, counts = losses_of(SharedStepper(given).model, join(batches))
    assert len(sums) == len(counts) == sum(len(batch.rows) for batch in batches)
    sums.sum().backward()
    for model, grads in zip(models, alone, strict=True):
        for parameter, grad in zip(model.trained.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recipes", ["lin"], indirect=True)
def test_what_trains_together(recipes: list[Recipe]) -> None:
    changed = {
        "prompt_lr": recipes[0].train.model_copy(update={"prompt_lr": 1e-3}),
        "betas": recipes[0].train.model_copy(update={"betas": (0.9, 0.99)}),
    }
    own = recipes[0].model_copy(update={"train": changed["prompt_lr"]})
    other = recipes[0].model_copy(update={"train": changed["betas"]})
    leaking = [
        recipe.model_copy(update={"variant": recipe.variant.model_copy(
            update={"mask": "reference"})})
        for recipe in recipes
    ]  # fmt: skip
    mixed = [recipes[0], other, recipes[1], leaking[0], own, leaking[1], recipes[2]]
    assert groups(mixed, 4) == [[0, 2, 4, 6], [1], [3], [5]]
    assert groups(mixed, 3) == [[0, 2, 4], [1], [3], [5], [6]]
    assert groups(mixed, 1) == [[i] for i in range(7)]


def test_a_sweep_trains_together(cli: Callable[..., Result], toy: Callable, tmp_path: Path) -> None:
    toy(train={"steps": 2, "val_examples": 1})
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: s\nbase: toy.yaml\nset: {data.seed: 0, evaluate.control: false}\nseeds: [0, 1]\n"
        "axes: {lr: {low: {train.lr: 1e-4}, high: {train.lr: 1e-2}}}\n"
    )
    done = cli("sweep", file, "--together", 3)
    assert done.exit_code == 0, done.output
    said = [line.split("/")[-1] for line in done.output.splitlines() if " of 4: " in line]
    assert said == ["s-low-0", "s-high-0", "s-low-1", "s-high-1"]
    for name in said:
        run = Run.open(tmp_path / "runs" / name)
        assert run.scores.is_file() and lines(run)[-1][0] == 2
        assert run.stages()["train"].seconds > 0
    assert "4 runs, 4 of them done" in cli("sweep", file, "--together", 3).output


@pytest.mark.parametrize("kind", [kind for kind in LMS if kind != "opt"])
def test_other_families(kind: str) -> None:
    """States of two runs' texts about one and two media, together and apart."""
    lm = LMS[kind]().double()
    variant = VariantConfig(encoder_layers=3, prompt_length=4, feed_forward_adapters=EVERYWHERE)
    models = [AugmentedLM.from_config(lm, variant, 4, 24).double() for _ in range(2)]
    torch.manual_seed(0)
    ids = torch.randint(3, 384, (4, 5))
    mask = torch.tensor([[1] * 5, [0, 1, 1, 1, 1], [1] * 5, [0, 0, 1, 1, 1]])
    features = [torch.randn(1, 3, 24).double(), torch.randn(2, 3, 24).double()]
    rows = torch.tensor([0, 0, 1, 2])
    equal = Equal.among(range(4))
    shared = SharedFeatures(features, Rows([1, 2], [2, 2], [2, 2]))
    with torch.no_grad():
        together = SharedLM(models).states(ids, mask, shared, rows, equal)
        apart = [
            model.states(ids[part], mask[part], own, rows[part] - first)
            for model, part, own, first in zip(
                models, (slice(0, 2), slice(2, 4)), features, (0, 1), strict=True
            )
        ]
    real = mask.bool()
    torch.testing.assert_close(together[real], torch.cat(apart)[real], rtol=1e-6, atol=1e-6)
