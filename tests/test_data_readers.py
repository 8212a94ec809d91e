"""Every dataset's reader: what it makes of the official format, and of broken files."""

import codecs
import copy
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epalm.config import DataConfig
from epalm.data import READERS, read, reader
from epalm.data.example import Counts, Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.normalised import normalised_match
from tests.datasets import CASES, lay_out

TEN = ("flag", "flag", "flag", "rocket", "flag", "space shuttle", "flag", "flag and rocket",
       "flag", "shuttle")  # fmt: skip
QUESTION = Example(
    "900001001",
    "train2014/COCO_train2014_000000900001.jpg",
    "What is behind the woman?",
    TEN,
    "train",
    "other",
    {"question_type": "what is"},
)
# counts by split, and one example whole
EXPECTED: dict[str, tuple[dict[str, tuple[int, int]], Example]] = {
    "vqa2": ({"train": (5, 3), "val": (5, 3)}, QUESTION),
    "vqa2-karpathy": ({"train": (6, 4), "val": (2, 1), "test": (2, 1)}, QUESTION),
    "vqa2-epalm": ({"train": (6, 4), "val": (2, 1), "test": (2, 1)}, QUESTION),
    "gqa": (
        {"train": (3, 2), "val": (3, 2), "test": (2, 2)},
        Example(
            "09000004",
            "9100003.jpg",
            "Is the cup white or blue?",
            ("white",),
            "val",
            "choose",
            {"semantic": "attr", "detailed": "chooseAttr"},
            ("09000005",),
        ),
    ),
    "coco": (
        {"train": (4, 4), "val": (1, 1), "test": (1, 1)},
        Example(
            "900005",
            "val2014/COCO_val2014_000000900005.jpg",
            "",
            (
                "A rocket lifts off at night.",
                "A rocket leaves its launch pad.",
                "The engines light the clouds.",
                "A launch over the water.",
                "A rocket with a bright flame.",
            ),
            "val",
        ),
    ),
    "nocaps": (
        {"train": (3, 3)},
        Example(
            "1", "0000000000000001.jpg", "", ("A cat looks to the side.",), "train", "near-domain"
        ),  # fmt: skip
    ),
    "cc3m": (
        {"train": (3, 3), "val": (2, 2)},
        Example("train/1", "train/00000/000000001.jpg", "", ('a cat " with one quote',), "train"),
    ),
    "msrvtt": (
        {"train": (2, 2), "val": (1, 1), "test": (2, 2)},
        Example(
            "video0",
            "video0.mp4",
            "",
            ("a rabbit walks out of its hole", "a cartoon of a big rabbit"),
            "train",
        ),  # fmt: skip
    ),
    "msrvtt-7k": (
        {"train": (3, 3), "test": (2, 2)},
        Example("video6513", "video6513.mp4", "", ("a man talks on the phone",), "train"),
    ),
    "msrvtt-qa": (
        {"train": (3, 2), "val": (1, 1), "test": (3, 2)},
        Example("500007", "video7011.mp4", "is it a cartoon?", ("yes",), "test", "other"),
    ),
    "msvd-qa": (
        {"train": (3, 2), "val": (1, 1), "test": (3, 2)},
        Example("600005", "-none0001451_5_15.avi", "where is the man?", ("car",), "test", "where"),
    ),
    "audiocaps": (
        {"train": (3, 3), "val": (1, 1), "test": (2, 2)},
        Example(
            "-none000006_20",
            "test/-none000006.wav",
            "",
            ("An eerie synthesizer plays", "Tones rise, and fall"),
            "test",
        ),  # fmt: skip
    ),
    "clotho": (
        {"train": (2, 2), "val": (1, 1), "test": (2, 2)},
        Example(
            "train/A door (1).wav",
            "development/A door (1).wav",
            "",
            (
                "A car door is shut.",
                "Someone slams a door.",
                "A thud, then nothing.",
                "A door falls shut.",
                "A heavy door closes.",
            ),
            "train",
        ),
    ),
    "epalm-gqa": (
        {"train": (2, 2), "test": (2, 2)},
        Example("test/201000008", "n910006.jpg", "What color is the motorcycle?", ("red",), "test"),
    ),
    "epalm-msrvtt-qa": (
        {"train": (3, 2), "val": (1, 1), "test": (3, 2)},
        Example("test/test0", "video7010.mp4", "where is the man?", ("car",), "test"),
    ),
    "epalm-msrvtt": (
        {"train": (3, 3), "test": (2, 2)},
        Example(
            "test/video7011.mp4",
            "video7011.mp4",
            "",
            ("a rabbit in the grass", "an animated rabbit"),
            "test",
        ),  # fmt: skip
    ),
    "epalm-audiocaps": (
        {"train": (2, 2), "test": (2, 2)},
        Example(
            "train/train/-none000002.wav",
            "train/-none000002.wav",
            "",
            ("Something explodes",),
            "train",
        ),  # fmt: skip
    ),
    "jsonl": (
        {"train": (2, 2), "test": (1, 1)},
        Example("1", "a.png", "What is behind her?", ("a flag", "flag"), "train", "what"),
    ),
    "csv": (
        {"train": (2, 2), "test": (1, 1)},
        Example("2", "b.png", "", ("a cat", "one cat"), "train"),
    ),
}


