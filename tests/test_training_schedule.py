"""Groups and learning rates of the official code, as its own factory made them (schedule.json)."""

import json
from pathlib import Path
from typing import Any

import pytest

from epalm.config import TrainConfig, VariantConfig, load_recipe
from epalm.model.augmented import AugmentedLM
from epalm.train.optimiser import make_optimiser, set_learning_rates
from tests.conftest import tiny_opt

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "schedule.json").read_text(encoding="utf-8")
)
PAPER = Path(__file__).parents[1] / "recipes" / "paper"
ITERATIONS = 600  # of an epoch; the recorded warm-up ends before
RATES = {
    "epalm": {"lr": 2e-5, "warmup_lr": 1e-5, "min_lr": 1e-6, "prompt_lr": 1e-5, "epochs": 8},
    "pt": {"lr": 2e-4, "warmup_lr": 1e-4, "min_lr": 1e-5, "prompt_lr": 1e-3, "epochs": 35},
}
NAMES = {
    "connector.": "connection.linears.",
    "prompt_module.prefix_embedding.0.": "soft_prompt.embedding.",
    "prompt_module.prefix_embedding.1.": "soft_prompt.mlp.0.",
    "prompt_module.prefix_embedding.3.": "soft_prompt.mlp.2.",
}


def ours(name: str) -> str:
    (prefix,) = (p for p in NAMES if name.startswith(p))
    return NAMES[prefix] + name.removeprefix(prefix)


def config_of(case: str) -> TrainConfig:
    rates = RATES[case.split("_")[0]]
    return TrainConfig(
        steps=ITERATIONS * int(rates["epochs"]),
        schedule="official-caption" if case.endswith("caption") else "official",
        prompt_schedule="constant",
        **rates,
    )


@pytest.fixture(scope="module")
def model() -> AugmentedLM:
    variant = VariantConfig(encoder_layers=3, inject_start=1)
    return AugmentedLM.from_config(tiny_opt(), variant, encoder_layers=6, encoder_dim=24)


@pytest.mark.parametrize("case", GOLDEN)
def test_groups_and_weight_decay(model: AugmentedLM, case: str) -> None:
    name_of = {id(p): name for name, p in model.trained.named_parameters()}
    groups = make_optimiser(model, config_of(case)).param_groups
    held = [{name_of[id(p)] for p in group["params"]} for group in groups]
    assert held == [set(map(ours, names)) for names in GOLDEN[case]["groups"]]
    assert [group["weight_decay"] for group in groups] == GOLDEN[case]["weight_decay"]


@pytest.mark.parametrize("case", GOLDEN)
def test_learning_rates_at_every_recorded_iteration(model: AugmentedLM, case: str) -> None:
    config = config_of(case)
    optimiser = make_optimiser(model, config)
    recorded = {int(i): r for i, r in GOLDEN[case]["epoch0_lr_used_at_iteration"].items()}
    for epoch, rates in GOLDEN[case]["lr_in_epoch"].items():
        first = int(epoch) * ITERATIONS
        recorded |= {first: rates, first + ITERATIONS - 1: rates}
    assert len(recorded) >= 12 + 2 * (int(RATES[case.split("_")[0]]["epochs"]) - 1)
    for step, rates in recorded.items():
        set_learning_rates(optimiser, step, config)
        # both are computed in float64, in another order
        found = [group["lr"] for group in optimiser.param_groups]
        assert found == pytest.approx(rates, rel=1e-12), step


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda p: p.stem)
def test_paper_recipes_have_an_official_schedule(path: Path) -> None:
    train = load_recipe(path).train
    assert train.schedule in ("official", "official-caption")
    assert train.epochs is not None and train.steps >= 400 * train.epochs  # the stair has room


def test_a_short_epoch_leaves_the_stair_half_way(model: AugmentedLM) -> None:
    """Bug 28: a loader of at most 400 iterations never gets to the peak, then jumps to the wave."""
    config = config_of("epalm_8ep_qa").model_copy(update={"steps": 8 * 250})
    optimiser = make_optimiser(model, config)
    rates = []
    for step in (249, 250):
        set_learning_rates(optimiser, step, config)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1.5e-5, GOLDEN["epalm_8ep_qa"]["lr_in_epoch"]["1"][0]])
