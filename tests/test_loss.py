"""What a training step keeps in memory for its backward pass, and that it is enough."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from epalm.config import VariantConfig
from epalm.model.augmented import AugmentedLM
from epalm.model.families import family_of
from epalm.model.relu import lean_relus
from epalm.train import loss
from epalm.train.loss import example_losses
from tests.conftest import tiny_opt

TEXTS, LENGTH, FFN, VOCABULARY = 80, 6, 96, 384


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    """Texts about three media, learnt in all tokens: more labels than are made at once."""
    torch.manual_seed(0)
    lm = tiny_opt()
    assert (lm.config.ffn_dim, lm.config.vocab_size) == (FFN, VOCABULARY)
    variant = VariantConfig(encoder_layers=3, prompt_length=4)
    ids = torch.randint(3, VOCABULARY, (TEXTS, LENGTH))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    assert (labels != -100).sum() > 3 * loss._PIECE
    return {
        "model": AugmentedLM.from_config(lm, variant, 4, 24),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "features": torch.randn(3, 3, 24),
        "rows": torch.arange(TEXTS) % 3,
    }


def naive_losses(case: dict[str, Any]) -> torch.Tensor:
    """By plain autograd through the LM as Hugging Face has it."""
    model, labels = case["model"], case["labels"]
    states = model.joint_states(
        case["input_ids"], case["attention_mask"], case["features"][case["rows"]]
    )
    logits = model.family.logits(states[:, -LENGTH:])
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)


@dataclass(eq=False)
class Kept:
    """Lives as long as the graph that it is kept for."""

    tensor: torch.Tensor


def kept_and_gradients(case: dict[str, Any], naive: bool) -> tuple[list[torch.Tensor], list]:
    """Tensors kept for the backward pass, then losses and gradients; each text weighs otherwise."""
    alive: WeakSet[Kept] = WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    model = case["model"]
    model.trained.zero_grad()
    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        losses = naive_losses(case) if naive else example_losses(**case)[0]
    tensors = [kept.tensor for kept in alive]
    (losses * torch.linspace(-1, 2, TEXTS)).sum().backward()
    return tensors, [losses.detach(), *(p.grad.clone() for p in model.trained.parameters())]


def test_little_is_kept_and_it_is_enough(case: dict[str, Any]) -> None:
    kept, ours = kept_and_gradients(case, naive=False)
    kept_by_naive, expected = kept_and_gradients(case, naive=True)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)

    weights = {p.data_ptr() for p in case["model"].lm.parameters()}

    def formats(tensors: list[torch.Tensor], width: int) -> set[torch.dtype]:
        return {t.dtype for t in tensors if width in t.shape and t.data_ptr() not in weights}

    assert formats(kept_by_naive, FFN) == formats(kept_by_naive, VOCABULARY) == {torch.float32}
    assert formats(kept, FFN) == {torch.bool}
    assert not formats(kept, VOCABULARY)


# bfloat16: both round the logits' gradient to three digits, but not sums of it in the same places
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_in_pieces_is_as_at_once(dtype: torch.dtype, error: float) -> None:
    """Losses and the gradient of the states, for more labels than pieces and their parts have."""
    torch.manual_seed(1)
    family = family_of(tiny_opt().to(dtype).requires_grad_(False))
    count = loss._PIECE + loss._ROWS + 1
    states = torch.randn(count, family.hidden_size).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (count,))
    found = []
    for losses_of in (loss._InPieces.apply, loss._losses):
        losses = losses_of(states, labels, family)
        assert losses.dtype == torch.float32
        found.append((losses, *torch.autograd.grad(losses.sum(), states)))
    for mine, expected in zip(*found, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(mine / scale, expected / scale, atol=error, rtol=0)


def test_no_label_no_loss(case: dict[str, Any]) -> None:
    sums, counts = example_losses(**case | {"labels": torch.full_like(case["labels"], -100)})
    sums.sum().backward()
    assert sums.tolist() == counts.tolist() == [0] * TEXTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_relu_learns_nothing_from_zeros(dtype: torch.dtype) -> None:
    """Of either sign, as torch's own does."""
    relu = nn.ReLU()
    states = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 2.0], dtype=dtype, requires_grad=True)
    gradient = torch.tensor([3.0, 4, 5, 6, 7], dtype=dtype)
    (expected,) = torch.autograd.grad(relu(states), states, gradient)
    with lean_relus(relu):
        ours = relu(states * 1)
    assert torch.equal(ours, relu(states))
    assert torch.equal(torch.autograd.grad(ours, states, gradient)[0], expected)


def test_the_lms_relus_are_themselves_again(case: dict[str, Any]) -> None:
    lm = case["model"].lm
    relu = lm.model.decoder.layers[0].activation_fn

    def kept() -> torch.dtype:
        return relu(2 * torch.ones(3, requires_grad=True)).grad_fn.saved_tensors[0].dtype

    with pytest.raises(ZeroDivisionError), lean_relus(lm):
        assert kept() == torch.bool
        raise ZeroDivisionError
    assert "forward" not in vars(relu)
