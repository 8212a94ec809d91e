"""Connections that start from the LM's states of answers: what they are, for whom, and when."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from epalm.config import load_recipe
from epalm.errors import EpalmError
from epalm.train.answer_start import GAIN, RIDGE, check_answers, start_from_answers
from epalm.train.parts import Parts
from epalm.train.run import Run
from tests.test_cli import refused

Cli = Callable[..., Result]
Prepare = Callable[..., Parts]
Toy = Callable[..., Path]

ANSWERS = "train.connection_start=answers"


def wanted_tokens(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """(N, n, D) features and (N, n, H) targets of the open questions, one text at a time."""
    lm, codec, source = parts.model.lm, parts.codec, parts.model.plan.source
    features, targets = [], []
    for example in parts.dataset.split("train"):
        (answer,) = example.references
        if answer in ("yes", "no"):
            continue
        prompt = codec.prompt(example.prompt)
        ids = torch.tensor([[*prompt, *codec.answer(answer)[:-1]]])
        with torch.no_grad():
            entered = lm(ids, output_hidden_states=True).hidden_states
        levels: list[list[np.ndarray]] = [[] for _ in range(3)]
        for layer, level in enumerate(source):
            if level is not None:
                states = entered[layer][0, len(prompt) :].double().numpy()
                levels[level].append(states / np.sqrt((states**2).mean(1, keepdims=True)))
        targets.append([np.mean([s.mean(0) for s in some], axis=0) for some in levels])
        features.append(parts.features.fetch([example.media], [0])[0].double().numpy())
    return np.array(features).reshape(len(targets), 3, -1), np.array(targets)


@pytest.mark.parametrize("connection", ["separate", "shared"])
def test_it_is_the_ridge_regression_onto_states_of_answers(
    prepare: Prepare, connection: str
) -> None:
    parts = prepare(f"variant.connection={connection}")
    features, targets = wanted_tokens(parts)
    stage = start_from_answers(parts, parts.dataset.split("train"))
    assert stage.seconds > 0
    linears = parts.model.trained["connection"].linears
    if connection == "shared":
        features, targets = (a.reshape(1, -1, a.shape[-1]) for a in (features, targets))
    else:
        features, targets = features.swapaxes(0, 1), targets.swapaxes(0, 1)
    assert len(linears) == len(features)
    for linear, inputs, outputs in zip(linears, features, targets, strict=True):
        centred = inputs - inputs.mean(0)
        ridge = RIDGE * (centred**2).sum(0).mean()
        # rows that pull every weight to zero do what the ridge does
        rows = np.vstack([centred, np.sqrt(ridge) * np.eye(centred.shape[1])])
        goal = np.vstack([outputs - outputs.mean(0), np.zeros((centred.shape[1], 48))])
        weight = GAIN * np.linalg.lstsq(rows, goal, rcond=None)[0].T
        bias = outputs.mean(0) - weight @ inputs.mean(0)
        for ours, theirs in ((linear.weight, weight), (linear.bias, bias)):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-3, atol=2e-5)


def test_it_is_the_same_whenever_a_training_begins(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    path = toy(train={"connection_start": "answers"})
    for name, stops in (("whole", [6]), ("cut", [1, 3, 6])):
        for stop in stops:
            command = "run" if stop == 6 else "train"
            limit = () if stop == 6 else ("--max-steps", stop)
            done = cli(command, path, "--set", f"name={name}", *limit)
            assert done.exit_code == 0, done.output
    one, other = (
        load_file(tmp_path / "runs" / name / "checkpoints" / "last.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(other[name], value) for name, value in one.items())
    scores = json.loads((tmp_path / "runs" / "cut" / "scores.json").read_text())
    assert scores["seconds"].keys() >= {"extract", "start", "train"}


def test_of_ten_answers_one_may_be_empty(prepare: Prepare) -> None:
    parts = prepare()
    examples = [
        replace(e, references=("", " ", *e.references, "no")) for e in parts.dataset.split("train")
    ]
    start_from_answers(parts, examples)
    assert all(p.isfinite().all() for p in parts.model.trained["connection"].parameters())


def test_of_one_media_it_is_the_mean(prepare: Prepare) -> None:
    """Nothing tells it apart from others: whatever is shown, the token is their mean answer's."""
    parts = prepare()
    first, *others = parts.dataset.split("train")
    examples = [first, *(replace(e, media=first.media) for e in others)]
    start_from_answers(parts, examples)
    for linear in parts.model.trained["connection"].linears:
        assert not linear.weight.any() and linear.bias.any()
        assert linear.bias.isfinite().all()


def test_where_it_cannot_be(prepare: Prepare, toy: Toy) -> None:
    parts = prepare()
    closed = [e for e in parts.dataset.split("train") if e.references[0] in ("yes", "no")]
    with pytest.raises(
        EpalmError, match=r"train\.connection_start: no training answers but yes, no and"
    ):
        check_answers(closed, parts.recipe)
    said = [replace(e, references=("Yes", "No.", " yes! ", "NO", "")) for e in closed]
    with pytest.raises(EpalmError, match="no training answers but yes, no and empty ones"):
        check_answers(said, parts.recipe)
    check_answers([*closed, replace(closed[0], references=("yes", "none"))], parts.recipe)
    with pytest.raises(EpalmError, match=r"connection_start: answers needs features that are kept"):
        load_recipe(toy(), (ANSWERS, "encoder.online=true"))


def test_yes_and_no_alone_stop_before_extraction(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    """And what the message says is then all that there is to do, though a run was begun."""
    recipe, data = toy(train={"connection_start": "answers"}), tmp_path / "toy.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(line | {"answers": ["Yes."]}) + "\n" for line in lines))
    refused(cli("run", recipe), "no training answers but yes, no and empty ones; set it to random")
    assert not (tmp_path / "features").exists()
    Run.create(load_recipe(recipe))
    done = cli("run", recipe, "--set", "train.connection_start=random")
    assert done.exit_code == 0, done.output
