"""Adapters, deep prompts, a trained LM, several perceptual tokens, free levels: each of them leaves
padding, caching, sharing and causality as they are, and trains what it says and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from epalm.config import AdapterConfig, TrainConfig, VariantConfig
from epalm.errors import EpalmError
from epalm.model.adapters import Adapter, Adapters
from epalm.model.augmented import AugmentedLM
from epalm.model.connection import Connection
from epalm.model.families import FAMILIES, family_of
from epalm.model.injection import InjectionPlan
from epalm.model.variant import word_norm
from epalm.train.checkpoint import load_weights, save_weights
from epalm.train.loss import example_losses
from epalm.train.optimiser import make_optimiser, set_learning_rates
from epalm.train.progress import Progress
from tests.conftest import tiny_llama, tiny_opt
from tests.test_augmented import alone, generate, tiny_lm

LMS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": tiny_opt,
    "opt_post_norm": lambda: tiny_opt(do_layer_norm_before=False, word_embed_proj_dim=32),
    "llama": tiny_llama,
}
BOTH = {
    "attention_adapters": {"reduction": 8, "layer_norm": True},
    "feed_forward_adapters": {"reduction": 4},
}
BESIDE = {
    "attention_adapters": {"reduction": 8, "placement": "scaled"},
    "feed_forward_adapters": {"reduction": 8, "placement": "parallel", "layer_norm": True},
}
AT_INPUT = {"inject_start": 0, "inject_end": 1, "encoder_layers": 1, "prompt_length": 0}
# settings of VariantConfig, and tokens kept of an encoder layer
VARIANTS: dict[str, tuple[dict, int]] = {
    "ada": ({"encoder_layers": 3, "prompt_length": 0} | BOTH, 1),
    "ada_above": (
        {"encoder_layers": 3, "prompt_length": 0, "inject_start": 3,
         "attention_adapters": {"reduction": 8, "start": 4},
         "feed_forward_adapters": {"reduction": 4, "start": 3}},
        1,
    ),
    "beside_with_prompt": ({"encoder_layers": 3, "prompt_length": 3} | BESIDE, 1),
    "deep": (
        {"encoder_layers": 3, "prompt_length": 0, "deep_prompt": 3, "prompt_mlp": False}, 1
    ),
    "2024": (
        {"encoder_layers": 2, "connection": "shared", "inject_start": -4, "inject_end": -2,
         "token_norm": "lm", "token_affine": True, "prompt_length": 4},
        1,
    ),
    "magma": (AT_INPUT | BOTH, 1),
    "magma_all": (AT_INPUT | BOTH, 5),
    "all_tokens_above": ({"encoder_layers": 2, "inject_start": 2, "prompt_length": 2}, 3),
    "levels": ({"levels": {1: 3, 2: 0, 4: 3}, "encoder_layers": 2, "prompt_length": 2}, 1),
    "train_lm": ({"encoder_layers": 3, "prompt_length": 2, "train_lm": True}, 1),
    "everything": (
        {"levels": {2: 1, 5: 3}, "encoder_layers": 2, "prompt_length": 0, "deep_prompt": 2,
         "token_norm": "rms", "token_affine": True, "train_lm": True} | BESIDE,
        2,
    ),
}  # fmt: skip
Batch = dict[str, torch.Tensor]


@pytest.fixture(params=LMS)
def lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    return LMS[request.param]()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def build(lm: PreTrainedModel, variant: str, seed: int = 0) -> AugmentedLM:
    """Trained parts so large that all of them matter."""
    torch.manual_seed(seed)
    config = VariantConfig(**VARIANTS[variant][0])
    built = AugmentedLM.from_config(lm, config, encoder_layers=4, encoder_dim=24)
    for linear in built.trained["connection"].linears:
        linear.weight.data *= 20
    for module in built.trained.get_submodule("").modules():
        if isinstance(module, Adapter):
            for linear in module.layers:
                if isinstance(linear, nn.Linear):
                    linear.weight.data.normal_(std=0.2)
                    linear.bias.data.normal_(std=0.2)
    return built


@pytest.fixture
def model(lm: PreTrainedModel, variant: str) -> AugmentedLM:
    return build(lm, variant)


@pytest.fixture
def batch(variant: str) -> Batch:
    """Six texts of four lengths about three media, the first two texts being equal."""
    settings, tokens = VARIANTS[variant]
    torch.manual_seed(5)
    lengths = [4, 4, 6, 3, 5, 6]
    mask = torch.tensor([[0] * (6 - k) + [1] * k for k in lengths])
    ids = torch.randint(3, 384, mask.shape)
    ids[1] = ids[0]
    features = torch.randn(3, settings["encoder_layers"], tokens, 24)
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "features": features.squeeze(2),
        "rows": torch.tensor([0, 1, 1, 2, 0, 2]),
    }


def labels_of(batch: Batch) -> torch.Tensor:
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100).roll(-1, 1)
    labels[:, -1] = -100
    # nothing is asked of a pad: a trained LM's embedding has no gradient for it (padding_idx)
    return torch.where(batch["attention_mask"].bool(), labels, -100)


def shared_loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
    return example_losses(model, batch["input_ids"], batch["attention_mask"], labels_of(batch),
                          batch["features"], batch["rows"])[0].sum()  # fmt: skip


def joint_loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
    labels = labels_of(batch)
    features = batch["features"][batch["rows"]]
    states = model.joint_states(batch["input_ids"], batch["attention_mask"], features)
    states = states[:, -labels.shape[1] :]
    logits = model.family.logits(states[labels != -100])
    return nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum")


def hooks_of(lm: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())


def test_shared_prefix_equals_the_joint_pass(model: AugmentedLM, batch: Batch) -> None:
    """Loss and every gradient, in float64; Llama's norms and rotations stay in float32."""
    model = model.double()
    grads = []
    for loss_of in (shared_loss, joint_loss):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        grads.append((loss.detach(), {n: p.grad for n, p in model.trained.named_parameters()}))
    (one, ours), (other, theirs) = grads
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    for name, expected in theirs.items():
        scale = expected.abs().max()
        # no gradient moves keys' biases: softmax does not see them
        assert scale > 1e-6 or "k_proj.bias" in name, name
        if scale > 1e-6:
            torch.testing.assert_close(ours[name] / scale, expected / scale, atol=2e-6, rtol=0)


