"""Attention written out and fused, and what a packed sequence has of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from epalm.model import attention, written_out
from epalm.model.masks import added_to_scores, prefix_mask, text_mask
from epalm.model.packing import Packing
from epalm.model.written_out import PackedAttention
from tests.conftest import tiny_opt

HEADS, KEY_HEADS, WIDTH, SCALING = 4, 2, 3, 0.7
TEXTS, TOKENS = 6, 4
OWNERS = {
    "of_three": torch.tensor([2, 0, 1, 2, 2, 0]),
    "of_two_and_none_of_another": torch.tensor([2, 0, 0, 2, 2, 0]),
    "one_of_each": torch.arange(TEXTS),
    "two_of_each": torch.arange(TEXTS) // 2,
    "not_in_order": torch.arange(TEXTS).flip(0),
    "of_one": None,
}


def packing(owner: torch.Tensor | None, length: int, dtype: torch.dtype) -> Packing:
    """Texts of 4, 3, 2 or 1 real tokens, padded on the left."""
    real = torch.tensor([[1] * 4, [0, 0, 1, 1], [1] * 4, [0, 1, 1, 1], [1] * 4, [0, 0, 0, 1]])
    return Packing(
        1 if owner is None else max(3, int(owner.max()) + 1),
        TEXTS,
        owner,
        added_to_scores(prefix_mask(length, real.device), dtype),
        added_to_scores(text_mask(length, real, TOKENS), dtype),
    )


def states(packed: Packing, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values (1, heads, N, d), in memory as a linear layer leaves them."""
    torch.manual_seed(0)
    count = packed.prefixes * packed.prefix_mask.shape[2] + TEXTS * TOKENS
    return [
        torch.randn(1, count, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def one_by_one(packed: Packing, *inputs: torch.Tensor) -> torch.Tensor:
    """Each prefix and each text by itself, by torch's own function: (1, N, heads, d)."""
    (q, q_text), (k, k_text), (v, v_text) = (packed.split(x.transpose(1, 2)) for x in inputs)
    owner = [0] * TEXTS if packed.owner is None else packed.owner.tolist()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, mask, scale=SCALING, enable_gqa=True)
        return out[0].transpose(0, 1)

    prefixes = [attend(*each, packed.prefix_mask[0]) for each in zip(q, k, v, strict=True)]
    texts = [
        attend(q_text[b], torch.cat((k[r], k_text[b])), torch.cat((v[r], v_text[b])), mask)
        for b, (r, mask) in enumerate(zip(owner, packed.text_mask, strict=True))
    ]
    return torch.cat([*prefixes, *texts])[None]


def wanted(packed: Packing) -> torch.Tensor:
    """(N, 1, 1) 0 for states of prefixes without texts, else 1."""
    length = packed.prefix_mask.shape[2]
    has_texts = torch.ones(1) if packed.owner is None else packed.owner.bincount().clamp(max=1)
    of_states = torch.cat((has_texts.repeat_interleave(length), torch.ones(TEXTS * TOKENS)))
    return of_states[:, None, None]


def ours(packed: Packing, *inputs: torch.Tensor) -> torch.Tensor:
    """As a layer of Hugging Face's calls it."""
    module = nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    attend: Callable[..., Any] = AttentionInterface()["epalm"]
    out: torch.Tensor = attend(module, *inputs, None, scaling=SCALING, packing=packed)[0]
    return out


@pytest.mark.parametrize("way", ["blocks kept", "states kept", "fused"])
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("owner", OWNERS)
def test_prefixes_and_texts_in_one_sequence(
    owner: str, length: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of each prefix and each text by itself, but for a prefix
    without texts, which is of no use to anybody."""
    if way == "fused":
        monkeypatch.setattr(attention, "WRITTEN_OUT_ON", set())
    if way == "states kept":
        monkeypatch.setattr(written_out, "_LITTLE", -1_000_000)
    packed = packing(OWNERS[owner], length, torch.float64)
    inputs = states(packed, torch.float64)
    found = []
    for attend in (ours, one_by_one):
        out = attend(packed, *inputs) * wanted(packed)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("owner", OWNERS)
def test_its_backward_pass_is_its_derivative(owner: str) -> None:
    packed = packing(OWNERS[owner], 2, torch.float64)
    inputs = states(packed, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: PackedAttention.apply(*x, packed, SCALING), inputs)


def test_in_bfloat16_it_is_as_exact_as_the_format() -> None:
    """Softmax and its gradient are made in float32: no error exceeds a few roundings."""
    wide = packing(OWNERS["of_three"], 3, torch.float32)
    narrow = packing(OWNERS["of_three"], 3, torch.bfloat16)
    inputs = states(wide, torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    found = []
    for packed, given in ((wide, [x.float() for x in rounded]), (narrow, rounded)):
        out = ours(packed, *given)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    for exact, mine in zip(*found, strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine.float() - exact).abs().max()
        assert error < 0.02 * exact.abs().max()


def test_the_lm_has_its_own_attention_again() -> None:
    lm = tiny_opt()
    with pytest.raises(ZeroDivisionError), attention.own_attention(lm):
        assert lm.config._attn_implementation == "epalm"
        raise ZeroDivisionError
    assert lm.config._attn_implementation == "sdpa"


def test_within_a_pass_it_stays() -> None:
    lm = tiny_opt()
    with attention.own_attention(lm):
        with attention.own_attention(lm):
            pass
        assert lm.config._attn_implementation == "epalm"
    assert lm.config._attn_implementation == "sdpa"
