"""Linear layers give what they gave before, when they compute otherwise; from prepacked weights to
the last bit."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from epalm.config import VariantConfig
from epalm.model import in_pieces
from epalm.model import linears as module
from epalm.model.augmented import AugmentedLM
from epalm.model.in_pieces import InPieces
from epalm.model.linears import linears_in, own_linears
from epalm.model.prepacked import Prepacked
from epalm.model.relu import lean_relus
from epalm.train.loss import example_losses
from tests.conftest import tiny_llama, tiny_opt

pytestmark = pytest.mark.skipif(
    not module._supported(), reason="this processor has no instructions for it"
)
TEXTS, TOKENS, LAYERS, DIM = 3, 5, 4, 20
VARIANT = VariantConfig(encoder_layers=2, prompt_length=2)


def linear(width: int = 40, out: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(torch.bfloat16).requires_grad_(False)


def kept(linear: nn.Linear) -> Prepacked:
    return module._kept[linear][Prepacked].products


def computes_otherwise(linear: nn.Linear) -> bool:
    return "forward" in vars(linear)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 7, 40), (0, 40), (300, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_the_same(shape: tuple[int, ...], bias: bool) -> None:
    lin = linear(bias=bias)
    states = torch.randn(shape).to(torch.bfloat16).requires_grad_()
    same = states.detach().clone().requires_grad_()
    plain = lin(states)
    with own_linears(lin, 1):
        assert computes_otherwise(lin)
        ours = lin(same)
    gradient = torch.randn_like(plain)
    plain.backward(gradient)
    ours.backward(gradient)
    assert torch.equal(plain, ours) and torch.equal(states.grad, same.grad)


def test_states_need_not_lie_side_by_side() -> None:
    lin, states = linear(), torch.randn(40, 6).to(torch.bfloat16).t()
    gradient = torch.ones(1, dtype=torch.bfloat16).expand(6, 24)
    states.requires_grad_()
    (expected,) = torch.autograd.grad(lin(states), states, gradient)
    with own_linears(lin, 6):
        out = lin(states)
    assert torch.equal(out, lin(states))
    assert torch.equal(torch.autograd.grad(out, states, gradient)[0], expected)


def test_only_frozen_bfloat16_layers() -> None:
    trained = linear().requires_grad_()
    wide = linear().float()
    frozen = linear()
    every = nn.ModuleList((trained, wide, frozen))
    with own_linears(every, 1):
        assert [computes_otherwise(each) for each in every] == [False, False, True]


@pytest.mark.parametrize("tiles", [True, False])
def test_with_many_tokens_only_where_there_are_tiles(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_tiles", lambda: tiles)
    lin = linear()
    for tokens, kind in ((module._MANY - 1, Prepacked), (module._MANY, InPieces)):
        with own_linears(lin, tokens):
            assert computes_otherwise(lin) == (tiles or kind is Prepacked)
        assert (kind in module._kept[lin]) == (tiles or kind is Prepacked)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [(0,), (256,), (3, 100), (2, 255), (600,)])
@pytest.mark.parametrize("bias", [True, False])
def test_in_pieces(
    rows: tuple[int, ...], bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of about as many rows as columns, forwards 280 and backwards 256, and of twice as many."""
    monkeypatch.setattr(module, "_has_tiles", lambda: True)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    lin = linear(256, 280, bias)
    states = torch.randn(*rows, 256).to(torch.bfloat16).requires_grad_()
    with own_linears(lin, module._MANY):
        ours = lin(states)
    gradient = torch.randn_like(ours)
    (of_states,) = torch.autograd.grad(ours, states, gradient)
    expected = lin(states)
    (of_same,) = torch.autograd.grad(expected, states, gradient)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(of_states, of_same)