@pytest.mark.parametrize("norm_before", [True, False])
def test_gradients_are_the_slopes_of_the_loss(
    norm_before: bool, variant: str, batch: Batch
) -> None:
    """Nothing is detached on the way: against central differences, part by part, in float64."""
    lm = tiny_opt() if norm_before else LMS["opt_post_norm"]()
    lm.config.activation_function = "gelu"
    for layer in lm.model.decoder.layers:
        layer.activation_fn = nn.GELU()  # ReLU has corners
    model = build(lm, variant).double()
    for module in model.trained.modules():
        if isinstance(module, Adapter):
            module.layers = nn.Sequential(
                *(nn.GELU() if isinstance(m, nn.ReLU) else m for m in module.layers)
            )
    shared_loss(model, batch).backward()
    for name, part in model.trained.items():
        values = nn.utils.parameters_to_vector(part.parameters()).detach()
        slopes = torch.cat([p.grad.flatten() for p in part.parameters()])
        step = torch.nn.functional.normalize(torch.randn_like(values), dim=0) * 1e-6
        losses = []
        with torch.no_grad():
            for moved in (values + step, values - step, values):
                nn.utils.vector_to_parameters(moved, part.parameters())
                losses.append(float(shared_loss(model, batch)))
        slope = float(slopes @ step) / 1e-6
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_batch_and_padding_change_no_greedy_token(model: AugmentedLM, batch: Batch) -> None:
    together = generate(model, batch)
    for row in range(len(together)):
        assert torch.equal(generate(model, alone(batch, row))[0], together[row])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 1.0}])
def test_cached_and_recomputed_give_the_same_tokens(
    model: AugmentedLM, batch: Batch, options: dict
) -> None:
    cached = generate(model, batch, **options)
    assert torch.equal(cached, generate(model, batch, use_cache=False, **options))


