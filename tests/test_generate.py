"""`generate` as people know it from Hugging Face, on one small random LM of each kind."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from epalm.config import DecodeConfig, TextConfig
from epalm.config.variant import AdapterConfig
from epalm.errors import EpalmError
from epalm.evaluate.generation import generate_texts, generation_options
from epalm.model.augmented import AugmentedLM
from epalm.model.text import TextCodec
from epalm.train.loss import example_losses
from tests.conftest import tiny_opt
from tests.test_augmented import FLOAT, LMS, VARIANTS, alone, tiny_lm
from tests.test_cli import refused

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}


def model_of(lm: PreTrainedModel) -> AugmentedLM:
    torch.manual_seed(0)
    built = AugmentedLM.from_config(lm, VARIANTS["epalm"], encoder_layers=4, encoder_dim=24)
    for parameter in built.trained["connection"].parameters():
        parameter.data *= 20  # so that the media decides the answer
    return built


@pytest.fixture(scope="module", params=LMS)
def model(request: pytest.FixtureRequest) -> AugmentedLM:
    return model_of(LMS[request.param]())


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Four texts of three lengths about two media, two texts being equal."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[0] * (6 - k) + [1] * k for k in (4, 4, 6, 3)])
    ids = torch.randint(3, 384, mask.shape, generator=generator)
    ids[1] = ids[0]
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "features": torch.randn(2, 3, 24, generator=generator),
        "rows": torch.tensor([0, 1, 1, 0]),
    }


def generate(model: AugmentedLM, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The new tokens of each text."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]


def test_a_call_gives_the_logits_that_generation_starts_with(
    model: AugmentedLM, batch: dict
) -> None:
    answer = model.generate(
        **batch, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logits = model(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)
    torch.testing.assert_close(logits[:, -1], answer.logits[0], **FLOAT)
    with pytest.raises(ValueError, match="give features"):
        model(batch["input_ids"])


def test_a_seed_decides_the_draws(model: AugmentedLM, batch: dict) -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(model, batch, **SAMPLING))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_draws_have_the_same_distribution_with_and_without_cache(
    model: AugmentedLM, batch: dict
) -> None:
    """The scores that are drawn from, token by token, and so the draws of a seed."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"return_dict_in_generate": True, "output_scores": True, "use_cache": use_cache}
        found.append(model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **SAMPLING,
                                    **options))  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        # sums in another order, as in test_augmented.py
        torch.testing.assert_close(one.softmax(1), other.softmax(1), atol=1e-4, rtol=0)


def test_draws_follow_the_distribution(model: AugmentedLM, batch: dict) -> None:
    """Many samples of one token: as often as its probability says."""
    one = alone(batch, 2)
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": True, "top_k": 3}
    torch.manual_seed(0)
    answer = model.generate(**one, num_return_sequences=2000, output_logits=True,
                            return_dict_in_generate=True, **options)  # fmt: skip
    logits = answer.logits[0][0]
    logits[2] = -torch.inf  # EOS, which min_new_tokens forbids
    top = logits.topk(3)
    expected = torch.zeros_like(logits).index_put((top.indices,), top.values.softmax(0))
    share = answer.sequences[:, -1].bincount(minlength=384) / 2000
    # four deviations of a share of 2000
    assert (share - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_several_samples_of_each_text(model: AugmentedLM, batch: dict) -> None:
    """In rows beside each other; each is about its own text's media."""
    torch.manual_seed(1)
    many = generate(model, batch, num_return_sequences=3, **SAMPLING)
    torch.manual_seed(1)
    recomputed = generate(model, batch, num_return_sequences=3, use_cache=False, **SAMPLING)
    assert many.shape == (12, 6)
    assert torch.equal(many, recomputed)
    repeated = {k: batch[k].repeat_interleave(3, dim=0) for k in batch if k != "features"}
    torch.manual_seed(1)
    one_each = generate(model, repeated | {"features": batch["features"]}, **SAMPLING)
    assert torch.equal(many, one_each)


def test_several_beams_are_returned(model: AugmentedLM, batch: dict) -> None:
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 1.0}
    together = generate(model, batch, **options)
    assert together.shape == (12, 6)
    assert torch.equal(together, generate(model, batch, use_cache=False, **options))
    assert torch.equal(together[9:], generate(model, alone(batch, 3), **options))
    assert torch.equal(together[::3], generate(model, batch, num_beams=4, length_penalty=1.0))
    assert len({tuple(row) for row in together[:3].tolist()}) == 3


def test_beams_are_drawn_alike_with_and_without_cache(model: AugmentedLM, batch: dict) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        found.append(generate(model, batch, num_beams=3, use_cache=use_cache, **SAMPLING))
    assert torch.equal(*found)


def test_an_answer_ends_with_eos_whatever_the_others_do(model: AugmentedLM, batch: dict) -> None:
    """Each row's fourth greedy token is made its end in turn: the rest is padding."""
    free = generate(model, batch, eos_token_id=None, min_new_tokens=None)
    for row in range(len(free)):
        end = int(free[row, 3])
        ended = generate(model, batch, eos_token_id=end, pad_token_id=1, min_new_tokens=None)
        for mine, theirs in zip(free.tolist(), ended.tolist(), strict=True):
            cut = mine.index(end) + 1 if end in mine else len(mine)
            assert theirs[:cut] == mine[:cut][: len(theirs)]
            assert set(theirs[cut:]) <= {1}


def test_a_generation_config_says_the_same_as_options(model: AugmentedLM, batch: dict) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False,
               "length_penalty": 1.0, "pad_token_id": 1, "eos_token_id": 2}  # fmt: skip
    by_config = model.generate(**batch, generation_config=GenerationConfig(**options))
    assert torch.equal(by_config, model.generate(**batch, **options))