@pytest.mark.parametrize("tokens", [1, module._MANY])
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("memory", [True, False])
def test_with_the_relu_after_it(
    rows: int, tokens: int, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_tiles", lambda: True)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    if not memory:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1, available=0))
    layer = nn.Module()
    layer.fc1, layer.activation_fn = linear(40, 280), nn.ReLU()
    states = torch.randn(rows, 40).to(torch.bfloat16).requires_grad_()
    found = []
    with own_linears(layer, tokens) as done, lean_relus(layer, done):
        assert done == {layer.activation_fn}
        found.append(layer.fc1(states))
        assert found[0].min() == 0
        found.append(layer.activation_fn(found[0]))
    expected = layer.activation_fn(layer.fc1(states))
    gradient = torch.randn_like(expected)
    of_expected, of_ours = (
        torch.autograd.grad(out, states, gradient)[0] for out in (expected, found[1])
    )
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(of_ours, of_expected)


@pytest.mark.parametrize(
    "rows, columns, pieces",
    [(0, 768, 1), (691, 768, 1), (692, 768, 2), (1200, 768, 2), (1399, 768, 3), (1400, 768, 1)]
    + [(1151, 576, 3), (1152, 576, 1), (1200, 1024, 2), (1200, 1025, 1), (256, 255, 1)],
)
def test_where_a_product_is_made_in_pieces(
    rows: int, columns: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads, expected in ((1, 1), (2, pieces), (3, 1)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert in_pieces._pieces(rows, columns) == expected


def test_a_layer_is_itself_again() -> None:
    lin = linear()
    with pytest.raises(ZeroDivisionError), own_linears(lin, 1):
        raise ZeroDivisionError
    assert not computes_otherwise(lin)


def test_a_pass_within_a_pass() -> None:
    lin, states = linear(), torch.randn(2, 40).to(torch.bfloat16)
    with own_linears(lin, 1):
        with own_linears(lin, 1):
            inner = lin(states)
        assert computes_otherwise(lin)
    assert torch.equal(inner, lin(states))


def test_changed_weights_count() -> None:
    lin, states = linear(), torch.randn(2, 40).to(torch.bfloat16)
    for change in (
        lambda: lin.weight.mul_(2),
        lambda: lin.load_state_dict({n: -t for n, t in lin.state_dict().items()}),
        lambda: setattr(lin, "weight", nn.Parameter(lin.weight + 1, requires_grad=False)),
        lambda: setattr(lin, "bias", nn.Parameter(lin.bias + 1, requires_grad=False)),
    ):
        with own_linears(lin, 1):
            lin(states)
        change()
        with own_linears(lin, 1):
            ours = lin(states)
        assert torch.equal(ours, lin(states))


def test_without_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(total=1000, available=250)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    lin = linear()
    states = torch.randn(2, 40).to(torch.bfloat16).requires_grad_()
    with own_linears(lin, 1):
        out = lin(states)
    out.sum().backward()
    assert torch.equal(out, lin(states)) and states.grad is not None
    assert set(kept(lin)._by_direction.values()) == {None}


def test_what_is_kept_goes_with_the_layer() -> None:
    lm = nn.Sequential(linear())
    with own_linears(lm, 1):
        lm(torch.randn(2, 40).to(torch.bfloat16))
    ours = weakref.ref(kept(lm[0]))
    del lm
    gc.collect()
    assert ours() is None


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
@pytest.mark.parametrize("kind", [Prepacked, InPieces])
def test_a_training_step_and_generation(
    make: Callable[[], PreTrainedModel], kind: module._Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and answers, with and without, of all linear layers of an LM."""
    monkeypatch.setattr(module, "_has_tiles", lambda: True)
    if kind is InPieces:
        monkeypatch.setattr(module, "_MANY", 1)
    lm = make().to(torch.bfloat16)
    torch.manual_seed(0)
    model = AugmentedLM.from_config(lm, VARIANT, LAYERS, DIM)
    features = torch.randn(TEXTS, VARIANT.encoder_layers, DIM)
    ids = torch.randint(3, 300, (TEXTS, TOKENS))
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(module, "OWN_LINEARS_ON", devices)
        model.zero_grad()
        sums, _ = example_losses(model, ids, torch.ones_like(ids), ids.clone(), features)
        sums.sum().backward()
        gradients = [p.grad for p in model.trained.parameters()]
        answers = model.generate(ids, None, features, max_new_tokens=4, do_sample=False)
        found.append((sums.detach(), *gradients, answers))
    for with_it, without in zip(*found, strict=True):
        assert torch.equal(with_it, without)
    used = [linear for linear in linears_in(lm) if linear in module._kept]
    assert used == linears_in(lm)
    assert all([*module._kept[linear]] == [kind] for linear in used)
    if kind is Prepacked:
        assert all(len(kept(linear)._by_direction) == 2 for linear in used)
