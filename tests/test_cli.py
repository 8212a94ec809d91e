"""The commands end to end on a toy run, and what each does with bad input."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from epalm.config import load_recipe
from epalm.train.run import Run

Cli = Callable[..., Result]
Toy = Callable[..., Path]


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one message with these words, without a traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output


def test_extract_train_evaluate_predict(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe, run = toy(), tmp_path / "runs" / "toy"
    extracted = cli("extract", recipe)
    assert "12 media in" in extracted.output
    assert "nothing to do" in cli("extract", recipe).output
    assert "6 steps" in cli("train", recipe).output
    evaluated = cli("evaluate", run)
    assert evaluated.exit_code == 0, evaluated.output
    assert "overall" in cli("show", run).output
    scores = json.loads((run / "scores.json").read_text())
    assert f"{scores['accuracy']:.1%}" in evaluated.output
    assert {"extract", "train", "evaluate", "control"} <= scores["seconds"].keys()
    for name in ("loss.png", "report.html", "predictions.jsonl", "predictions-shuffled.jsonl"):
        assert (run / name).stat().st_size > 0
    with_beams = cli("evaluate", run, "--set", "decode.num_beams=3", "--checkpoint", "last")
    assert with_beams.exit_code == 0
    assert json.loads((run / "scores.json").read_text())["decode"]["num_beams"] == 3
    image = tmp_path / "images" / "11.png"
    answer = cli("predict", run, "--image", image, "--ask", "what color is the shape?")
    assert answer.exit_code == 0, answer.output


def test_predict_answers_as_evaluate_does(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    """The same question through raw image and through the cache."""
    cli("run", toy(train={"steps": 20, "lr": 0.03}))
    run = tmp_path / "runs" / "toy"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        answer = cli("predict", run, "--image", tmp_path / row["media"], "--ask", row["prompt"])
        assert answer.stdout.strip() == row["prediction"]


def test_run_does_everything_and_again_without_extraction(cli: Cli, toy: Toy) -> None:
    recipe = toy()
    first = cli("run", recipe)
    assert first.exit_code == 0, first.output
    assert "12 media in" in first.output
    second = cli("run", recipe, "--overwrite")
    assert "nothing to do" in second.output
    assert "evaluate: accuracy" in second.output


def test_captions_go_through(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    lines = [
        {
            "id": number,
            "media": f"images/{number}.png",
            "captions": ["a red circle", "one circle"],
            "split": "train" if number < 8 else "test",
        }
        for number in range(12)
    ]
    data = tmp_path / "captions.jsonl"
    recipe = toy(data={"path": str(data)})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("run", recipe)
    assert done.exit_code == 0, done.output
    assert "evaluate: cider x 100 " in done.output and "with media shuffled" in done.output


def test_bad_recipe(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    refused(cli("extract", toy(), "--set", "train.lrr=1"), "train.lrr", "did you mean lr?")
    refused(cli("train", tmp_path / "gone.yaml"), "gone.yaml", "cannot read")
    refused(cli("train", toy(), "--set", "device=tpu9"), "device: 'tpu9'", "try auto")


def test_missing_and_broken_image(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    (tmp_path / "images" / "3.png").unlink()
    refused(cli("extract", recipe), "1 media", "images/3.png")
    before = {p: p.read_bytes() for p in (tmp_path / "features").rglob("c.*")}
    assert before
    (tmp_path / "images" / "4.png").write_bytes(b"\x89PNG broken")
    refused(
        cli("extract", recipe), "2 media", "images/3.png", "images/4.png", "data.bad_media=skip"
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    refused(cli("predict", tmp_path, "--image", recipe, "--ask", "y"), "not a run folder")


def test_question_file_with_a_missing_field(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    data = tmp_path / "toy.jsonl"
    lines = data.read_text().splitlines()
    record = json.loads(lines[4])
    del record["media"]
    data.write_text("\n".join([*lines[:4], json.dumps(record), *lines[5:]]))
    refused(cli("extract", recipe), "toy.jsonl, line 5: field 'media' is missing")
    assert not (tmp_path / "features").exists()


def test_training_before_extraction(cli: Cli, toy: Toy) -> None:
    refused(cli("train", toy()), "no feature set here; run `extract`")


def test_cache_of_another_encoder(cli: Cli, toy: Toy, vit_folder: Path, tmp_path: Path) -> None:
    recipe = toy()
    cli("extract", recipe)
    other = tmp_path / "vit"
    shutil.copytree(vit_folder, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    refused(
        cli("train", recipe, "--set", f"encoder.weights={other}"), "no feature set fits", "weights:"
    )
    refused(cli("train", recipe, "--set", "encoder.final_norm=false"), "final_norm: True there")
    assert cli("train", recipe).exit_code == 0


def test_run_folder_without_weights(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe, run = toy(), tmp_path / "runs" / "toy"
    cli("run", recipe)
    shutil.rmtree(run / "checkpoints")
    refused(cli("evaluate", run), "holds no trained weights", "run `train` first")
    refused(cli("evaluate", tmp_path), "not a run folder")


def test_prediction_of_a_broken_image(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    cli("run", toy())
    run, image = tmp_path / "runs" / "toy", tmp_path / "broken.jpg"
    image.write_bytes(b"no image")
    refused(
        cli("predict", run, "--image", image, "--ask", "what?"), "broken.jpg: cannot be decoded"
    )
    refused(cli("predict", run, "--image", tmp_path / "no.jpg", "--ask", "what?"), "no.jpg")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lm.weights=/nowhere", ["/nowhere", "no such file or folder"]),
        ("variant.encoder_layers=9", ["variant.encoder_layers: 9 wanted, the encoder has 6"]),
        (
            f"text.special_tokens={[f'<{i}>' for i in range(200)]}",
            ["special_tokens", "embedding rows"],
        ),
        ("train.batch_size=5000", ["train.batch_size"]),
        ("encoder.image_size=5", ["encoder.image_size: vit_tiny_patch16_224 cannot see 5 pixels"]),
        (f"seed={2**64}", ["seed: Input should be less than 18446744073709551616"]),
    ],
)
def test_what_does_not_fit(cli: Cli, toy: Toy, override: str, words: list[str]) -> None:
    recipe = toy()
    cli("extract", recipe)
    refused(cli("train", recipe, "--set", override), *words)


def test_lm_folder_that_is_none(cli: Cli, toy: Toy, tmp_path: Path, vit_folder: Path) -> None:
    recipe = toy()
    cli("extract", recipe)
    for command in ("train", "run"):
        refused(
            cli(command, recipe, "--set", f"lm.weights={vit_folder}"),
            "LM family 'timm_wrapper' is not one of",
        )
    refused(cli("train", recipe, "--set", f"lm.weights={recipe}"), "neither a model folder nor")


def test_overwrite_keeps_the_old_run_when_the_new_recipe_cannot_train(
    cli: Cli, toy: Toy, tmp_path: Path
) -> None:
    recipe, run = toy(), tmp_path / "runs" / "toy"
    cli("run", recipe)
    refused(cli("train", recipe, "--overwrite", "--set", "train.batch_size=5000"), "batch_size")
    assert cli("evaluate", run).exit_code == 0


def test_a_run_whose_encoder_was_replaced(
    cli: Cli, toy: Toy, tmp_path: Path, vit_folder: Path
) -> None:
    own = tmp_path / "vit"
    shutil.copytree(vit_folder, own)
    recipe, run = toy(encoder={"weights": str(own)}), tmp_path / "runs" / "toy"
    cli("run", recipe)
    weights = bytearray((own / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (own / "model.safetensors").write_bytes(weights)
    image = tmp_path / "images" / "11.png"
    refused(cli("predict", run, "--image", image, "--ask", "what?"), "trained on other features")
    cli("extract", recipe)
    refused(cli("evaluate", run), "trained on other features", "weights:")


def test_evaluation_split_is_checked_first(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    data = tmp_path / "toy.jsonl"
    lines = [line for line in data.read_text().splitlines() if '"test"' not in line]
    data.write_text("\n".join(lines))
    refused(cli("run", recipe), "evaluate.split", "train, val")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lm.weights=/nowhere", ["/nowhere", "no such file or folder"]),
        ("variant.inject_start=99", ["variant.inject_start"]),
        ("decode.max_new_tokens=5000", ["decode.max_new_tokens: 5000 after a prompt"]),
        ("train.batch_size=5000", ["train.batch_size: 5000 wanted"]),
    ],
)
def test_training_is_checked_first(
    cli: Cli, toy: Toy, tmp_path: Path, override: str, words: list[str]
) -> None:
    refused(cli("run", toy(), "--set", override), *words)
    assert not (tmp_path / "features").exists()


def test_run_folder_is_checked_first(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    Run.create(load_recipe(recipe)).metrics.touch()
    refused(cli("run", recipe, "--set", "train.lr=1"), "run of another recipe", "train.lr: 0.01")
    refused(cli("run", recipe, "--set", f"runs={recipe}"), f"runs: {recipe} is no folder")
    assert not (tmp_path / "features").exists()


def test_folders_that_cannot_be_written_to(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe, run = toy(), tmp_path / "runs" / "toy"
    for root in (recipe, recipe / "features"):  # a file is in the way
        words = [f"store.root: {root} cannot be written to", "Not a directory", "set another"]
        refused(cli("extract", recipe, "--set", f"store.root={root}"), *words)
        online = ("--set", "encoder.online=true", "--set", f"store.root={root}")
        refused(cli("train", recipe, *online), *words)
    assert cli("run", recipe).exit_code == 0
    (run / "scores.json").unlink()
    (run / "scores.json").mkdir()
    words = [f"run folder: {run} cannot be written to", "Is a directory"]
    refused(cli("evaluate", run), *words)
    refused(cli("export", run, recipe), f"export FOLDER: {recipe} cannot be written to")


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_interrupted_it_says_what_goes_on(
    cli: Cli, toy: Toy, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epalm.commands.stages.train", interrupted)
    done = cli("train", toy(), *flags)
    assert done.exit_code == 130
    again = "the same command without --overwrite goes on" if flags else "the same command goes on"
    assert again in done.output


def test_read_only_folders(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe, closed = toy(), tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("root writes everywhere")
    for root in (closed, closed / "features"):
        words = f"store.root: {root} cannot be written to"
        refused(cli("extract", recipe, "--set", f"store.root={root}"), words, "Permission denied")
    refused(cli("run", recipe, "--set", f"runs={closed}"), f"runs: {closed} is no folder")


def test_a_trained_run_takes_no_settings_of_training(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    run, image = Run.create(load_recipe(toy())), tmp_path / "images" / "0.png"
    for command in (("evaluate",), ("predict", "--image", image, "--ask", "what?")):
        refused(cli(*command, run.folder, "--set", "train.lr=1"), "no effect on a trained run",
                "train.lr: 0.01 there, 1.0 wanted")  # fmt: skip


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("train", "data: there are no train examples; splits that have some: val, test"),
        ("val", "train.patience: there are no val examples"),
        ("val, eager", "train.val_every: there are no val examples"),
    ],
)
def test_splits_are_checked_before_anything_is_replaced(
    cli: Cli, toy: Toy, tmp_path: Path, gone: str, message: str
) -> None:
    recipe, data = toy(), tmp_path / "toy.jsonl"
    cli("extract", recipe)
    begun = Run.create(load_recipe(recipe)).folder / "recipe.yaml"
    split = gone.split(",")[0]
    data.write_text(
        "".join(f"{x}\n" for x in data.read_text().splitlines() if f'"{split}"' not in x)
    )
    patient = ("--set", f"train.patience={1 if gone == split else 'null'}",
               "--set", "train.val_every=1")  # fmt: skip
    for command in ("run", "train"):
        refused(cli(command, recipe, *patient, "--overwrite"), message)
    assert begun.is_file()


def test_prompts_are_checked_first(cli: Cli, toy: Toy, tmp_path: Path, opt_folder: Path) -> None:
    lm = tmp_path / "lm"  # without a token that begins every text
    shutil.copytree(opt_folder, lm)
    tokenizer = json.loads((lm / "tokenizer.json").read_text())
    (lm / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    recipe = toy(lm={"weights": str(lm)}, text={"template": "{prompt}"})
    line = {"id": "caption", "media": "images/0.png", "captions": ["a circle"], "split": "train"}
    with (tmp_path / "toy.jsonl").open("a") as data:
        data.write(json.dumps(line) + "\n")
    refused(cli("run", recipe), "text.template: gives no token for an empty prompt")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("answers", "the longest prompt with its answer has"),
        ("prompt", "tokens; shorten it or raise text.max_prompt_tokens (58)"),
    ],
)
def test_training_texts_are_checked_first(
    cli: Cli, toy: Toy, tmp_path: Path, field: str, words: str
) -> None:
    """Of a training example, which no evaluation will ask."""
    recipe, data = toy(text={"max_prompt_tokens": 58}), tmp_path / "toy.jsonl"
    line, *others = data.read_text().splitlines()
    long = "a shape of no name " * 10
    record = json.loads(line) | {field: [long] if field == "answers" else long}
    data.write_text("\n".join([json.dumps(record), *others]))
    refused(cli("run", recipe), words)
    assert not (tmp_path / "features").exists()


def test_show_before_evaluation(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    recipe = toy()
    cli("extract", recipe)
    cli("train", recipe)
    refused(cli("show", tmp_path / "runs" / "toy"), "scores.json", "run `evaluate` first")


def test_a_store_that_cannot_be_written(cli: Cli, toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    root = tmp_path / "file" / "features"
    refused(cli("extract", toy(), "--set", f"store.root={root}"), str(root), "Not a directory")
