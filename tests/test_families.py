"""Every LM family beside the untouched Hugging Face model, and the light round of invariances.

The full round of tests/test_augmented.py runs on one LM of a kind; here are those like it.
"""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, DynamicCache, PreTrainedModel

from epalm.config import LMConfig
from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.cache import CACHE
from epalm.model.families import FAMILIES, family_of
from epalm.model.load import lm_without_weights, load_lm
from epalm.train.loss import example_losses
from tests.test_augmented import VARIANTS, alone, generate, tiny_lm

LIKE_LLAMA = ["mistral", "qwen2", "qwen3", "olmo", "phi3", "smollm3", "gemma"]
ROTARY = ["llama", *LIKE_LLAMA, "gpt_neox"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MASKS = {
    "none": [[1] * 7, [1] * 7],
    "left": [[1] * 7, [0] * 3 + [1] * 4],
    "right": [[1] * 7, [1] * 4 + [0] * 3],
}


def words(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 384, (rows, length), generator=generator)


def outputs(lm: PreTrainedModel, hidden: torch.Tensor, call: dict) -> list[torch.Tensor]:
    """States entering each layer, then logits, through the family's parts."""
    family = family_of(lm)
    states = []
    for layer in family.layers:
        states.append(hidden)
        hidden = layer(hidden, **call)
    return [*states, family.logits(hidden)]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_states_and_logits_of_text_are_the_untouched_lms(kind: str, side: str) -> None:
    lm = tiny_lm(kind)
    ids, mask = words(2, 7), torch.tensor(MASKS[side])
    family = family_of(lm)
    positions = mask.cumsum(1) * mask - 1
    hidden = family.embed_text(ids, positions)
    seen = mask.bool()[:, None, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    call = family.layer_arguments(hidden, positions.new_zeros(0), positions, 0)
    call["attention_mask"] = seen | torch.eye(7, dtype=torch.bool)
    with torch.no_grad():
        ours = outputs(lm, hidden, call)
        where = {} if kind == "opt" else {"position_ids": positions.clamp(min=0)}
        expected = lm(ids, attention_mask=mask, output_hidden_states=True, **where)
    real = mask.bool()
    theirs = [*expected.hidden_states[:-1], expected.logits]
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[real], other[real], **CLOSE)


@pytest.mark.parametrize("kind", ROTARY)
def test_a_prompt_of_words_is_text(kind: str) -> None:
    """Rotary LMs: words as soft prompt at places 1 to P, then cached text, as one text."""
    lm = tiny_lm(kind)
    family = family_of(lm)
    ids, before = words(1, 7), 4
    places = torch.arange(1, before + 1)
    prompt, text = ids[:, :before], ids[:, before:]
    positions = torch.arange(text.shape[1])[None]
    cache = DynamicCache()
    states = []
    with torch.no_grad():
        embedded = family.embed_prompt(family.embed_text(prompt, None)[0])[None]
        for hidden, at, count, length in (
            (embedded, places, positions[:, :0], before),
            (family.embed_text(text, positions), places[:0], positions, text.shape[1]),
        ):
            call = family.layer_arguments(hidden, at, count, before + 1)
            past = 7 - length if count.numel() else 0
            call["attention_mask"] = torch.ones(length, past + length, dtype=torch.bool).tril(past)
            for layer in family.layers:
                hidden = layer(hidden, use_cache=True, **{CACHE: cache}, **call)
            states.append(hidden)
        logits = family.logits(torch.cat(states, dim=1))
        # the same distances at other angles: six layers of sums differ in their last digits
        torch.testing.assert_close(logits, lm(ids).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sub_layers_are_what_a_layer_adds_to_its_input(kind: str) -> None:
    """Where adapters go: attention's and feed-forward's outputs, of states, without residual."""
    lm = tiny_lm(kind)
    family = family_of(lm)
    entered, left = [], []

    def enter(_: object, args: tuple, named: dict) -> None:
        entered.append(args[0] if args else named["hidden_states"])

    def leave(_: object, args: tuple, output: object) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    attention, (first, last) = family.attention(2), family.feed_forward(2)
    for module in (attention, first):
        module.register_forward_pre_hook(enter, with_kwargs=True)
    for module in (attention, last):
        module.register_forward_hook(leave)
    with torch.no_grad():
        states = lm(words(2, 7), output_hidden_states=True).hidden_states
    assert all(x.shape[-1] == 48 and x.numel() == 2 * 7 * 48 for x in entered + left)
    added = sum(x.view(2, 7, 48) for x in left)  # OPT's linears see (B * S, H)
    torch.testing.assert_close(states[2] + added, states[3], **CLOSE)


def augmented(lm: PreTrainedModel) -> AugmentedLM:
    torch.manual_seed(0)
    model = AugmentedLM.from_config(lm, VARIANTS["epalm"], encoder_layers=4, encoder_dim=24)
    for parameter in model.trained["connection"].parameters():
        parameter.data *= 20  # so that the media decides the answer
    return model


@pytest.fixture(params=LIKE_LLAMA)
def model(request: pytest.FixtureRequest) -> AugmentedLM:
    return augmented(tiny_lm(request.param))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four texts of three lengths about two media."""
    mask = torch.tensor([[0] * (6 - k) + [1] * k for k in (4, 6, 3, 6)])
    return {
        "input_ids": torch.where(mask.bool(), words(4, 6), 1),
        "attention_mask": mask,
        "features": torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(6)),
        "rows": torch.tensor([0, 1, 1, 0]),
    }


def test_batch_padding_and_cache_change_no_token(model: AugmentedLM, batch: dict) -> None:
    together = generate(model, batch)
    assert len({tuple(row) for row in together.tolist()}) == 4
    assert torch.equal(together, generate(model, batch, use_cache=False))
    for row in range(len(together)):
        assert torch.equal(generate(model, alone(batch, row))[0], together[row])


def test_beams_are_the_same_cached_and_alone(model: AugmentedLM, batch: dict) -> None:
    options = {"num_beams": 3, "length_penalty": 1.0}
    together = generate(model, batch, **options)
    assert torch.equal(together, generate(model, batch, use_cache=False, **options))
    assert torch.equal(generate(model, alone(batch, 2), **options)[0], together[2])


def test_right_padding_gives_the_same_states(model: AugmentedLM, batch: dict) -> None:
    row = alone(batch, 2)
    padded = row | {
        "input_ids": torch.nn.functional.pad(row["input_ids"], (0, 2), value=1),
        "attention_mask": torch.nn.functional.pad(row["attention_mask"], (0, 2)),
    }
    with torch.no_grad():
        ours, expected = model.states(**padded)[:, :3], model.states(**row)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_reach_every_trained_part_and_no_other(kind: str, batch: dict) -> None:
    model = augmented(tiny_lm(kind))
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100).roll(-1, 1)
    labels[:, -1] = -100
    losses, _ = example_losses(model, batch["input_ids"], batch["attention_mask"], labels,
                               batch["features"], batch["rows"])  # fmt: skip
    losses.sum().backward()
    for name, parameter in model.trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.lm.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    ],
)
def test_a_sliding_window_is_refused_where_it_would_cut(
    kind: str, changes: dict, batch: dict
) -> None:
    """Prefix 5, text 6: within a window of 16 there is room for 5 tokens that are read again."""
    model = augmented(tiny_lm(kind, **changes))
    free = augmented(tiny_lm(kind, sliding_window=None))
    inside = {"max_new_tokens": 6, "min_new_tokens": 6}  # the sixth is never read
    assert torch.equal(generate(model, batch, **inside), generate(free, batch, **inside))
    for use_cache in (True, False):
        with pytest.raises(EpalmError, match="max_new_tokens: 7 .* has 16 positions, 5 of them"):
            generate(model, batch, max_new_tokens=7, min_new_tokens=7, use_cache=use_cache)


def test_a_window_that_no_layer_uses_is_no_window(batch: dict) -> None:
    lm = tiny_lm("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=6)
    assert generate(augmented(lm), batch).shape == (4, 8)


def test_unknown_family_names_the_known_ones() -> None:
    lm = tiny_lm("llama")
    lm.config.model_type = "mamba"
    with pytest.raises(EpalmError, match=f"'mamba' is not one of {', '.join(FAMILIES)}; choose"):
        family_of(lm)


@pytest.mark.parametrize("kind", FAMILIES)
def test_whatever_attention_the_lm_has_ours_takes_its_place(kind: str, batch: dict) -> None:
    lm = tiny_lm(kind)
    expected = generate(augmented(lm), batch)
    lm.set_attn_implementation("eager")
    assert torch.equal(generate(augmented(lm), batch), expected)
    assert lm.config._attn_implementation == "eager"


def test_an_lm_without_family_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """BLOOM cannot have the attention that LMs are loaded with, which would be the error."""
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path)
    for load in (
        lambda: load_lm(LMConfig(weights=str(tmp_path)), torch.device("cpu")),
        lambda: lm_without_weights(str(tmp_path)),
    ):
        with pytest.raises(EpalmError, match="LM family 'bloom' is not one of opt, llama"):
            load()
