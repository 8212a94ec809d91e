"""`data check`: what it prints, what it finds, and its exit codes."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from epalm.data import read
from tests.datasets import lay_out

Check = Callable[..., Result]


@pytest.fixture
def check(toy: Callable[..., Path], tmp_path: Path, cli: Callable[..., Result]) -> Check:
    """Checks the toy dataset with these options."""
    recipe = toy()
    return lambda *options: cli("data", "check", recipe, *options)


@pytest.fixture
def lines(check: Check, tmp_path: Path) -> Callable[[Callable[[list[dict]], object]], None]:
    """Changes the toy dataset's records in place."""

    def change(edit: Callable[[list[dict]], object]) -> None:
        path = tmp_path / "toy.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        edit(records)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return change


def test_a_sound_dataset(check: Check, tmp_path: Path) -> None:
    done = check("--rows", "1")
    assert done.exit_code == 0, done.output
    head, *table = done.stdout.splitlines()
    assert head == f"toy, media in {tmp_path}"
    assert table[0].split() == ["split", "examples", "published", "media", "published", "used"]
    train = table[1].split()
    assert (train[0], train[2:5]) == ("train", ["-", "8", "-"]) and train[1] == train[5]
    assert "  train 0: images/0.png [what]" in table
    assert "    what is the blue shape?" in table
    assert "    -> rectangle" in table
    assert table[-1] == "nothing stops the recipe"
    assert "warning" not in done.output


def test_limits_show_in_what_is_used(check: Check) -> None:
    done = check("--rows", "0", "--set", "data.limits.train=2", "--set", "train.batch_size=2")
    train = next(line.split() for line in done.output.splitlines() if line.startswith("train"))
    assert int(train[5]) < int(train[1]) and train[3] == "8"


def test_missing_and_empty_media_stop_or_are_skipped(check: Check, tmp_path: Path) -> None:
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "5.png").write_bytes(b"")
    done = check()
    assert done.exit_code == 1
    assert f"stops: extraction: 1 media are missing in {tmp_path}: images/3.png" in done.output
    assert "stops: extraction: 1 media files are empty: images/5.png" in done.output
    skipped = check("--set", "data.bad_media=skip")
    assert skipped.exit_code == 0
    assert f"warning: 1 media are missing in {tmp_path}: images/3.png" in skipped.output


def test_a_name_in_another_unicode_form(check: Check, tmp_path: Path) -> None:
    """As a Mac writes it into an archive; it looks the same."""
    name = "images/\u00e4.png"
    lines = (tmp_path / "toy.jsonl").read_text()
    (tmp_path / "toy.jsonl").write_text(lines.replace("images/3.png", name))
    (tmp_path / "images" / "3.png").rename(tmp_path / unicodedata.normalize("NFD", name))
    assert f"{name} (there in another Unicode form" in check().output


def test_media_that_are_skipped_must_leave_enough(check: Check, tmp_path: Path) -> None:
    """The splits as they are left: test without media, train with too few, and nothing at all."""
    images = tmp_path / "images"
    skip = ("--set", "data.bad_media=skip")
    for number in (10, 11):
        (images / f"{number}.png").unlink()
    done = check(*skip)
    assert done.exit_code == 1
    assert "evaluate.split is test, which has no examples with usable media" in done.output
    for number in range(8):
        (images / f"{number}.png").unlink()
    done = check(*skip, "--set", "evaluate.split=val")
    assert "there are 0 training examples with usable media" in done.output
    shutil.rmtree(images)
    done = check(*skip)
    assert done.exit_code == 1
    assert "stops: extraction: of 12 media none can be used; is data.media_root" in done.output


def test_media_that_limits_leave_out_stop_nothing(check: Check, tmp_path: Path) -> None:
    limits = ("--set", "data.limits.train=4", "--set", "train.batch_size=4")
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    assert check(*limits).output.count("stops: ") == 1
    unused = check(*limits, "--set", "data.limits.val=1", "--set", "data.limits.test=1")
    assert "12 media are missing" in unused.output


def test_leaks_between_splits_and_questions_twice(
    check: Check, lines: Callable[..., None], tmp_path: Path
) -> None:
    lines(lambda records: records.append({**records[0], "id": "again", "split": "test"}))
    done = check()
    assert done.exit_code == 0
    assert "warning: 1 media stand in several splits: images/0.png" in done.output
    assert (
        "warning: 1 questions are asked about their media more than once: "
        "'what is the blue shape?' about images/0.png"
    ) in done.output


def test_a_long_question_is_cut_where_it_is_named(check: Check, lines: Callable[..., None]) -> None:
    question = {"prompt": "and what is that? " * 50}
    lines(lambda records: records.extend({**records[0], **question, "id": i} for i in "ab"))
    (warning,) = (line for line in check().output.splitlines() if "more than once" in line)
    assert len(warning) < 200 and warning.endswith("... about images/0.png")


