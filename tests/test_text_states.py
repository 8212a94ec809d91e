"""States of texts at the first injection layer, cached like features."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.errors import EpalmError
from epalm.extract.loop import extract
from epalm.store.maintenance import verify
from epalm.train import text_states
from epalm.train.batches import TrainingBatches
from epalm.train.loss import losses_of
from epalm.train.parts import Parts, assemble
from epalm.train.text_states import open_text_states
from tests.conftest import batches_of

LIN = ("variant.prompt_length=0", "variant.connection=shared")


@pytest.fixture
def prepare(toy: Callable[..., Path]) -> Callable[..., tuple[Parts, TrainingBatches]]:
    """Parts of a toy recipe of eP-ALM_lin, and its batches."""

    def build(*overrides: str) -> tuple[Parts, TrainingBatches]:
        recipe = load_recipe(toy(), (*LIN, *overrides))
        extract(recipe, load_dataset(recipe))
        parts = assemble(recipe)
        return parts, batches_of(parts)

    return build


def losses_and_gradients(parts: Parts, batches: TrainingBatches) -> list[torch.Tensor]:
    """Of two steps' batches."""
    found = []
    for step in (0, 5):
        parts.model.trained.zero_grad()
        sums, _ = losses_of(parts.model, batches[step])
        sums.sum().backward()
        found += [sums.detach(), *(p.grad.clone() for p in parts.model.trained.parameters())]
    return found


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_same_loss_and_gradients_with_half_the_lm(prepare: Callable, backend: str) -> None:
    parts, batches = prepare("train.steps=100", f"store.backend={backend}")
    expected = losses_and_gradients(parts, batches)
    batches.text_states = open_text_states(parts.recipe, parts.model, batches.texts)
    called: list[int] = []
    for number, layer in enumerate(parts.model.family.layers):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    found = losses_and_gradients(parts, batches)
    assert set(called) == set(parts.model.upper)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_they_are_computed_once_and_again_where_they_are_broken(
    prepare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, batches = prepare("train.steps=100")
    texts = batches.texts()
    # as if it were interrupted
    states = open_text_states(parts.recipe, parts.model, lambda: texts[:9])
    first = states.fetch(texts[:9])
    states = open_text_states(parts.recipe, parts.model, lambda: texts)
    assert torch.equal(states.fetch(texts[:9])[:, -first.shape[1] :], first)
    assert verify(states.features, lambda shards: shards) == []
    monkeypatch.setattr(text_states.TextStates, "_states", None)
    again = open_text_states(parts.recipe, parts.model, lambda: texts)
    assert torch.equal(again.fetch(texts), states.fetch(texts))


def test_other_weights_have_other_states(prepare: Callable, opt_folder: Path) -> None:
    parts, _ = prepare()
    one = text_states.text_spec(parts.recipe, parts.model)
    changed = opt_folder.parent / "changed"
    parts.model.lm.save_pretrained(changed)
    with (changed / "config.json").open("a") as config:
        config.write("\n")
    lm = parts.recipe.lm.model_copy(update={"weights": str(changed)})
    other = text_states.text_spec(parts.recipe.model_copy(update={"lm": lm}), parts.model)
    assert list(one.differing(other)) == ["weights"]


def test_where_they_are_kept(prepare: Callable) -> None:
    parts, batches = prepare("train.steps=1")
    texts = batches.texts()
    assert open_text_states(parts.recipe, parts.model, lambda: texts) is None  # not worth it
    parts, _ = prepare("train.steps=1", "train.text_states=always")
    assert open_text_states(parts.recipe, parts.model, lambda: texts) is not None
    parts, _ = prepare("train.steps=100", "train.text_states=never")
    assert open_text_states(parts.recipe, parts.model, lambda: texts) is None
    parts, _ = prepare("train.steps=100", "variant.prompt_length=2")
    assert open_text_states(parts.recipe, parts.model, lambda: texts) is None


@pytest.mark.parametrize(
    "override", ["variant.prompt_length=2", "variant.inject_start=0", "variant.mask=reference"]
)
def test_insisting_where_they_change_is_an_error(prepare: Callable, override: str) -> None:
    parts, batches = prepare("train.text_states=always", override)
    with pytest.raises(EpalmError, match=r"train\.text_states: always, but this variant"):
        open_text_states(parts.recipe, parts.model, batches.texts)
