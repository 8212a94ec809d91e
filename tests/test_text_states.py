"""States of texts at the first injection layer, cached like features."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.errors import EpalmError
from epalm.extract.loop import extract
from epalm.store.feature_set import FeatureSet
from epalm.store.maintenance import text_sets, verify
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


@pytest.mark.parametrize(
    ("overrides", "noise"),
    [
        (["store.backend=zarr"], 1e-5),
        (["store.backend=hdf5"], 1e-5),
        (["variant.feed_forward_adapters={reduction: 4, start: 3}"], 1e-5),
        # it keeps 8 bits, and they are made without the batch's padding: 9e-3 found
        (["lm.dtype=bfloat16"], 3e-2),
    ],
)
def test_same_loss_and_gradients_with_half_the_lm(
    prepare: Callable, overrides: list[str], noise: float
) -> None:
    parts, batches = prepare("train.steps=100", *overrides)
    expected = losses_and_gradients(parts, batches)
    batches.text_states = open_text_states(parts.recipe, parts.model, batches.texts)
    called: list[int] = []
    for number, layer in enumerate(parts.model.family.layers):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    found = losses_and_gradients(parts, batches)
    assert set(called) == set(parts.model.layers.injected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=noise, atol=noise * float(theirs.abs().max()))


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
    "override",
    [
        "variant.prompt_length=2",
        "variant.inject_start=0",
        "variant.mask=reference",
        "variant.attention_adapters={reduction: 4, start: 2}",
    ],
)
def test_insisting_where_they_change_is_an_error(prepare: Callable, override: str) -> None:
    parts, batches = prepare("train.text_states=always", override)
    with pytest.raises(EpalmError, match=r"train\.text_states: always, but this variant"):
        open_text_states(parts.recipe, parts.model, batches.texts)


def test_the_cache_commands_know_them(
    toy: Callable[..., Path],
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.exit_code == 0, done.output
        return done.output

    def train(name: str, *overrides: str) -> None:
        sets = [f"name={name}", *LIN, "train.text_states=always", "train.steps=2", *overrides]
        run("train", recipe, *(part for one in sets for part in ("--set", one)))

    def states() -> FeatureSet:
        (found,) = text_sets(tmp_path / "features", load_recipe(recipe).lm.weights)
        return found

    def shards() -> dict[Path, dict[int, list[str]]]:
        found = states().columns
        return {c.folder: {n: m.hashes for n, m in c.markers.items()} for c in found}

    def rows_of(held: dict[Path, dict[int, list[str]]]) -> set[str]:
        return {h for markers in held.values() for hashes in markers.values() for h in hashes}

    recipe = toy(store={"shard_rows": 2})
    run("extract", recipe)
    train("one")
    first, folder = shards(), states().folder
    assert len(rows_of(first)) > 8
    train("two", "text.template='Is it? {prompt}'")
    both = shards()
    assert len(rows_of(both)) == 2 * len(rows_of(first))
    table = run("cache", "ls", tmp_path / "features").splitlines()
    assert sum("text states" in line for line in table) == len(both)
    page = run("cache", "info", folder)
    assert "states of texts at its first injection layer" in page
    assert f"needed by {tmp_path / 'runs' / 'two'}: " in page
    assert f"runs/one: {sum(map(len, first.values()))} shards" in page

    # broken ones are dropped, and made again by the next training, alike and in their places
    column = states().columns[0]
    block = max(column.backend.files(0), key=lambda path: path.stat().st_size)
    content = block.read_bytes()
    block.write_bytes(content[:-1])
    assert cli("cache", "verify", folder).exit_code == 2
    said = run("cache", "repair", recipe)
    assert f"{folder}: 1 broken shards of text states; dropped, the next training" in said
    assert "0 broken shards" in run("cache", "repair", recipe)
    assert shards() != both
    for name, *overrides in (("one",), ("two", "text.template='Is it? {prompt}'")):
        shutil.rmtree(tmp_path / "runs" / name)
        train(name, *overrides)
    assert shards() == both and block.read_bytes() == content

    # what no run needs any more is deleted, and nothing else
    assert "0 files" in run("cache", "gc", folder, "--removed")
    shutil.rmtree(tmp_path / "runs" / "two")
    assert "0 files" in run("cache", "gc", folder)
    planned = run("cache", "gc", folder, "--removed", "--dry-run")
    assert shards() == both
    assert run("cache", "gc", folder, "--removed") == planned.replace("would be", "are")
    assert rows_of(shards()) == rows_of(first)
    monkeypatch.setattr(text_states.TextStates, "_states", None)  # nothing is made again
    shutil.rmtree(tmp_path / "runs" / "one")
    train("one")

    # a note that is not as it was written keeps all there is, until its run is trained again
    (record,) = (folder / "runs").iterdir()
    written, held = record.read_text(), shards()
    tree = json.loads(written)
    column = next(iter(tree["shards"]))
    for change in (
        {"shards": [0]}, {"shards": {column: 0}}, {"shards": {column: ["0"]}},
        {"run": 7}, {"run": ""}, {"run": "one"},
    ):  # fmt: skip
        record.write_text(json.dumps(tree | change))
        said = run("cache", "gc", folder, "--removed")
        assert f"{record}: `run` or `shards` is not as" in said and "0 files" in said
        assert f"{record}: `run` or `shards` is not as" in run("cache", "info", folder)
    train("one")
    assert record.read_text() == written and shards() == held

    # a run's folder that cannot be seen is not one that is gone
    (tmp_path / "runs").rename(tmp_path / "away")
    assert "0 files" in run("cache", "gc", folder, "--removed")
    (tmp_path / "runs").mkdir()
    run("cache", "gc", folder, "--removed")
    assert rows_of(shards()) == set()
    refused = cli("cache", "gc", folder)
    assert refused.exit_code == 2 and "has no note of the runs that need it" in refused.output