def test_equal_content_is_found_by_its_hash(check: Check, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copyfile(images / "0.png", images / "1.png")  # both in train
    shutil.copyfile(images / "0.png", images / "11.png")  # in test
    assert "of another" not in check().output
    done = check("--hash")
    assert done.exit_code == 0
    assert (
        "warning: 2 media have the content of another: images/0.png = images/1.png = images/11.png"
    ) in done.output
    assert "warning: 1 contents stand in several splits under different names" in done.output


def test_media_that_are_no_files(check: Check, tmp_path: Path) -> None:
    image = tmp_path / "images" / "2.png"
    image.unlink()
    image.mkdir()
    done = check("--hash")
    assert done.exit_code == 1
    assert "1 media are missing" in done.output and "images/2.png" in done.output


def test_decoding_a_sample(check: Check, tmp_path: Path) -> None:
    (tmp_path / "images" / "7.png").write_bytes(b"not an image")
    done = check("--decode", "100", "--set", "encoder.workers=1")
    assert done.exit_code == 1
    assert "stops: extraction: 1 of 12 media cannot be decoded: images/7.png (" in done.output


def test_splits_that_stop_training_or_evaluation(check: Check, lines: Callable[..., None]) -> None:
    lines(lambda records: records.__delitem__(slice(3, None)))
    done = check()
    assert done.exit_code == 1
    assert "stops: training: train.batch_size is 8, there are 3 training examples" in done.output
    assert "stops: evaluation: evaluate.split is test, which has no examples" in done.output


def test_what_does_not_go_together_is_found(check: Check, lines: Callable[..., None]) -> None:
    """What `run` would say first, of splits, answers and metrics."""
    start = "train.connection_start=answers"
    for override, words in (
        ("evaluate.metrics=[nonsense]", "evaluation: evaluate.metrics: no metric 'nonsense'"),
        ("evaluate.metrics=[vqa_accuracy]", "compares with ten human answers"),
    ):
        done = check("--set", override)
        assert done.exit_code == 1 and words in done.output, done.output
    assert check("--set", "train.val_every=2", "--set", start).exit_code == 0
    lines(lambda records: records.__setitem__(
        slice(None), [r | {"answers": ["No."]} for r in records if r["split"] != "val"]
    ))  # fmt: skip
    for override, words in (
        ("train.val_every=2", "stops: training: train.val_every: there are no val examples"),
        ("train={steps: 9, batch_size: 8, patience: 1, val_every: 2}", "training: train.patience"),
        (start, "stops: training: train.connection_start: no training answers but yes, no"),
    ):
        done = check("--set", override)
        assert done.exit_code == 1 and words in done.output, done.output


def test_data_to_evaluate_other_runs_on(check: Check, lines: Callable[..., None]) -> None:
    lines(lambda records: [record.update(split="test") for record in records])
    done = check()
    assert done.exit_code == 0, done.output
    assert "warning: there is no train split: this is for runs trained on other" in done.output


def test_each_source_is_checked(
    tmp_path: Path, toy: Callable[..., Path], cli: Callable[..., Result], vit_folder: Path
) -> None:
    """One without training examples stops nothing where another has them."""
    config = lay_out("nocaps", tmp_path / "nocaps")
    files = {"test": "nocaps_val_4500_captions.json"}
    data = config.model_dump(exclude_unset=True) | {"files": files, "bad_media": "skip"}
    also = {"captions": {"data": data, "encoder": {"weights": str(vit_folder)}}}
    nowhere = cli("data", "check", toy(also=also))
    assert nowhere.exit_code == 1 and "of 3 media none can be used" in nowhere.stdout
    some = sorted(read(config).media)[0]
    (tmp_path / "nocaps" / "media").mkdir()
    (tmp_path / "nocaps" / "media" / some).write_bytes(b"x")
    done = cli("data", "check", toy(also=also))
    assert done.exit_code == 0, done.output
    assert "source captions:\nnocaps, media in" in done.stdout
    assert "source main:\ntoy, media in" in done.stdout
    assert "warning: 2 media are missing" in done.stdout
    (tmp_path / "nocaps" / "nocaps_val_4500_captions.json").write_text("[")
    broken = cli("data", "check", toy(also=also))
    assert broken.exit_code == 2
    assert "source captions: " in broken.output


def test_a_file_that_cannot_be_read(check: Check, tmp_path: Path) -> None:
    (tmp_path / "toy.jsonl").write_text('{"id": ')
    done = check()
    assert done.exit_code == 2
    assert "toy.jsonl, line 1: not valid JSON" in done.output


def test_published_counts_and_empty_texts(
    tmp_path: Path, toy: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    config = lay_out("coco", tmp_path / "coco")
    path = tmp_path / "coco" / "dataset_coco.json"
    path.write_text(path.read_text().replace('"raw": "Some coffee."', '"raw": " "'))
    for media in read(config).media.values():
        media.path.parent.mkdir(parents=True, exist_ok=True)
        media.path.write_bytes(b"x")
    recipe = toy(data=config.model_dump(exclude_unset=True), train={"batch_size": 4})
    done = cli("data", "check", recipe)
    assert done.exit_code == 0, done.output
    assert "113,287" in done.output
    assert (
        "warning: train has 4 examples about 4 media; published are 113,287 about 113,287"
    ) in done.output
    assert "warning: 1 examples have empty answers or captions: 900003" in done.output
    assert done.output.rstrip().endswith("nothing stops the recipe")