def test_the_media_decides_and_a_later_token_does_not(model: AugmentedLM, batch: Batch) -> None:
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


def test_each_kept_token_matters(model: AugmentedLM, batch: Batch) -> None:
    features = batch["features"]
    with torch.no_grad():
        before = model.states(**batch)
        for token in range(features.shape[2] if features.ndim == 4 else 0):
            changed = features.clone()
            changed[:, :, token] += 1
            after = model.states(**batch | {"features": changed})
            assert (before - after)[batch["attention_mask"].bool()].abs().max() > 1e-3


def test_only_declared_parts_are_trained_and_the_lm_alone_is_as_it_was(
    lm: PreTrainedModel, variant: str, batch: Batch
) -> None:
    ids = batch["input_ids"][2:3]
    with torch.no_grad():
        untouched = lm(ids).logits
    frozen = {name: value.clone() for name, value in lm.state_dict().items()}
    model = build(lm, variant)
    declared = {id(p) for p in model.trained.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == declared
    assert not any(module.training for module in lm.modules())
    optimiser = make_optimiser(model, TrainConfig(steps=1))
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(declared)
    before = [p.clone() for p in model.trained.parameters()]
    set_learning_rates(optimiser, 0, TrainConfig(steps=1, warmup=0, lr=1e-2))
    shared_loss(model, batch).backward()
    generate(model, batch)
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, untouched)
    optimiser.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.trained.parameters(),
                                                     strict=True))  # fmt: skip
    assert hooks_of(lm) == 0
    trained_lm = VARIANTS[variant][0].get("train_lm", False)
    same = all(torch.equal(value, frozen[name]) for name, value in lm.state_dict().items())
    assert same != trained_lm


def test_each_part_has_its_learning_rate() -> None:
    """Appendices A and D.1: prompts and adapters may stay constant, a trained LM has its own."""
    config = TrainConfig(
        steps=11, warmup=0, lr=1.0, prompt_lr=0.7, lm_lr=0.01, prompt_schedule="constant"
    )
    found = {}
    for variant in ("everything", "beside_with_prompt"):
        model = build(tiny_opt(), variant)
        optimiser = make_optimiser(model, config)
        set_learning_rates(optimiser, 5, config)
        found |= zip(model.trained, (g["lr"] for g in optimiser.param_groups), strict=True)
    half = pytest.approx(0.5)
    assert found.pop("lm") == pytest.approx(0.005)
    assert found.pop("connection") == half
    assert found == dict.fromkeys(("deep_prompt", "soft_prompt", "adapters"), 0.7)
    config = TrainConfig(steps=11, warmup=0, lr=1.0)
    set_learning_rates(optimiser, 5, config)
    assert [g["lr"] for g in optimiser.param_groups] == [half] * 3
    prompts_follow = TrainConfig(steps=11, warmup=0, lr=1.0, prompt_lr=0.4)
    set_learning_rates(optimiser, 5, prompts_follow)
    assert optimiser.param_groups[1]["lr"] == optimiser.param_groups[2]["lr"] == pytest.approx(0.2)


def test_saved_and_loaded(lm: PreTrainedModel, variant: str, batch: Batch, tmp_path: Path) -> None:
    model = build(lm, variant)
    with torch.no_grad():
        expected = model.states(**batch)
    path = tmp_path / "best.safetensors"
    save_weights(path, model, Progress(3, 0.5, 2))
    assert load_file(path).keys() == {f"trained.{n}" for n, _ in model.trained.named_parameters()}
    for parameter in model.trained.parameters():
        parameter.data += 1
    other = build(type(lm)(lm.config).eval() if "lm" in model.trained else lm, variant, seed=9)
    assert load_weights(path, other) == Progress(3, 0.5, 2)
    with torch.no_grad():
        assert torch.equal(other.states(**batch), expected)


def test_checkpoints_of_other_variants_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, build(tiny_opt(), "ada"), Progress())
    with pytest.raises(EpalmError, match="fit the recipe's variant: adapters.* has no place"):
        load_weights(path, build(tiny_opt(), "2024"))
    save_weights(path, build(tiny_opt(), "2024"), Progress())
    with pytest.raises(EpalmError, match="fit the recipe's variant: adapters.* is missing"):
        load_weights(path, build(tiny_opt(), "ada"))


