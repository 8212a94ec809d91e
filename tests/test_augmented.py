"""The augmented LM on small random LMs: padding, caching and sharing change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from epalm.config import VariantConfig
from epalm.errors import EpalmError
from epalm.model import attention, layers
from epalm.model.augmented import AugmentedLM
from epalm.model.families import family_of
from epalm.model.injection import InjectionPlan
from epalm.train.loss import example_losses
from tests.conftest import tiny_llama, tiny_opt

VARIANTS = {
    "epalm": VariantConfig(encoder_layers=3, prompt_length=4),
    "pt": VariantConfig(encoder_layers=3, connection="shared", prompt_length=4, prompt_mlp=False),
    "lin": VariantConfig(encoder_layers=3, connection="shared", prompt_length=0),
    "from_first_layer": VariantConfig(
        encoder_layers=1, inject_start=0, inject_end=1, prompt_length=4
    ),
    "every_second": VariantConfig(encoder_layers=2, inject_start=2, text_step=2, prompt_length=2),
}


def tiny_lm(kind: str, **changes: Any) -> PreTrainedModel:
    """A random LM of 6 layers of a `model_type`, norms and biases random too."""
    torch.manual_seed(4)
    settings = {
        "vocab_size": 384,
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | changes))
    for parameter in lm.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return lm.eval()


LMS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": tiny_opt,
    "opt_post_norm": lambda: tiny_opt(do_layer_norm_before=False, word_embed_proj_dim=32),
    "llama": tiny_llama,  # and those like it: tests/test_families.py
    "gpt2": lambda: tiny_lm("gpt2"),
    "gpt_neox": lambda: tiny_lm("gpt_neox"),
}
# float32 sums in another order, through six layers of random weights ten times the usual size
FLOAT = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(params=LMS)
def lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    return LMS[request.param]()


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, lm: PreTrainedModel) -> AugmentedLM:
    torch.manual_seed(0)
    built = AugmentedLM.from_config(lm, VARIANTS[request.param], encoder_layers=4, encoder_dim=24)
    for parameter in built.trained["connection"].parameters():
        parameter.data *= 20  # so that the media decides the answer
    return built


@pytest.fixture
def batch(model: AugmentedLM) -> dict[str, torch.Tensor]:
    """Seven texts of four lengths about three of four media, the first two texts being equal."""
    torch.manual_seed(5)
    n = model.trained["connection"].levels
    lengths = [4, 4, 6, 3, 5, 6, 3]
    mask = torch.tensor([[0] * (6 - k) + [1] * k for k in lengths])
    ids = torch.randint(3, 384, mask.shape)
    ids[1] = ids[0]
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "features": torch.randn(4, n, 24),
        "rows": torch.tensor([0, 1, 1, 3, 0, 3, 3]),
    }


def alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One text of a batch by itself, without its padding."""
    real = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row][real][None],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
        "features": batch["features"][batch["rows"][row]][None],
        "rows": torch.tensor([0]),
    }


def own_features(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["features"][batch["rows"]]


def generate(model: AugmentedLM, batch: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """The eight new tokens of each text, whatever they are."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | options
    ids = model.generate(**batch, **settings)
    return ids[:, batch["input_ids"].shape[1] :]


LAYOUTS = {
    "packed": lambda patch: None,
    "lowest_layer_apart": lambda patch: patch.setattr(layers, "_MANY", 1),
    "fused_attention": lambda patch: patch.setattr(attention, "WRITTEN_OUT_ON", set()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_prefix_equals_the_joint_pass(
    model: AugmentedLM, batch: dict, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient: prefix once per media, in one sequence with the texts, against all
    at once.

    In float64; what is left comes from Llama's norms and rotations, which stay in float32.
    """
    LAYOUTS[layout](monkeypatch)
    model = model.double()
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100).roll(-1, 1)
    labels[:, -1] = -100
    grads = []
    for joint in (False, True):
        model.trained.zero_grad()
        if joint:
            states = model.joint_states(
                batch["input_ids"], batch["attention_mask"], own_features(batch)
            )[:, 1 + model.prompt_length :]
            kept = labels != -100
            losses = torch.nn.functional.cross_entropy(
                model.family.logits(states[kept]), labels[kept], reduction="sum"
            )
        else:
            losses = example_losses(model, batch["input_ids"], batch["attention_mask"], labels,
                                    batch["features"], batch["rows"])[0].sum()  # fmt: skip
        losses.backward()
        grads.append((losses.detach(), [p.grad.clone() for p in model.trained.parameters()]))
    (one, ours), (other, theirs) = grads
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    for mine, expected in zip(ours, theirs, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(mine / scale, expected / scale, atol=1e-6, rtol=0)


def test_the_last_states_alone_equal_the_whole(model: AugmentedLM, batch: dict) -> None:
    """States and gradients; the last layer's feed-forward part sees no other token."""
    rows: list[int] = []
    first, _ = model.family.feed_forward(len(model.family.layers) - 1)
    first.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    found = []
    for last in (None, 2):
        model.trained.zero_grad()
        states = model.states(**batch, last=last)[:, -2:]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        grads = [p.grad for p in model.trained.parameters()]
        found.append([states.detach(), *(g / g.abs().max() for g in grads)])
    assert rows == [batch["input_ids"].numel(), 2 * len(batch["input_ids"])]
    for whole, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, whole, **FLOAT)


def test_batch_and_padding_change_no_greedy_token(model: AugmentedLM, batch: dict) -> None:
    together = generate(model, batch)
    for row in range(len(together)):
        assert torch.equal(generate(model, alone(batch, row))[0], together[row])


def test_cached_and_recomputed_give_the_same_tokens(model: AugmentedLM, batch: dict) -> None:
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))