def test_every_reader_has_a_fixture() -> None:
    assert {tree["kind"] for tree in CASES.values()} == READERS.keys() - {"easy-vqa"}
    assert CASES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("case", CASES)
def test_official_format(case: str, tmp_path: Path) -> None:
    dataset = read(lay_out(case, tmp_path))
    counts, example = EXPECTED[case]
    assert dataset.counts() == {split: Counts(*some) for split, some in counts.items()}
    (found,) = [e for e in dataset.examples if e.id == example.id]
    if case == "nocaps":
        assert len(found.references) == 10
        example = Example(*[getattr(found if f == "references" else example, f)
                            for f in Example.__slots__])  # fmt: skip
    assert found == example
    assert {m.id for m in dataset.media.values()} == {e.media for e in dataset.examples}


def test_epalm_answers_stand_as_often_as_their_scores_say(tmp_path: Path) -> None:
    """VQA v2's soft scores (convention 18), read without the ten answers."""
    config = lay_out("vqa2-epalm", tmp_path)
    files = {s: f"karpathy_{s}.json" for s in ("train", "val", "test")}
    config = config.model_copy(update={"kind": "epalm-json", "splits": "standard", "files": files})
    examples = {e.id: e for e in read(config).examples}
    assert examples["train/900003000"].references == ("coffee",)
    rewritten = tmp_path / "karpathy_test.json"
    records = json.loads(rewritten.read_text())
    records[0]["label"] = {"2": 0.9, "two": 0.3, "one": 0, "three": 0.001}
    rewritten.write_text(json.dumps(records))
    assert {e.id: e for e in read(config).examples}["test/900006000"].references == (
        *["2"] * 9, *["two"] * 3, "three",
    )  # fmt: skip
    assert examples["train/900004000"].media == "val2014/COCO_val2014_000000900004.jpg"
    assert examples["train/900004000"].types == {"question_type": "what is the man"}


def test_epalm_questions_without_an_answer(tmp_path: Path) -> None:
    """The official files hold some whose answers are none of the frequent ones (convention 18)."""
    config = lay_out("vqa2-epalm", tmp_path)
    files = {s: f"karpathy_{s}.json" for s in ("train", "val", "test")}
    config = config.model_copy(update={"kind": "epalm-json", "splits": "standard", "files": files})
    before = read(config)
    for split, label in (("train", {}), ("test", {"2": 0})):
        file = tmp_path / files[split]
        records = json.loads(file.read_text())
        records[0]["label"] = label
        file.write_text(json.dumps(records))
    after = read(config)
    assert len(after.split("train")) == len(before.split("train")) - 1  # nothing to learn
    changed = next(e for e in after.examples if e.id == "test/900006000")
    assert changed.references == ()
    assert normalised_match([""], [changed]).per_example.tolist() == [0.0]  # nor is silence right