@pytest.mark.parametrize("variant", ["ada", "beside_with_prompt", "deep", "2024"])
def test_a_bfloat16_lm_trains_float32_parts(
    lm: PreTrainedModel, variant: str, batch: Batch
) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = VariantConfig(**VARIANTS[variant][0])
        model = AugmentedLM.from_config(lm.to(dtype), config, 4, 24)
        loss = shared_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        for parameter in model.trained.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
        assert generate(model, batch).shape == (6, 8)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_a_half_precision_lm_is_not_trained() -> None:
    config = VariantConfig(encoder_layers=3, train_lm=True)
    with pytest.raises(EpalmError, match="lm.dtype: torch.bfloat16 is too coarse"):
        AugmentedLM.from_config(tiny_opt().to(torch.bfloat16), config, 4, 24)


@pytest.mark.parametrize("placement", ["sequential", "parallel", "scaled"])
@pytest.mark.parametrize("kind", [*FAMILIES, "opt_post_norm"])
def test_adapters_add_what_their_placement_says(kind: str, placement: str) -> None:
    """In one layer of every family, against the formulas of model/adapters.py."""
    lm = LMS[kind]() if kind in LMS else tiny_lm(kind)
    family = family_of(lm)
    config = AdapterConfig(reduction=4, placement=placement, layer_norm=True)
    adapters = Adapters(family, config, config)
    attention, (first, last) = family.attention(2), family.feed_forward(2)
    hidden = torch.randn(2, 5, 48)
    call = family.layer_arguments(hidden, torch.arange(0), torch.arange(5).expand(2, -1), 0)

    def run() -> dict[str, torch.Tensor]:
        """What entered and left the layer and its sub-layers."""
        seen: dict[str, torch.Tensor] = {}

        def note(name: str, value: object) -> None:
            seen[name] = value[0] if isinstance(value, tuple) else value

        hooks = [
            attention.register_forward_pre_hook(
                lambda _, args, named: note("x", args or named["hidden_states"]), with_kwargs=True
            ),
            attention.register_forward_hook(lambda _, args, output: note("f(x)", output)),
            first.register_forward_pre_hook(lambda _, args: note("y", args)),
            last.register_forward_hook(lambda _, args, output: note("g(y)", output)),
        ]
        seen["out"] = family.layers[2](hidden, attention_mask=None, **call)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():
        for adapter in (adapters.attention["2"], adapters.feed_forward["2"]):
            adapter.layers[-1].bias += torch.randn(48)
            if placement == "scaled":
                adapter.scale *= 3
        plain = run()
        with adapters.attached(family, range(2, 3)):
            adapted = run()
        again = run()
        times = 3 if placement == "scaled" else 1
        x, f = plain["x"], plain["f(x)"]
        added = adapters.attention["2"].layers(f if placement == "sequential" else x) * times
        torch.testing.assert_close(adapted["f(x)"], f + added)
        y = adapted["y"]
        middle = [] if first is last else [lm.model.decoder.layers[2].activation_fn, last]
        g = nn.Sequential(first, *middle)(y)
        added = adapters.feed_forward["2"].layers(g if placement == "sequential" else y) * times
        torch.testing.assert_close(adapted["g(y)"], g + added)
    assert (plain["out"] - adapted["out"]).abs().max() > 0.1
    assert torch.equal(plain["out"], again["out"])
    assert hooks_of(lm) == 0


def test_adapters_start_as_the_official_ones(lm: PreTrainedModel) -> None:
    """Convention 9: N(0, 1e-3), clamped; so the LM starts almost as it is."""
    adapter = Adapter(4096, AdapterConfig(reduction=8))
    weight = adapter.layers[0].weight.detach()
    assert weight.shape == (512, 4096)
    assert weight.abs().max() == pytest.approx(2e-3)
    assert 0.04 < (weight.abs() == weight.abs().max()).float().mean() < 0.05  # 4.55 % beyond two
    assert weight.std() == pytest.approx(0.96e-3, rel=0.02)
    with pytest.raises(EpalmError, match="reduction 99 leave nothing of the LM's width 48"):
        Adapters(family_of(lm), AdapterConfig(reduction=99), AdapterConfig())
    with pytest.raises(EpalmError, match="start at LM layer 6 wanted, there are 0 to 5"):
        Adapters(family_of(lm), AdapterConfig(), AdapterConfig(reduction=8, start=6))