def test_beams_cached_and_recomputed_give_the_same_tokens(model: AugmentedLM, batch: dict) -> None:
    options = {"num_beams": 3, "length_penalty": 1.0}
    cached = generate(model, batch, **options)
    assert torch.equal(cached, generate(model, batch, use_cache=False, **options))
    first = {k: v[:1] for k, v in batch.items() if k != "features"} | {
        "features": batch["features"]
    }
    assert torch.equal(generate(model, first, **options)[0], cached[0])


def test_right_padding_gives_the_same_states(model: AugmentedLM, batch: dict) -> None:
    row = alone(batch, 3)
    padded = row | {
        "input_ids": torch.nn.functional.pad(row["input_ids"], (0, 2), value=1),
        "attention_mask": torch.nn.functional.pad(row["attention_mask"], (0, 2)),
    }
    with torch.no_grad():
        torch.testing.assert_close(model.states(**padded)[:, :3], model.states(**row), **FLOAT)


def test_the_media_decides_and_a_later_token_does_not(model: AugmentedLM, batch: dict) -> None:
    with torch.no_grad():
        before = model.states(**batch)
        other_media = model.states(**batch | {"rows": (batch["rows"] + 1) % 3})
        changed = batch["input_ids"].clone()
        changed[:, -1] = (changed[:, -1] + 7) % 300 + 3
        later = model.states(**batch | {"input_ids": changed})
    real = batch["attention_mask"].bool()
    assert (before - other_media)[real].abs().amax(dim=1).min() > 1e-3
    assert (before - later)[:, :-1].abs().max() == 0
    assert (before - later)[:, -1].abs().amax(dim=1).min() > 1e-5


def test_only_trained_parts_have_gradients(model: AugmentedLM) -> None:
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"trained.{name}" for name, _ in model.trained.named_parameters()}
    assert not any(module.training for module in model.lm.modules())


def test_a_bfloat16_lm_trains_float32_parts(lm: PreTrainedModel) -> None:
    """The LM held in bf16: same loss to its three digits, gradients and answers come out."""
    ids = torch.randint(3, 384, (2, 5))
    features, losses = torch.randn(2, 3, 24).half(), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = AugmentedLM.from_config(lm.to(dtype), VARIANTS["epalm"], 4, 24)
        sums, _ = example_losses(model, ids, torch.ones_like(ids), ids.roll(-1, 1), features)
        sums.sum().backward()
        losses.append(sums.sum().detach())
        for parameter in model.trained.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
        new = model.generate(ids, torch.ones_like(ids), features, max_new_tokens=2, do_sample=False)
        assert new.shape[1] > 5
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_text_alone_equals_the_untouched_lm(lm: PreTrainedModel) -> None:
    """The family's parts, called layer by layer without any prefix, are the LM."""
    ids = torch.randint(3, 384, (2, 7))
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    family = family_of(lm)
    positions = mask.cumsum(1) * mask - 1
    hidden = family.embed_text(ids, positions)
    call = family.layer_arguments(hidden, positions.new_zeros(0), positions, 0)
    seen = mask.bool()[:, None, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    seen = seen | torch.eye(7, dtype=torch.bool)
    with torch.no_grad():
        for layer in family.layers:
            hidden = layer(hidden, attention_mask=seen, **call)
        expected = lm(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
        if lm.config.model_type == "opt":
            expected = lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(family.logits(hidden)[mask.bool()], expected[mask.bool()], **FLOAT)


def test_unknown_family() -> None:
    lm = tiny_opt()
    lm.config.model_type = "mamba"
    with pytest.raises(EpalmError, match="LM family 'mamba' is not one of opt, llama"):
        family_of(lm)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"encoder_layers": 5}, "5 wanted, the encoder has 4"),
        ({"inject_start": 6}, "6 to 6 does not fit an LM of 6 layers"),
        ({"inject_end": 7}, "3 to 7 does not fit"),
        ({"inject_start": 4, "encoder_layers": 3}, "only 2 of the 3 encoder layers"),
        ({"inject_start": 3, "text_step": 2}, "3 is not divisible by text_step 2"),
    ],
)
def test_impossible_injections_are_refused(settings: dict, word: str) -> None:
    with pytest.raises(EpalmError, match=word):
        InjectionPlan.from_config(VariantConfig(**{"encoder_layers": 3} | settings), 6, 4)


def test_the_papers_injection() -> None:
    """Convention 3: OPT-2.7B, layers 19 to 31 of 32, six tokens, each for two layers."""
    plan = InjectionPlan.spread(32, 19, 31, 6)
    assert plan.start == 19
    assert plan.source[19:] == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, None)
