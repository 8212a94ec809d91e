"""The JSON files that the official eP-ALM code distributes, of any of its datasets.

`data.files` names the file of each split in the folder `data.path`, for example
`{train: msvd_vqa_train.json, val: msvd_vqa_val.json, test: msvd_vqa_test.json}`. Records are

    {"question_id": …, "sent": question, "label": {answer: score, …}, "img_id" or "video": …}
    {"caption": text or list of texts, "video" or "audio": file name}

Answers are drawn in training by their score (convention 18); the references hold each as often as
its score has tenths. In evaluation each of them is right, where the official code counts its score
(convention 29), which is 1 for the single answers of GQA and video QA. Of questions whose label has
no score, nothing is learnt (the official code would teach to answer nothing), and every prediction
about them is wrong. VQA v2 is better read with `kind: vqa2`, `splits: karpathy`, which knows the
ten answers. Several records about one media with captions become one example. Ids begin with the
split, as the official code keeps splits apart and nothing says that they share no id.

`data.media_name` may name {media}: the file name, or for COCO's images their folder and name.
"""

import math
import re
from pathlib import Path

from epalm.config import DataConfig
from epalm.data.annotations import Record, files_by_split, read_list
from epalm.data.collect import Collector
from epalm.data.example import Dataset
from epalm.errors import EpalmError

SETTINGS = {"media_root", "files", "media_name"}
_COCO = re.compile(r"COCO_(\w+2014)_\d{12}")


def load(config: DataConfig) -> Dataset:
    """Read all splits; EpalmError naming file, record and field."""
    if not config.files:
        raise EpalmError("data.files: name each split's file, as in {test: msvd_vqa_test.json}")
    collector = Collector(config, Path(config.path).expanduser().resolve().name)
    for split, path in files_by_split(config, {}).items():
        captioned: dict[str, tuple[Record, list[str]]] = {}
        for record in read_list(path):
            if "label" in record:
                _add_question(collector, record, split)
            else:
                captions = captioned.setdefault(_media(record), (record, []))[1]
                captions += _captions(record)
        for media, (record, captions) in captioned.items():
            collector.add(record, f"{split}/{media}", {"media": media}, "", captions, split)
    return collector.dataset()


def _add_question(collector: Collector, record: Record, split: str) -> None:
    answers = _answers(record.record("label"))
    if split == "train" and not answers:
        return
    has_types = "question_type" in record
    collector.add(
        record,
        f"{split}/{record.identifier('question_id')}",
        {"media": _media(record)},
        record.text("sent" if "sent" in record else "question"),
        answers,
        split,
        record.text("answer_type") if "answer_type" in record else "",
        {"question_type": record.text("question_type")} if has_types else {},
        unanswered=not answers,
    )


def _answers(label: Record) -> list[str]:
    """Each answer as often as its share of the scores, in tenths, says."""
    scores = {answer: label.score(answer) for answer in label.keys()}
    times = {answer: max(round(10 * score), 1) for answer, score in scores.items() if score}
    common = math.gcd(*times.values())
    return [answer for answer, count in times.items() for _ in range(count // common)]


def _captions(record: Record) -> list[str]:
    try:
        return record.texts("caption", empty=True)
    except EpalmError:  # a single one
        return [record.text("caption", empty=True)]


def _media(record: Record) -> str:
    for key in ("video", "audio"):
        if key in record:
            return record.text(key)
    image = record.identifier("img_id")
    match = _COCO.fullmatch(image)
    return f"{match[1]}/{image}.jpg" if match else f"{image}.jpg"