def test_without_a_mask_nothing_is_padded(model: AugmentedLM, batch: dict) -> None:
    one = alone(batch, 2)
    assert torch.equal(generate(model, one | {"attention_mask": None}), generate(model, one))


def test_equal_questions_about_two_media_differ(model: AugmentedLM, batch: dict) -> None:
    answers = generate(model, batch)
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "gpt_neox"])
def test_room_is_used_up_to_the_last_position(kind: str, batch: dict) -> None:
    """24 positions, a longest prompt of 6 tokens; the last new token is never read."""
    few = {"max_position_embeddings": 24}
    model = model_of(tiny_opt(**few) if kind == "opt" else tiny_lm(kind, **few))
    fits = 19 if kind in ("opt", "gpt2") else 14  # perceptual and 4 prompt tokens
    for use_cache in (True, False):
        options = {"min_new_tokens": fits, "use_cache": use_cache}
        assert generate(model, batch, max_new_tokens=fits, **options).shape == (4, fits)
        with pytest.raises(
            EpalmError,
            match=f"max_new_tokens: {fits + 1} after a prompt of 6 tokens, but the LM has 24 "
            f"positions.*lower it to {fits}",
        ):
            generate(model, batch, **options | {"max_new_tokens": fits + 1})
    one = alone(batch, 3) | {"features": batch["features"], "rows": batch["rows"][3:]}
    padded = {k: torch.nn.functional.pad(one[k], (9, 0)) for k in ("input_ids", "attention_mask")}
    room = {"max_new_tokens": fits + 3, "min_new_tokens": fits + 3}  # this prompt has 3 tokens
    assert torch.equal(generate(model, one | padded, **room), generate(model, one, **room))


def test_decode_options() -> None:
    assert generation_options(DecodeConfig()) == {
        "num_beams": 1, "max_new_tokens": 10, "length_penalty": None, "do_sample": False,
    }  # fmt: skip
    drawn = generation_options(DecodeConfig(do_sample=True, top_p=0.9))
    assert drawn.items() >= {"temperature": 1.0, "top_k": 50, "top_p": 0.9}.items()
    with pytest.raises(ValueError, match="top_p is for random draws; set do_sample to true"):
        DecodeConfig(top_p=0.9)


def test_drawn_answers_are_the_same_again(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of(tiny_opt())
    codec = TextCodec(tokenizer, TextConfig())
    decode = DecodeConfig(do_sample=True, max_new_tokens=8)
    answers = []
    for seed, batch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        torch.manual_seed(len(answers))  # must not matter
        before = torch.get_rng_state()
        settings = decode.model_copy(update={"seed": seed})
        answers.append(
            generate_texts(model, codec, ["what?"], torch.ones(1, 3, 24), [0], settings, batch)
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert answers[0] == answers[1]
    assert len({text for [text] in answers}) == 3


def test_text_without_room_is_refused_before_anything_starts(
    cli: Callable[..., Result], toy: Callable[..., Path], tmp_path: Path
) -> None:
    """The small OPT has 64 positions: long prompts, long new answers, long learnt answers."""
    recipe, data = toy(), tmp_path / "toy.jsonl"
    assert cli("extract", recipe).exit_code == 0
    refused(
        cli("train", recipe, "--set", "decode.max_new_tokens=60"),
        "decode.max_new_tokens: 60 after a prompt of",
        "the LM has 64 positions; lower it to",
    )
    text = data.read_text()
    data.write_text(text.replace('"answers": ["', '"answers": ["' + "Z" * 70))
    refused(
        cli("train", recipe),
        "text.max_prompt_tokens: the longest prompt with its answer has",
        "the LM has 64 positions",
    )
    data.write_text(text.replace('"prompt": "', '"prompt": "' + "Z" * 70))
    refused(cli("train", recipe), "decode.max_new_tokens: 3 after a prompt of")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rows", [[0, 1, 2, 0], [0, 1, -1, 0], [0, 1]])
def test_rows_name_media_that_are_there(
    model: AugmentedLM, batch: dict[str, torch.Tensor], rows: list[int]
) -> None:
    with pytest.raises(EpalmError, match="for 4 prompts, and features of 2 media; give each"):
        generate(model, batch | {"rows": torch.tensor(rows)})


def test_threads_take_turns() -> None:
    """What a web server does, with adapters that hang on the one LM that all threads use."""
    lm = tiny_opt()
    adapters = AdapterConfig(reduction=8)
    variant = VARIANTS["epalm"].model_copy(update={"feed_forward_adapters": adapters})
    model = AugmentedLM.from_config(lm, variant, encoder_layers=4, encoder_dim=24)
    before = lm.config._attn_implementation
    generator = torch.Generator().manual_seed(1)
    asked = [
        (torch.randint(3, 384, (2, 5), generator=generator), torch.randn(2, 3, 24))
        for _ in range(6)
    ]

    def answer(question: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, features = question
        return model.states(ids, torch.ones_like(ids), features).detach()

    def loss(question: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, features = question
        return example_losses(model, ids, torch.ones_like(ids), ids, features)[0].detach()

    for ask in (answer, loss):
        alone = [ask(question) for question in asked]
        with ThreadPoolExecutor(6) as pool:
            for _ in range(5):
                for one, other in zip(alone, pool.map(ask, asked), strict=True):
                    torch.testing.assert_close(one, other, **FLOAT)
    assert lm.config._attn_implementation == before
    assert not any(module._forward_hooks for module in lm.modules())