@pytest.mark.parametrize("score", [None, float("nan"), True, "1", -0.5])
def test_epalm_scores_are_numbers(score: Any, tmp_path: Path) -> None:
    config = lay_out("epalm-gqa", tmp_path)
    file = tmp_path / "train.json"
    records = json.loads(file.read_text())
    records[1]["label"] = {"cat": score}
    file.write_text(json.dumps(records))
    with pytest.raises(EpalmError, match="train.json.*1.*cat"):
        read(config)


def test_media_can_be_named_otherwise(tmp_path: Path) -> None:
    config = lay_out("msvd-qa", tmp_path).model_copy(update={"media_name": "vid{video}.mp4"})
    (tmp_path / "youtube_mapping.txt").unlink()
    assert "vid1451.mp4" in read(config).media
    for pattern in ("{vid}.mp4", "{video:q}", "{", "{0}"):
        config = config.model_copy(update={"media_name": pattern})
        with pytest.raises(EpalmError, match="data.media_name: .* it may name video in braces"):
            read(config)


def test_a_split_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    config = lay_out("gqa", tmp_path)
    (tmp_path / "train_balanced_questions.json").unlink()
    assert read(config).counts().keys() == {"val", "test"}
    named = config.model_copy(update={"files": {"test": "test_all_questions.json"}})
    with pytest.raises(EpalmError, match="test_all_questions.json: no such annotation file"):
        read(named)
    with pytest.raises(EpalmError, match=r"holds none of train.csv, val.csv, test.csv"):
        read(DataConfig(kind="audiocaps", path=str(tmp_path)))
    for kind in ("vqa2", "msrvtt"):
        with pytest.raises(EpalmError, match="data.splits: 'odd' is not one of standard, "):
            read(DataConfig(kind=kind, path=str(tmp_path), splits="odd"))
    with pytest.raises(EpalmError, match="data.files: name each split's file"):
        read(DataConfig(kind="epalm-json", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("coco", "splits", "karpathy"),
        ("vqa2", "files", {"train": "x.json"}),
        ("jsonl", "files", {"train": "x.jsonl"}),
        ("easy-vqa", "media_root", "images"),
        ("easy-vqa", "media_name", "{image}.png"),
    ],
)
def test_settings_that_a_reader_does_not_know(
    kind: str, field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(EpalmError, match=f"data.{field}: has no meaning for the kind {kind}"):
        read(DataConfig(kind=kind, path=str(tmp_path), **{field: value}))


def test_published_counts_follow_the_files(tmp_path: Path) -> None:
    config = DataConfig(
        kind="gqa", path=str(tmp_path), files={"test": "val_balanced_questions.json"}
    )
    assert reader("gqa").published(config) == {"test": Counts(132062, 10234)}
    karpathy = reader("vqa2").published(lay_out("vqa2-karpathy", tmp_path))
    standard = reader("vqa2").published(lay_out("vqa2", tmp_path))
    assert sum(c.examples for c in karpathy.values()) == sum(c.examples for c in standard.values())
    assert sum(c.media for c in karpathy.values()) == sum(c.media for c in standard.values())


# --- broken files --------------------------------------------------------------------------------


def annotation_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jsonl", ".csv", ".tsv"))


@pytest.mark.parametrize("case", CASES)
def test_a_byte_order_mark_changes_nothing(case: str, tmp_path: Path) -> None:
    config = lay_out(case, tmp_path)
    before = read(config)
    for path in annotation_files(tmp_path):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert read(config) == before


@pytest.mark.parametrize("case", CASES)
def test_files_that_are_not_what_they_should_be(case: str, tmp_path: Path) -> None:
    """Cut off, in another encoding, of another shape: one message that names the file."""
    config = lay_out(case, tmp_path)
    needed = 0
    for path in annotation_files(tmp_path):
        whole = path.read_bytes()
        text = whole.decode()
        broken = {
            "cut off": whole[: len(whole) - 30],
            "in another encoding": text.encode("utf-16"),
            "not UTF-8": whole + b"\xff",
            "empty": b"",
            "a number": b"7",
            "a list of numbers": b"[7]",
            "an object of numbers": b'{"questions": 7, "annotations": 7, "images": 7, "videos": 7}',
            "nested too deeply": b"[" * 100_000,
        }
        for fault, content in broken.items():
            path.write_bytes(content)
            try:
                read(config)
            except EpalmError as error:
                assert path.name in str(error) or str(tmp_path) in str(error), (path, fault)
                needed += 1
            else:  # such a file is not read, or what is left of the table is whole
                assert path.suffix == ".tsv" or path.name in UNREAD.get(case, ()), (path, fault)
        path.write_bytes(whole)
    assert needed >= 7


UNREAD = {
    "jsonl": ("data.csv",),
    "csv": ("data.jsonl",),
    "epalm-msrvtt": ("msrvtt_vqa_train.json", "msrvtt_vqa_val.json", "msrvtt_vqa_test.json"),
    "epalm-msrvtt-qa": ("msrvtt_caption_train7k.json", "msrvtt_caption_test.json"),
}
"""Files in a case's folder that it does not read."""

WRONG: list[Any] = [None, float("nan"), True, [], ["x", 1], {"x": 1}, " "]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside a JSON value; of lists, to the first two."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def parent_of(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


JSON_FILES = [
    ("vqa2", "v2_OpenEnded_mscoco_val2014_questions.json"),
    ("vqa2", "v2_mscoco_val2014_annotations.json"),
    ("vqa2-epalm", "karpathy_test.json"),
    ("gqa", "val_balanced_questions.json"),
    ("coco", "dataset_coco.json"),
    ("nocaps", "nocaps_val_4500_captions.json"),
    ("msrvtt", "test_videodatainfo.json"),
    ("msrvtt-qa", "test_qa.json"),
    ("msvd-qa", "val_qa.json"),
    ("epalm-gqa", "testdev.json"),
    ("epalm-msrvtt", "msrvtt_caption_test.json"),
    ("jsonl", "data.jsonl"),
]


@pytest.mark.parametrize(("case", "name"), JSON_FILES)
def test_wrong_values_load_or_are_refused_by_name(case: str, name: str, tmp_path: Path) -> None:
    """Each value of a file, replaced by each wrong one, or left out."""
    config = lay_out(case, tmp_path)
    path = tmp_path / name
    lines = path.suffix == ".jsonl"
    text = path.read_text()
    whole = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    refused = 0
    for place in places(whole):
        for wrong in (*WRONG, "left out"):
            tree = copy.deepcopy(whole)
            parent = parent_of(tree, place)
            if wrong == "left out":
                del parent[place[-1]]
            else:
                parent[place[-1]] = wrong
            path.write_text("\n".join(map(json.dumps, tree)) if lines else json.dumps(tree))
            try:
                read(config)
            except EpalmError as error:
                refused += 1
                # what is missing in one file may be found out in another, or by having no examples
                assert str(tmp_path) in str(error), (place, wrong)
    assert refused > 20


# fields that must be there, as (case, file, where one of them is)
REQUIRED = [
    ("vqa2", JSON_FILES[0][1], ("questions", 1, "question_id")),
    ("vqa2", JSON_FILES[0][1], ("questions", 1, "image_id")),
    ("vqa2", JSON_FILES[0][1], ("questions", 1, "question")),
    ("vqa2", JSON_FILES[1][1], ("annotations", 1, "question_id")),
    ("vqa2", JSON_FILES[1][1], ("annotations", 1, "answers")),
    ("vqa2", JSON_FILES[1][1], ("annotations", 1, "answers", 3, "answer")),
    ("vqa2", JSON_FILES[1][1], ("annotations", 1, "answer_type")),
    ("gqa", "val_balanced_questions.json", ("09000005", "question")),
    ("gqa", "val_balanced_questions.json", ("09000005", "answer")),
    ("gqa", "val_balanced_questions.json", ("09000005", "imageId")),
    ("gqa", "val_balanced_questions.json", ("09000005", "types")),
    ("coco", "dataset_coco.json", ("images", 2, "cocoid")),
    ("coco", "dataset_coco.json", ("images", 2, "split")),
    ("coco", "dataset_coco.json", ("images", 2, "sentences")),
    ("coco", "dataset_coco.json", ("images", 2, "sentences", 1, "raw")),
    ("nocaps", "nocaps_val_4500_captions.json", ("annotations", 5, "caption")),
    ("nocaps", "nocaps_val_4500_captions.json", ("annotations", 5, "image_id")),
    ("nocaps", "nocaps_val_4500_captions.json", ("images", 1, "file_name")),
    ("msrvtt", "test_videodatainfo.json", ("sentences", 1, "caption")),
    ("msrvtt", "test_videodatainfo.json", ("videos", 1, "video_id")),
    ("msrvtt", "test_videodatainfo.json", ("videos", 1, "split")),
    ("msrvtt-qa", "test_qa.json", (1, "answer")),
    ("msrvtt-qa", "test_qa.json", (1, "id")),
    ("msvd-qa", "test_qa.json", (1, "video_id")),
    ("epalm-gqa", "train.json", (1, "img_id")),
    ("epalm-gqa", "train.json", (1, "sent")),
    ("epalm-gqa", "train.json", (1, "question_id")),
    ("epalm-msrvtt", "msrvtt_caption_test.json", (1, "caption")),
]


@pytest.mark.parametrize(("case", "name", "place"), REQUIRED)
@pytest.mark.parametrize("wrong", ["left out", None, float("nan"), True])
def test_messages_name_file_record_and_field(
    case: str, name: str, place: tuple[Any, ...], wrong: Any, tmp_path: Path
) -> None:
    config = lay_out(case, tmp_path)
    path = tmp_path / name
    tree = json.loads(path.read_text())
    parent = parent_of(tree, place)
    if wrong == "left out":
        del parent[place[-1]]
    else:
        parent[place[-1]] = wrong
    path.write_text(json.dumps(tree))
    with pytest.raises(EpalmError) as error:
        read(config)
    message = str(error.value)
    record = next((str(key) for key in place if isinstance(key, int)), place[0])
    assert name in message and f"{record}" in message, message
    assert any(word in message for word in (place[-1], "question" if place[-1] == "sent" else "~"))
    assert "\n" not in message


@pytest.mark.parametrize("case", CASES)
def test_ids_may_be_numbers_or_texts(case: str, tmp_path: Path) -> None:
    """Spelt the other way, all ids are the same."""
    config = lay_out(case, tmp_path)
    before = read(config)

    def turned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: turned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [turned(v, key) for v in value]
        named = key in ("id", "cocoid", "question_id", "image_id", "imageId", "video_id", "img_id")
        if not named or isinstance(value, float):
            return value
        if isinstance(value, int):
            return str(value)
        return int(value) if value.isdigit() and not value.startswith("0") else value

    for path in annotation_files(tmp_path):
        if path.suffix == ".json":
            path.write_text(json.dumps(turned(json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            lines = [json.dumps(turned(json.loads(line))) for line in path.read_text().splitlines()]
            path.write_text("\n".join(lines))
    assert read(config) == before


def rows_of(path: Path) -> list[list[str]]:
    text = path.read_text()
    if path.suffix == ".tsv":
        return [line.split("\t") for line in text.splitlines()]
    return list(csv.reader(io.StringIO(text)))


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as stream:
        if path.suffix == ".tsv":
            stream.writelines("\t".join(row) + "\n" for row in rows)
        else:
            csv.writer(stream).writerows(rows)


TABLES = [("audiocaps", "val.csv", 3), ("clotho", "clotho_captions_evaluation.csv", 0),
          ("cc3m", "Train_GCC-training.tsv", 0), ("csv", "data.csv", 0)]  # fmt: skip


@pytest.mark.parametrize(("case", "name", "column"), TABLES)
def test_tables_name_the_line(case: str, name: str, column: int, tmp_path: Path) -> None:
    config = lay_out(case, tmp_path)
    path = tmp_path / name
    rows = rows_of(path)
    faults = {
        "cells where": [*rows[:-1], rows[-1][:-1]],
        "columns are": [*rows[:-1], [*rows[-1], "more"]],
    }
    if path.suffix == ".csv":
        faults |= {
            f"column '{rows[0][column]}' is missing": [
                [*r[:column], *r[column + 1 :]] for r in rows
            ],
        }
    for words, broken in faults.items():
        write_rows(path, broken)
        with pytest.raises(EpalmError, match=words) as error:
            read(config)
        assert f"{path}, line " in str(error.value)
    if path.suffix == ".csv":
        path.write_text(path.read_text() + 'x,"never closed\n')
        with pytest.raises(EpalmError, match="line "):
            read(config)


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("vqa2", JSON_FILES[0][1], "questions 5: id '900004000' stands in an earlier record"),
        ("vqa2", JSON_FILES[1][1], "annotations 5: question_id 900004000 stands in an earlier"),
        ("coco", "dataset_coco.json", "images 6: id '900001' stands in an earlier record"),
        ("nocaps", "nocaps_val_4500_captions.json", "images 3: id '0' stands in an earlier"),
        ("msrvtt", "test_videodatainfo.json", "videos 2: id 'video7010' stands in an earlier"),
        ("msrvtt-qa", "test_qa.json", "record 3: id '500005' stands in an earlier record"),
        ("epalm-gqa", "train.json", "record 2: id 'train/09000001' stands in an earlier record"),
        ("audiocaps", "test.csv", "line 6: audiocap_id 90006 stands in an earlier record"),
        ("clotho", "clotho_captions_evaluation.csv", "line 4: id 'test/house music.wav' stands"),
        ("csv", "data.csv", "line 5: id '1' stands in an earlier record"),
        ("jsonl", "data.jsonl", "line 4: id '1' stands in an earlier record"),
    ],
)
def test_duplicate_ids(case: str, name: str, words: str, tmp_path: Path) -> None:
    config = lay_out(case, tmp_path)
    path = tmp_path / name
    if path.suffix == ".json":
        tree = json.loads(path.read_text())
        key = words.split()[0]
        records = tree if isinstance(tree, list) else tree[key]
        records.append(records[0])
        path.write_text(json.dumps(tree))
    else:
        first = 0 if path.suffix == ".jsonl" else 1
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, lines[first]]) + "\n")
    with pytest.raises(EpalmError) as error:
        read(config)
    assert str(error.value).startswith(f"{path}, {words}")


