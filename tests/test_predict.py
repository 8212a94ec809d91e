"""`predict` on files, folders and JSON lines."""

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import PreTrainedTokenizerFast

from epalm.config import TextConfig
from epalm.errors import EpalmError
from epalm.evaluate.predict import Predictor
from epalm.evaluate.predict_inputs import Asked, asked
from epalm.evaluate.stream import AnswerStreamer
from epalm.model.text import TextCodec
from epalm.train.checkpoint import save_weights
from epalm.train.parts import Parts
from epalm.train.progress import Progress
from epalm.train.run import Run
from tests.test_cli import refused

Cli = Callable[..., Result]


@pytest.fixture
def run(prepare: Callable[..., Parts]) -> Run:
    """An untrained model whose answers depend on the image."""
    parts = prepare("decode.max_new_tokens=12")
    for parameter in parts.model.trained["connection"].parameters():
        parameter.data *= 20
    run = Run.create(parts.recipe)
    save_weights(run.best, parts.model, Progress())
    run.bind_features(parts.features.spec)
    return run


@pytest.fixture
def predictor(run: Run) -> Predictor:
    return Predictor.from_run(run, run.best)


def test_a_streamed_answer_is_the_answer(predictor: Predictor, tmp_path: Path) -> None:
    """Greedy, though the recipe has beams; and drawn hot, so that there are many words."""
    features = predictor.encode([tmp_path / "images" / "0.png"])
    hot = {"do_sample": True, "temperature": 9.0, "max_new_tokens": 40}
    for update in ({}, hot, hot | {"seed": 1}):
        predictor.decode = predictor.decode.model_copy(update=update)
        words: list[str] = []
        predictor.stream(features, "what shape?", words.append)
        assert "".join(words) == predictor.ask(features, ["what shape?"])[0]
    assert len(words) > 1
    greedy = predictor.decode.model_copy(update={"do_sample": False})
    answers = []
    for beams in (1, 3):
        predictor.decode = greedy.model_copy(update={"num_beams": beams})
        predictor.stream(features, "what shape?", answers.append)
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_white_space_around_an_answer_is_not_streamed(predictor: Predictor) -> None:
    words: list[str] = []
    streamer = AnswerStreamer(predictor.model.codec, words.append)
    for text in (" ", " a ", "\n", "b", " c\n", " "):
        streamer.on_finalized_text(text)
    assert words == ["a", " \nb", " c"]


def test_an_answer_ends_before_another_separator(tokenizer: PreTrainedTokenizerFast) -> None:
    """As the official code cuts it (convention 28); the prompt's own separator ends nothing."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["</a>"]})
    text = TextConfig(template="{prompt}?</a>", answer_prefix="", special_tokens=("</a>",))
    codec = TextCodec(own, text)
    prompt, red = codec.prompt("what color"), codec.answer("red")[:-1]
    assert prompt[-1:] == own.convert_tokens_to_ids(["</a>"])
    answer = [*red, prompt[-1], *red, codec.eos, codec.pad]
    assert codec.decode(answer) == codec.decode([*red, codec.eos, codec.pad]) == "red"
    words: list[str] = []
    streamer = AnswerStreamer(codec, words.append)
    streamer.put(torch.tensor([prompt]))
    for token in answer:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(words) == "red"


def test_a_folder(cli: Cli, run: Run, tmp_path: Path) -> None:
    """Broken files are named on standard error; all others are answered as alone."""
    folder = tmp_path / "images"
    (folder / ".hidden").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "broken.png").write_bytes(b"\x89PNG broken")
    for extra in range(3, 12):
        (folder / f"{extra}.png").unlink()
    ask = ("--ask", "what shape?", "--ask", "is it red?")
    done = cli("predict", run.folder, "--image", folder, *ask)
    assert done.exit_code == 2
    names = ["0.png", "0.png", "1.png", "1.png", "2.png", "2.png"]
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == names
    assert [line for line in done.stderr.splitlines() if "decoded" in line] == [
        "sub/broken.png: cannot be decoded (UnidentifiedImageError: cannot identify image file)"
    ]
    alone = cli("predict", run.folder, "--image", folder / "1.png", *ask, "--json")
    rows = [json.loads(line) for line in alone.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["what shape?", "is it red?"]
    answers = [line.split("\t")[2] for line in done.stdout.splitlines()[2:4]]
    assert [row["prediction"] for row in rows] == answers


def test_json_lines(cli: Cli, run: Run, tmp_path: Path) -> None:
    lines = tmp_path / "images" / "ask.jsonl"
    rows = [{"media": "1.png", "prompt": "what?"}, {"media": "1.png", "prompt": "which?"},
            {"media": "none.png", "prompt": "what?"}, {"media": "2.png"}]  # fmt: skip
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n")
    refused(cli("predict", run.folder, "--image", lines), "ask.jsonl, line 4: field 'prompt'")
    done = cli("predict", run.folder, "--image", lines, "--ask", "who?", "--json")
    assert done.exit_code == 2 and "none.png: cannot be read (No such file" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["media"], row["prompt"]) for row in found] == [
        ("1.png", "what?"), ("1.png", "which?"), ("2.png", "who?")
    ]  # fmt: skip


def test_lines_of_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"media": "a.png", "prompt": "what?"}\n\n{"media": "a.png"}\n{"media": "/b.png"}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert asked(Path("-"), ["who?"]) == [
        Asked("a.png", Path("a.png"), ("what?", "who?")), Asked("/b.png", Path("/b.png"), ("who?",))
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    with pytest.raises(EpalmError, match="standard input, line 3: field 'prompt' is missing"):
        asked(Path("-"), [])


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match="x.png: no such file or folder"):
        asked(tmp_path / "x.png", ["a"])
    (tmp_path / "x.png").touch()
    assert asked(tmp_path / "x.png", ["a"]) == [
        Asked(str(tmp_path / "x.png"), tmp_path / "x.png", ("a",))
    ]
    with pytest.raises(EpalmError, match="give a prompt with --ask"):
        asked(tmp_path / "x.png", [])
    (tmp_path / "x.png").unlink()
    with pytest.raises(EpalmError, match="no files in this folder"):
        asked(tmp_path, ["a"])
    file = tmp_path / "x.jsonl"
    file.write_text("\n")
    with pytest.raises(EpalmError, match="x.jsonl: holds no lines"):
        asked(file, ["a"])
    for line, words in (
        (b"{", "not valid JSON"), (b"[]", "field 'media'"), (b'{"media": 3}', "field 'media'"),
        (b'{"media": "a", "prompt": 3}', "field 'prompt' must be"), (b"\xff", "not valid JSON"),
    ):  # fmt: skip
        file.write_bytes(b"\n" + line)
        with pytest.raises(EpalmError, match=f"x.jsonl, line 2: .*{words}"):
            asked(file, ["a"])
