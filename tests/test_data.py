"""Datasets: our own format with its errors, easy-VQA, and the seeded choices."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from epalm.config import DataConfig, load_recipe
from epalm.data import easy_vqa as easy
from epalm.data import jsonl, load_dataset
from epalm.errors import EpalmError

GOOD = {"id": "1", "media": "a.png", "prompt": "what?", "answers": ["cat"], "split": "train"}


def write(folder: Path, *records: object) -> DataConfig:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return DataConfig(kind="jsonl", path=str(path))


def test_jsonl(tmp_path: Path) -> None:
    caption = {"id": 2, "media": "b.png", "captions": ["a cat", "one cat"], "split": "val"}
    dataset = jsonl.load(write(tmp_path, GOOD | {"type": "animal"}, caption))
    question, caption_example = dataset.examples
    assert dataset.name == "data"
    assert (question.prompt, question.references, question.type) == ("what?", ("cat",), "animal")
    assert (caption_example.id, caption_example.prompt) == ("2", "")
    assert caption_example.references == ("a cat", "one cat")
    assert dataset.media["a.png"].path == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"answers": None}, "'answers' must be a list"),
        ({"answers": []}, "'answers' must be a list of at least one"),
        ({"answers": [""]}, "'answers' holds ''"),
        ({"captions": ["x"]}, "exactly one of the fields 'answers' and 'captions'"),
        ({"split": "dev"}, "field 'split' is 'dev'"),
        ({"media": "../a.png"}, "leaves the media root"),
        ({"media": "/a.png"}, "leaves the media root; write it relative to that"),
        ({"media": "a\0.png"}, "cannot name a file"),
        ({"media": "\ud800.png"}, "'media' holds half of a surrogate pair"),
        ({"prompt": 7}, "field 'prompt' is 7"),
        ({"id": True}, "field 'id' is True"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_jsonl_errors_name_file_line_and_field(
    tmp_path: Path, change: dict[str, object], word: str
) -> None:
    with pytest.raises(EpalmError, match=word) as error:
        jsonl.load(write(tmp_path, GOOD, GOOD | {"id": "2"} | change))
    assert f"{tmp_path / 'data.jsonl'}, line 2" in str(error.value)


@pytest.mark.parametrize("field", ["id", "media", "prompt", "split"])
def test_jsonl_missing_field(tmp_path: Path, field: str) -> None:
    with pytest.raises(EpalmError, match=f"line 1: field '{field}' is missing"):
        jsonl.load(write(tmp_path, {k: v for k, v in GOOD.items() if k != field}))


def test_jsonl_duplicates_and_rubbish(tmp_path: Path) -> None:
    with pytest.raises(EpalmError, match="line 2: id '1' stands in an earlier record"):
        jsonl.load(write(tmp_path, GOOD, GOOD))
    with pytest.raises(EpalmError, match="holds no examples"):
        jsonl.load(write(tmp_path))
    with pytest.raises(EpalmError, match="must be one JSON object"):
        jsonl.load(write(tmp_path, [1]))
    config = write(tmp_path, GOOD)
    Path(config.path).write_text(json.dumps([GOOD], indent=1))  # valid JSON, but no lines
    with pytest.raises(EpalmError, match="line 1: not valid JSON .*; write one JSON object a line"):
        jsonl.load(config)
    Path(config.path).write_bytes(b'{"id": "\xff"}')
    with pytest.raises(EpalmError, match="line 1: not UTF-8"):
        jsonl.load(config)
    with pytest.raises(EpalmError, match="no such annotation file"):
        jsonl.load(DataConfig(kind="jsonl", path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(EpalmError, match="data.path: .* a folder, not an annotation file"):
        jsonl.load(DataConfig(kind="jsonl", path=str(tmp_path)))


def test_easy_vqa_has_its_published_counts(easy_vqa: Path) -> None:
    dataset = easy.load(DataConfig(kind="easy-vqa", path=str(easy_vqa)))
    assert Counter(e.split for e in dataset.examples) == {"train": 38575, "test": 9673}
    assert len(dataset.media) == 5000
    assert all(m.path.is_file() for m in dataset.media.values())
    answers = {e.type: set() for e in dataset.examples}
    for example in dataset.examples:
        answers[example.type].update(example.references)
    assert answers["yes/no"] == {"yes", "no"}
    assert answers["shape"] == {"rectangle", "circle", "triangle"}
    assert len(answers["color"]) == 8


def test_limits_are_seeded(toy: Callable[..., Path]) -> None:
    path = toy(data={"limits": {"train": 3}})
    once, again = load_dataset(load_recipe(path)), load_dataset(load_recipe(path))
    assert once == again
    assert len({e.media for e in once.split("train")}) == 3
    other = load_dataset(load_recipe(path, ("seed=1",)))
    assert {e.media for e in other.split("train")} != {e.media for e in once.split("train")}
    assert set(once.media) == {e.media for e in once.examples}


def test_hold_out_takes_media_whole(easy_vqa: Path) -> None:
    dataset = easy.load(DataConfig(kind="easy-vqa", path=str(easy_vqa))).hold_out(100, seed=0)
    media = {split: {e.media for e in dataset.split(split)} for split in ("train", "val", "test")}
    assert len(media["val"]) == 100
    assert not media["val"] & (media["train"] | media["test"])


def test_unknown_reader_and_double_val(toy: Callable[..., Path]) -> None:
    with pytest.raises(EpalmError, match="data.kind: 'xml' is not one of easy-vqa, vqa2"):
        load_dataset(load_recipe(toy(), ("data.kind=xml",)))
    with pytest.raises(EpalmError, match="the dataset has a val split"):
        load_dataset(load_recipe(toy(), ("data.val_from_train=2",)))


def test_held_out_media_leave_some_to_train_on(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(toy(), ("data.val_from_train=8",))
    data = tmp_path / "toy.jsonl"
    data.write_text(data.read_text().replace('"val"', '"test"'))
    with pytest.raises(EpalmError, match="data.val_from_train: 8 media wanted of 8 training media"):
        load_dataset(recipe)
