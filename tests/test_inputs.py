"""A run goes on, and is used, with the examples and LM that it was begun with, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

from tests.test_cli import refused

Cli = Callable[..., Result]


def answers(tmp_path: Path) -> None:
    data = tmp_path / "toy.jsonl"
    data.write_text(data.read_text().replace('"red"', '"green"'))


def order(tmp_path: Path) -> None:
    data = tmp_path / "toy.jsonl"
    data.write_text("\n".join(reversed(data.read_text().splitlines())))


def fewer(tmp_path: Path) -> None:
    data = tmp_path / "toy.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[1:]))


def picture(tmp_path: Path) -> None:
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "3.png")


@pytest.mark.parametrize("change", [answers, order, fewer, picture], ids=lambda f: f.__name__)
def test_a_training_does_not_go_on_with_other_examples(
    toy: Callable[..., Path], cli: Cli, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    recipe, last = toy(), tmp_path / "runs" / "toy" / "checkpoints" / "last.safetensors"
    assert cli("run", recipe, "--max-steps", 2).exit_code == 0
    before, data = last.read_bytes(), (tmp_path / "toy.jsonl").read_text()
    image = (tmp_path / "images" / "3.png").read_bytes()
    change(tmp_path)
    assert cli("extract", recipe).exit_code == 0
    refused(cli("train", recipe), "data: the train and val examples", str(last.parents[1]))
    assert last.read_bytes() == before
    (tmp_path / "toy.jsonl").write_text(data)
    (tmp_path / "images" / "3.png").write_bytes(image)
    assert cli("run", recipe).exit_code == 0
    change(tmp_path)
    assert cli("run", recipe, "--overwrite").exit_code == 0


def test_test_examples_may_change(toy: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    recipe, data = toy(), tmp_path / "toy.jsonl"
    assert cli("run", recipe, "--max-steps", 2).exit_code == 0
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    assert cli("run", recipe).exit_code == 0


def weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    changed = {name: 1.01 * value for name, value in load_file(file).items()}
    save_file(changed, file, {"format": "pt"})


def merges(folder: Path) -> None:
    """The same vocabulary, but words are cut elsewhere."""
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:10]
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "word"), [(weights, "another LM"), (merges, "another tokenizer")]
)
def test_nothing_is_done_with_another_lm(
    toy: Callable[..., Path], cli: Cli, tmp_path: Path, opt_folder: Path,
    change: Callable[[Path], None], word: str,
) -> None:  # fmt: skip
    lm, run = tmp_path / "lm", tmp_path / "runs" / "toy"
    shutil.copytree(opt_folder, lm)
    recipe, image = toy(lm={"weights": str(lm)}), tmp_path / "images" / "0.png"
    assert cli("run", recipe, "--max-steps", 2).exit_code == 0
    scores = (run / "scores.json").read_bytes()
    change(lm)
    for command in (
        ("train", recipe),
        ("evaluate", run),
        ("evaluate", run, "--on", recipe),
        ("predict", run, "--image", image, "--ask", "what?"),
        ("export", run, tmp_path / "exported"),
    ):
        refused(cli(*command), f"lm.weights: {lm} holds {word} than {run} was trained with")
    assert (run / "scores.json").read_bytes() == scores
    shutil.rmtree(lm)
    shutil.copytree(opt_folder, lm)
    assert cli("run", recipe).exit_code == 0


def test_a_broken_record_is_named(toy: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    recipe, record = toy(), tmp_path / "runs" / "toy" / "inputs.json"
    assert cli("run", recipe, "--max-steps", 2).exit_code == 0
    for text in ("", "[]", '{"lm": "x"}', '{"lm": 3, "tokenizer": "", "examples": ""}'):
        record.write_text(text)
        refused(cli("train", recipe), f"{record}: not as a training wrote it")
    record.unlink()
    assert cli("run", recipe).exit_code == 0
    assert record.is_file()
