"""Each way in which annotation files go wrong, in each dataset of the paper: one message a fault.

It names file, record and field. What one dataset's reader does beside this is in
test_data_readers.py.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import Result

from epalm.config import DataConfig
from epalm.data import read
from epalm.errors import EpalmError
from tests.datasets import lay_out, write_media

DATASETS = ("vqa2", "gqa", "coco", "nocaps", "cc3m", "msrvtt", "msrvtt-qa", "msvd-qa", "audiocaps",
            "clotho")  # fmt: skip
LEFT_OUT = object()


class Fault(NamedTuple):
    """A change to a file, and the message that follows.

    Attributes:
        file: that is changed.
        change: the file's text -> the text with the mistake.
        message: the message's beginning behind `FOLDER/`.
    """

    file: str
    change: Callable[[str], str]
    message: str


def json_at(*place: Any, to: Any) -> Callable[[str], str]:
    """Puts a value into JSON, or leaves it out."""

    def change(text: str) -> str:
        tree = json.loads(text)
        parent = tree
        for key in place[:-1]:
            parent = parent[key]
        if to is LEFT_OUT:
            del parent[place[-1]]
        else:
            parent[place[-1]] = to
        return json.dumps(tree)

    return change


def repeated(*place: Any) -> Callable[[str], str]:
    """The first record of a list once more at its end."""

    def change(text: str) -> str:
        tree = json.loads(text)
        records = tree[place[0]] if place else tree
        records.append(records[0])
        return json.dumps(tree)

    return change


def cells(line: int, values: dict[int, str]) -> Callable[[str], str]:
    """Other cells in a line of a table; its delimiter is the tab where it has tabs."""

    def change(text: str) -> str:
        mark = "\t" if "\t" in text else ","
        quoting = csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL
        rows = list(csv.reader(io.StringIO(text), delimiter=mark, quoting=quoting))
        for column, value in values.items():
            rows[line - 1][column : column + 1] = [value]
        stream = io.StringIO()
        if mark == "\t":
            stream.writelines(mark.join(row) + "\n" for row in rows)
        else:
            csv.writer(stream, lineterminator="\n").writerows(rows)
        return stream.getvalue()

    return change


def line_again(line: int) -> Callable[[str], str]:
    return lambda text: text + text.splitlines(keepends=True)[line - 1]


def cut(mark: str) -> Callable[[str], str]:
    """All before the last of such a sign."""
    return lambda text: text[: text.rindex(mark)]


QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
GQA = "val_balanced_questions.json"
COCO = "dataset_coco.json"
NOCAPS = "nocaps_val_4500_captions.json"
CC3M = "Train_GCC-training.tsv"
MSRVTT = "test_videodatainfo.json"
QA = "test_qa.json"
AUDIOCAPS = "val.csv"
CLOTHO = "clotho_captions_evaluation.csv"
NAN = float("nan")
NO_ANSWER = "has no answer or caption that is not empty"

FAULTS: dict[str, dict[str, Fault]] = {
    "truncated": {
        **{
            case: Fault(file, cut("}"), f"{file}: not valid JSON (")
            for case, file in (
                ("vqa2", ANNOTATIONS), ("gqa", GQA), ("coco", COCO), ("nocaps", NOCAPS),
                ("msrvtt", MSRVTT), ("msrvtt-qa", QA), ("msvd-qa", QA),
            )
        },
        "cc3m": Fault(CC3M, cut("\t"), f"{CC3M}, line 3: has 1 cells where 2 columns are"),
        "audiocaps": Fault(AUDIOCAPS, cut(","), f"{AUDIOCAPS}, line 3: has 3 cells where 4"),
        "clotho": Fault(CLOTHO, cut(","), f"{CLOTHO}, line 3: has 5 cells where 6 columns are"),
    },
    "wrong type": {
        "vqa2": Fault(QUESTIONS, json_at("questions", 1, "question", to=7),
                      f"{QUESTIONS}, questions 1: field 'question' is 7; it must be a text"),
        "gqa": Fault(GQA, json_at("09000005", "question", to=["x"]),
                     f"{GQA}, 09000005: field 'question' is ['x']; it must be a text"),
        "coco": Fault(COCO, json_at("images", 2, "sentences", to="A cat."),
                      f"{COCO}, images 2: field 'sentences' is 'A cat.'; it must be a list"),
        "nocaps": Fault(NOCAPS, json_at("images", 1, "file_name", to={"x": 1}),
                        f"{NOCAPS}, images 1: field 'file_name' is {{'x': 1}}; it must be a text"),
        "msrvtt": Fault(MSRVTT, json_at("sentences", 1, to="a man"),
                        f"{MSRVTT}, sentences 1: must be an object, not 'a man'"),
        "msrvtt-qa": Fault(QA, json_at(1, "answer", to=True),
                           f"{QA}, record 1: field 'answer' is True; it must be a text"),
        "msvd-qa": Fault(QA, json_at(1, "video_id", to="vid1452"),
                         f"{QA}, record 1: field 'video_id' is 'vid1452'; it must be a whole"),
    },
    "duplicate id": {
        "vqa2": Fault(QUESTIONS, repeated("questions"),
                      f"{QUESTIONS}, questions 5: id '900004000' stands in an earlier record too"),
        "gqa": Fault(GQA, lambda text: text.replace('"09000006":', '"09000004":'),
                     f"{GQA}, 09000004: stands there 2 times"),
        "coco": Fault(COCO, repeated("images"),
                      f"{COCO}, images 6: id '900001' stands in an earlier record too"),
        "nocaps": Fault(NOCAPS, repeated("images"),
                        f"{NOCAPS}, images 3: id '0' stands in an earlier record too"),
        "msrvtt": Fault(MSRVTT, repeated("videos"),
                        f"{MSRVTT}, videos 2: id 'video7010' stands in an earlier record too"),
        "msrvtt-qa": Fault(QA, repeated(), f"{QA}, record 3: id '500005' stands in an earlier"),
        "msvd-qa": Fault(QA, repeated(), f"{QA}, record 3: id '600005' stands in an earlier"),
        "audiocaps": Fault(AUDIOCAPS, line_again(2),
                           f"{AUDIOCAPS}, line 4: audiocap_id 90004 stands in an earlier record"),
        "clotho": Fault(CLOTHO, line_again(2),
                        f"{CLOTHO}, line 4: id 'test/house music.wav' stands in an earlier record"),
    },
    "names no media": {
        "vqa2": Fault(QUESTIONS, json_at("questions", 1, "image_id", to=LEFT_OUT),
                      f"{QUESTIONS}, questions 1: field 'image_id' is missing"),
        "gqa": Fault(GQA, json_at("09000005", "imageId", to=LEFT_OUT),
                     f"{GQA}, 09000005: field 'imageId' is missing"),
        "coco": Fault(COCO, json_at("images", 2, "filename", to=""),
                      f"{COCO}, images 2: field 'filename' is ''; it must be a text, not empty"),
        "nocaps": Fault(NOCAPS, json_at("images", 1, "file_name", to=LEFT_OUT),
                        f"{NOCAPS}, images 1: field 'file_name' is missing"),
        "msrvtt": Fault(MSRVTT, json_at("videos", 1, "video_id", to=LEFT_OUT),
                        f"{MSRVTT}, videos 1: field 'video_id' is missing"),
        "msrvtt-qa": Fault(QA, json_at(1, "video_id", to=LEFT_OUT),
                           f"{QA}, record 1: field 'video_id' is missing"),
        "msvd-qa": Fault(QA, json_at(1, "video_id", to=9999),
                         f"{QA}, record 1: video_id 9999 stands in no line of youtube_mapping.txt"),
        "audiocaps": Fault(AUDIOCAPS, cells(3, {1: ""}),
                           f"{AUDIOCAPS}, line 3: field 'youtube_id' is ''"),
        "clotho": Fault(CLOTHO, cells(3, {0: " "}), f"{CLOTHO}, line 3: field 'file_name' is ' '"),
    },
    "no answer": {
        "vqa2": Fault(ANNOTATIONS, json_at("annotations", 1, "answers", to=[]),
                      f"{QUESTIONS}, questions 1: {NO_ANSWER}"),
        "gqa": Fault(GQA, json_at("09000005", "answer", to=" "),
                     f"{GQA}, 09000005: field 'answer' is ' '; it must be a text, not empty"),
        "coco": Fault(COCO, json_at("images", 2, "sentences", to=[]),
                      f"{COCO}, images 2: {NO_ANSWER}"),
        "nocaps": Fault(NOCAPS, json_at("annotations", to=[]), f"{NOCAPS}, images 0: {NO_ANSWER}"),
        "cc3m": Fault(CC3M, cells(2, {0: " "}),
                      f"{CC3M}, line 2: field 'caption' is ' '; it must be a text, not empty"),
        "msrvtt": Fault(MSRVTT, json_at("sentences", to=[]), f"{MSRVTT}, videos 0: {NO_ANSWER}"),
        "msrvtt-qa": Fault(QA, json_at(1, "answer", to=""),
                           f"{QA}, record 1: field 'answer' is ''; it must be a text, not empty"),
        "msvd-qa": Fault(QA, json_at(1, "answer", to=""),
                         f"{QA}, record 1: field 'answer' is ''; it must be a text, not empty"),
        "audiocaps": Fault("train.csv", cells(3, {3: ""}), f"train.csv, line 3: {NO_ANSWER}"),
        "clotho": Fault(CLOTHO, cells(3, dict.fromkeys(range(1, 6), "")),
                        f"{CLOTHO}, line 3: {NO_ANSWER}"),
    },
    "NaN": {
        "vqa2": Fault(ANNOTATIONS, json_at("annotations", 1, "answers", 3, "answer", to=NAN),
                      f"{ANNOTATIONS}, annotations 1, answers 3: field 'answer' is nan"),
        "gqa": Fault(GQA, json_at("09000005", "answer", to=NAN),
                     f"{GQA}, 09000005: field 'answer' is nan"),
        "coco": Fault(COCO, json_at("images", 2, "sentences", 1, "raw", to=NAN),
                      f"{COCO}, images 2, sentences 1: field 'raw' is nan"),
        "nocaps": Fault(NOCAPS, json_at("annotations", 5, "image_id", to=NAN),
                        f"{NOCAPS}, annotations 5: field 'image_id' is nan"),
        "msrvtt": Fault(MSRVTT, json_at("sentences", 1, "caption", to=NAN),
                        f"{MSRVTT}, sentences 1: field 'caption' is nan"),
        "msrvtt-qa": Fault(QA, json_at(1, "id", to=NAN), f"{QA}, record 1: field 'id' is nan"),
        "msvd-qa": Fault(QA, json_at(1, "video_id", to=NAN),
                         f"{QA}, record 1: field 'video_id' is nan"),
    },
}  # fmt: skip
IMPOSSIBLE = {
    "wrong type": {"cc3m", "audiocaps", "clotho"},
    "NaN": {"cc3m", "audiocaps", "clotho"},  # cells of tables are texts
    "duplicate id": {"cc3m"},
    "names no media": {"cc3m"},  # rows have their number as id and as name of the image
}


def test_every_fault_is_tried_in_every_dataset() -> None:
    for kind, faults in FAULTS.items():
        assert faults.keys() | IMPOSSIBLE.get(kind, set()) == set(DATASETS), kind


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, faults in FAULTS.items() for case in faults]
)
def test_malformed(kind: str, case: str, tmp_path: Path) -> None:
    fault = FAULTS[kind][case]
    config = lay_out(case, tmp_path)
    path = tmp_path / fault.file
    path.write_text(fault.change(path.read_text()))
    with pytest.raises(EpalmError) as error:
        read(config)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/{fault.message}"), message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("case", DATASETS)
def test_missing_media_are_named(
    case: str, tmp_path: Path, cli: Callable[..., Result], toy: Callable[..., Path]
) -> None:
    """One of them: `data check` says which before anything is encoded."""
    folder = tmp_path / "dataset"
    config: DataConfig = lay_out(case, folder)
    dataset = read(config)
    anything = tmp_path / "anything"
    anything.write_bytes(b"x")
    write_media(dataset, folder / "media", [anything])
    gone = sorted(dataset.media)[1]
    (folder / "media" / gone).unlink()
    data = config.model_dump(exclude_unset=True)
    split = next(iter(dataset.counts()))
    done = cli("data", "check", toy(data=data, evaluate={"split": split}))
    assert done.exit_code == 1, done.output
    words = f"stops: extraction: 1 media are missing in {folder / 'media'}: {gone}; data.bad_media"
    assert words in done.output