def test_hooks_are_gone_after_a_failure(lm: PreTrainedModel) -> None:
    model = build(lm, "beside_with_prompt")
    with pytest.raises(RuntimeError):
        model.states(torch.tensor([[3, 4]]), torch.ones(1, 2).long(), torch.randn(1, 3, 7))
    broken = family_of(lm).layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.states(torch.tensor([[3, 4]]), torch.ones(1, 2).long(), torch.randn(1, 3, 24))
    broken.remove()
    assert hooks_of(lm) == 0


def test_deep_prompts_stand_at_the_input_of_every_layer(lm: PreTrainedModel) -> None:
    model = build(lm, "deep")
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for layer in model.family.layers
    ]
    ids = torch.tensor([[5, 6, 7]])
    model.joint_states(ids, torch.ones_like(ids), torch.randn(1, 3, 24))
    for hook in hooks:
        hook.remove()
    for index, states in enumerate(seen):
        token = int(index >= model.plan.start)
        assert states.shape[1] == token + 3 + 3
        assert torch.equal(states[0, token : token + 3], model.trained["deep_prompt"]()[index])


def test_perceptual_tokens_as_long_as_words(lm: PreTrainedModel) -> None:
    model = build(lm, "2024")
    features = torch.randn(5, 2, 24)
    lengths = model.trained["connection"](features).norm(dim=-1)
    assert torch.allclose(lengths, torch.full_like(lengths, word_norm(lm)))
    if lm.config.model_type == "llama":
        expected = lm.get_input_embeddings().weight.norm(dim=1).mean()
        assert word_norm(lm) == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        model.trained["connection"].scale[1] *= 2
        model.trained["connection"].bias[0] += 1
        free = Connection(2, 24, 48, shared=True)
        free.load_state_dict(
            {k: v for k, v in model.trained["connection"].state_dict().items() if "linears" in k}
        )
        tokens = nn.functional.normalize(free(features), dim=-1) * word_norm(lm)
        tokens[:, 1] *= 2
        tokens[:, 0] += 1
        torch.testing.assert_close(model.trained["connection"](features), tokens)


def test_free_levels() -> None:
    config = VariantConfig(levels={0: 11, 3: 2, 5: 11}, encoder_layers=2)
    plan = InjectionPlan.from_config(config, 6, 12)
    assert plan.source == (1, None, None, 0, None, 1)
    assert plan.start == 0
    with pytest.raises(EpalmError, match="LM layer 5 wanted, there are 0 to 4"):
        InjectionPlan.from_config(config, 5, 12)
    with pytest.raises(EpalmError, match="encoder layer 11 wanted, there are 0 to 10"):
        InjectionPlan.from_config(config, 6, 11)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": {0: 11}}, "levels names 1 encoder layers, encoder_layers says 6"),
        ({"levels": {}, "encoder_layers": 1}, "at least one LM layer"),
        ({"levels": {0: 11}, "encoder_layers": 1, "inject_end": 3}, "leave out inject_start"),
        ({"deep_prompt": 10}, "set prompt_length to 0"),
        ({"attention_adapters": {"placement": "before"}}, "'sequential', 'parallel' or 'scaled'"),
    ],
)
def test_contradictions_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        VariantConfig(**settings)


def test_layers_counted_from_the_top() -> None:
    config = VariantConfig(encoder_layers=6, inject_start=-9, inject_end=-3)
    plan = InjectionPlan.from_config(config, 32, 24)
    assert [i for i, source in enumerate(plan.source) if source is not None] == list(range(23, 29))
    with pytest.raises(EpalmError, match="does not fit an LM of 8 layers"):
        InjectionPlan.from_config(config, 8, 24)