def test_tables_of_another_form_say_what_to_do(tmp_path: Path) -> None:
    """As spreadsheets save them: by semicolons, blanks behind commas, in another encoding."""
    config = lay_out("csv", tmp_path)
    path = Path(config.path)
    table = path.read_text()
    for content, words in (
        (table.replace(",", ";"), "has 'id;media;prompt;.*;split;type'; commas stand between"),
        (table.replace(",", ", "), "column 'media' is missing; it has 'id', ' media', "),
        ("", "it has none; commas stand between columns"),
        (table.encode() + "Grün".encode("latin-1"), "not UTF-8 .*; save it as UTF-8"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(EpalmError, match=words) as error:
            read(config)
        assert str(error.value).startswith(str(path))


def test_a_line_of_column_names_moves_no_caption(tmp_path: Path) -> None:
    """img2dataset wants it, and numbers the images behind it."""
    config = lay_out("cc3m", tmp_path)
    before = read(config)
    table = tmp_path / "Train_GCC-training.tsv"
    table.write_text("caption\turl\n" + table.read_text())
    assert read(config).examples == before.examples
    table.write_text("caption\ta word\nurl\tcaption\n")  # these are captions
    assert [e.references for e in read(config).split("train")] == [("caption",), ("url",)]


@pytest.mark.parametrize(
    ("name", "column", "value", "line"),
    [("jsonl", "prompt", '"Again?"', "line 1"), ("jsonl", "answers", '["b"]', "line 1"),
     ("csv", "prompt", "Again?", "line 1")],
)  # fmt: skip
def test_a_field_that_stands_twice_is_refused(
    name: str, column: str, value: str, line: str, tmp_path: Path
) -> None:
    config = lay_out(name, tmp_path)
    path = Path(config.path)
    first, *rest = path.read_text().splitlines()
    if name == "jsonl":
        first = first.replace("}", f', "{column}": {value}}}')
    else:
        first, *rest = f"{first},{column}", *(f"{row},{value}" for row in rest)
    path.write_text("\n".join([first, *rest]))
    with pytest.raises(EpalmError) as error:
        read(config)
    assert str(error.value) == f"{path}, {line}, {column}: stands there 2 times"


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    """As spreadsheets leave them behind the last one."""
    config = lay_out("csv", tmp_path)
    before = read(config)
    path = Path(config.path)
    path.write_text("".join(f"{row},,\n" for row in path.read_text().splitlines()))
    assert read(config).examples == before.examples


@pytest.mark.parametrize(
    ("case", "name", "place"),
    [
        ("jsonl", "data.jsonl", ("prompt",)),
        ("jsonl", "data.jsonl", ("answers", 1)),
        ("jsonl", "data.jsonl", ("id",)),
        ("jsonl", "data.jsonl", ("media",)),
        (
            "vqa2",
            "v2_mscoco_train2014_annotations.json",
            ("annotations", 0, "answers", 2, "answer"),
        ),
    ],
)
def test_half_a_surrogate_pair_is_refused(
    case: str, name: str, place: tuple[Any, ...], tmp_path: Path
) -> None:
    """Valid JSON, but no text that UTF-8, tokenizers or file systems can hold."""
    config = lay_out(case, tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines() if case == "jsonl" else [path.read_text()]
    tree = node = json.loads(lines[0])
    for key in place[:-1]:
        node = node[key]
    whole, half = "a \U0001f600?", "a \ud800?"
    node[place[-1]] = whole
    path.write_text("\n".join([json.dumps(tree), *lines[1:]]))
    read(config)  # a whole pair is a character
    node[place[-1]] = half
    path.write_text("\n".join([json.dumps(tree), *lines[1:]]))
    with pytest.raises(EpalmError, match="holds half of a surrogate pair") as error:
        read(config)
    field = next(key for key in reversed(place) if isinstance(key, str))
    assert f"field {field!r} " in str(error.value)
    str(error.value).encode()


def test_karpathy_files_that_are_missing_are_named(tmp_path: Path) -> None:
    config = lay_out("vqa2-karpathy", tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    words = "karpathy needs dataset_coco.json or karpathy_{train,val,test}.json in "
    with pytest.raises(EpalmError) as error:
        read(config)
    assert words + str(tmp_path) in str(error.value)
    (tmp_path / "karpathy_train.json").write_text("[]")
    with pytest.raises(EpalmError, match="karpathy_val.json: no such annotation file"):
        read(config)


@pytest.mark.parametrize("image", ["../../etc/passwd", "/etc/passwd", "a\0b"])
def test_media_outside_the_root_are_refused(image: str, tmp_path: Path) -> None:
    config = lay_out("gqa", tmp_path)
    path = tmp_path / "val_balanced_questions.json"
    tree = json.loads(path.read_text())
    tree["09000005"]["imageId"] = image
    path.write_text(json.dumps(tree))
    with pytest.raises(EpalmError, match=r"09000005: media .*(leaves|cannot name)"):
        read(config)


def test_links_between_files_are_checked(tmp_path: Path) -> None:
    """A question without annotation, a video without number, an image in no Karpathy split."""
    config = lay_out("vqa2-karpathy", tmp_path)
    path = tmp_path / "dataset_coco.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({"images": tree["images"][1:]}))
    with pytest.raises(EpalmError, match="questions 0: image_id 900001 stands in none of the"):
        read(config)
    path.write_text(json.dumps(tree))
    notes = tmp_path / JSON_FILES[1][1]
    tree = json.loads(notes.read_text())
    tree["annotations"].pop()
    notes.write_text(json.dumps(tree))
    with pytest.raises(EpalmError, match="questions 4: question_id 900006001 has no annotation"):
        read(config)
    msvd = tmp_path / "msvd"
    config = lay_out("msvd-qa", msvd)
    mapping = msvd / "youtube_mapping.txt"
    mapping.write_text("".join(mapping.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(EpalmError, match="record 1: video_id 1452 stands in no line of youtube"):
        read(config)
    mapping.write_text("a vid1\nb video2\n")
    with pytest.raises(EpalmError, match="youtube_mapping.txt, line 2: must be a clip"):
        read(config)
