"""GQA: questions about relations, attributes and objects in Visual Genome's images.

`data.path` is a folder with the official `train_balanced_questions.json`,
`val_balanced_questions.json` and `testdev_balanced_questions.json` (our test split; the official
test has no public answers). `data.files` chooses others; of `val_all_questions.json` and the like,
a type says which questions are balanced. Full answers are ignored, as in the paper.

`data.media_name` may name {image}.
"""

from epalm.config import DataConfig
from epalm.data.annotations import distinct, files_by_split, read_object
from epalm.data.collect import Collector
from epalm.data.example import Counts, Dataset

SETTINGS = {"media_root", "files", "media_name"}
FILES = {
    "train": "train_balanced_questions.json",
    "val": "val_balanced_questions.json",
    "test": "testdev_balanced_questions.json",
}
PUBLISHED = {
    "train_balanced_questions.json": Counts(943000, 72140),
    "val_balanced_questions.json": Counts(132062, 10234),
    "testdev_balanced_questions.json": Counts(12578, 398),
}


def load(config: DataConfig) -> Dataset:
    """Read questions with one answer; the structural type is the example's type.

    Raises:
        EpalmError: naming file, record and field.
    """
    collector = Collector(config, "gqa", "{image}.jpg")
    for split, path in files_by_split(config, FILES).items():
        questions = read_object(path, distinct(path))
        all_of_them = "_all_" in path.name
        for identifier in questions.keys():
            record = questions.record(identifier)
            types = record.record("types")
            further = {"semantic": types.text("semantic"), "detailed": types.text("detailed")}
            if all_of_them:
                further["balanced"] = "yes" if record.boolean("isBalanced") else "no"
            entailed = [] if split == "train" else record.identifiers("entailed")
            collector.add(
                record,
                identifier,
                {"image": record.identifier("imageId")},
                record.text("question"),
                [record.text("answer")],
                split,
                types.text("structural"),
                further,
                [other for other in entailed if other != identifier],
            )
    return collector.dataset()


def published(config: DataConfig) -> dict[str, Counts]:
    """Questions and images of each split (the GQA paper and its files)."""
    return {s: PUBLISHED[f] for s, f in (config.files or FILES).items() if f in PUBLISHED}
