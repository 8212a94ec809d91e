"""GQA's further scores, on questions whose right values are worked out by hand."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epalm.config import DataConfig, load_recipe
from epalm.data import load_dataset, read
from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics import METRICS, default_metrics, make_metrics
from epalm.evaluate.metrics.gqa import gqa_consistency
from epalm.evaluate.metrics.normalise import normalise
from epalm.evaluate.metrics.scored import Scores, Setting
from epalm.evaluate.metrics.summary import summarise
from epalm.evaluate.scores import evaluation_metrics
from epalm.evaluate.significance import differences
from epalm.train.run import Run

SEATS = ["chair", "sofa", "table", "bench"]
COLORS = ["red", "blue", "White"]
# id: group, reference, detailed type, valid, plausible, entailed
QUESTIONS: dict[str, tuple[str | None, str, str, list[str], list[str], list[str]]] = {
    "01": ("furniture", "chair", "categoryThis", SEATS, ["chair", "table"], ["05", "07", "01"]),
    "02": ("furniture", "chair", "categoryThis", SEATS, ["chair", "table"], []),
    "03": ("furniture", "chair", "categoryThis", SEATS, ["chair", "table"], []),
    "04": ("furniture", "table", "categoryThis", SEATS, SEATS, []),
    "05": ("color", "red", "directOf", COLORS, ["red"], ["06"]),
    "06": ("color", "blue", "directOf", COLORS, ["blue", "White"], []),
    "07": (None, "yes", "verifyAttr", ["yes", "no"], ["yes", "no"], ["06"]),
    "08": (None, "shape", "twoCommon", ["sofa"], ["sofa"], []),
}
PREDICTIONS = {
    "01": "chair", "02": "table", "03": "Sofa.", "04": "table", "05": " Red", "06": "the white",
    "07": "maybe", "08": "material",
}  # fmt: skip


def question(key: str, balanced: bool = True) -> dict[str, Any]:
    group, answer, detailed, *_, entailed = QUESTIONS[key]
    return {
        "question": f"question {key}?", "imageId": f"n{int(key) % 3}", "answer": answer,
        "entailed": entailed, "isBalanced": balanced, "groups": {"global": group, "local": None},
        "types": {"structural": "query", "semantic": "obj", "detailed": detailed},
    }  # fmt: skip


def write(folder: Path, name: str = "val_balanced_questions.json") -> DataConfig:
    """The questions; in a file of all, those of blue are not balanced."""
    balanced = {key: "_all_" not in name or key != "06" for key in QUESTIONS}
    questions = {key: question(key, balanced[key]) for key in QUESTIONS}
    (folder / name).write_text(json.dumps(questions))
    choices = {key: {"valid": q[3], "plausible": q[4]} for key, q in QUESTIONS.items()}
    (folder / "val_choices.json").write_text(json.dumps(choices | {"99": {}}))
    return DataConfig(kind="gqa", path=str(folder), files={"val": name})


def score(name: str, config: DataConfig, examples: tuple[Example, ...]) -> Scores:
    setting = Setting(data=config, split="val")
    return METRICS[name](setting)([PREDICTIONS[e.id] for e in examples], examples)


def test_validity_and_plausibility(tmp_path: Path) -> None:
    """Sofa is a seat, but no plausible one; maybe is no answer to yes or no.

    What two things have in common is color, material or shape, whatever the file has.
    """
    config = write(tmp_path)
    examples = read(config).split("val")
    valid = score("gqa_validity", config, examples)
    assert valid.per_example.tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    assert (valid.value, valid.n) == (7 / 8, 8)
    plausible = score("gqa_plausibility", config, examples)
    assert plausible.per_example.tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert plausible.value == 6 / 8


def test_no_choices_are_no_mistake(tmp_path: Path) -> None:
    """The official script finds nothing in an empty list, and does not look at a common one's."""
    config = write(tmp_path)
    path = tmp_path / "val_choices.json"
    nothing = {"valid": [], "plausible": []}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"01": nothing, "08": nothing}))
    valid = score("gqa_validity", config, read(config).split("val"))
    assert valid.per_example.tolist() == [0, 1, 1, 1, 1, 1, 0, 1]


def test_distribution_is_the_mean_chi_square_of_the_groups(tmp_path: Path) -> None:
    """Furniture: chair 3 times, answered once, and table once, answered twice.

    That is (1 - 3)^2 / 3 + (2 - 1)^2 / 1 = 7 / 3, of four questions. Color: red and blue once each,
    red answered once and blue never: 0 + 1, of two. Weighed by questions: (4 * 7/3 + 2 * 1) / 6.
    """
    config = write(tmp_path)
    examples = read(config).split("val")
    found = score("gqa_distribution", config, examples)
    printed = (4 * 7 / 3 + 2) / 6 / 100  # by the official script, which divides by 100
    assert 100 * found.value == pytest.approx(printed, abs=1e-12)
    assert found.n == 6
    assert found.at([0, 1, 2, 3]).value == pytest.approx(7 / 3 / 10_000)
    assert np.isnan(found.at([6, 7]).value)
    summary = summarise(found, examples, seed=0)
    assert summary["interval"] is None
    assert summary["value"] == found.value and summary["by_type"]["query"]["n"] == 6
    right = METRICS["gqa_distribution"](Setting(data=config, split="val"))
    assert right([e.references[0] for e in examples], examples).value == 0


def test_consistency_and_the_balanced_questions_of_a_file_of_all(tmp_path: Path) -> None:
    """Chair (01) entails red (05), which is right, and yes (07), which is not.

    Red entails blue (06), which is wrong. Table (04) entails nothing. So 1/2 and 0.
    """
    predictions = list(PREDICTIONS.values())
    examples = read(write(tmp_path)).split("val")
    assert gqa_consistency(predictions, examples).value == 1 / 4
    config = write(tmp_path, "val_all_questions.json")
    examples = read(config).split("val")
    assert {e.id for e in examples if e.types["balanced"] == "no"} == {"06"}
    # what is not balanced is still entailed, and counts no more by itself
    assert gqa_consistency(predictions, examples).value == 1 / 4
    assert score("gqa_validity", config, examples).n == 7
    # of colors only red is left
    assert score("gqa_distribution", config, examples).value == pytest.approx(
        4 * 7 / 3 / 5 / 10_000
    )


def test_they_are_the_naive_ones(tmp_path: Path) -> None:
    """The official script's loops, on answers once normalised."""
    rng = random.Random(0)
    words = [
        "red",
        "Red.",
        "the red",
        "blue",
        "日本",
        "none",
        "2",
        "two",
        "t-shirt",
        "",
        "1,000",
        "naïve",
    ]
    questions, choices, predictions = {}, {}, {}
    for number in range(1500):
        key = f"{number:04}"
        group = rng.choice([None, "color", "size", "thing"])
        questions[key] = question("01") | {
            "groups": {"global": group, "local": None},
            "answer": rng.choice([word for word in words if word]),
        }
        questions[key]["types"]["detailed"] = rng.choice(["categoryThis", "sameCommon"])
        some = [rng.sample(words[:5] + words[6:9], rng.randint(1, 5)) for _ in range(2)]
        choices[key] = {"valid": some[0], "plausible": some[1]}
        predictions[key] = rng.choice([*words, "Shape", "a color"])
    (tmp_path / "val_balanced_questions.json").write_text(json.dumps(questions))
    (tmp_path / "val_choices.json").write_text(json.dumps(choices))
    config = DataConfig(kind="gqa", path=str(tmp_path))
    examples = read(config).split("val")
    setting = Setting(data=config, split="val")
    given = [predictions[e.id] for e in examples]
    for name in ("valid", "plausible"):
        expected = []
        for key, prediction in predictions.items():
            group = choices[key][name]
            if "Common" in questions[key]["types"]["detailed"]:
                group = ["color", "material", "shape"]
            expected.append(any(normalise(prediction) == normalise(choice) for choice in group))
        metric = METRICS["gqa_validity" if name == "valid" else "gqa_plausibility"](setting)
        scores = metric(given, examples)
        assert scores.per_example.tolist() == expected
        assert 0.1 < scores.value < 0.9
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for key, each in questions.items():
        if (group := each["groups"]["global"]) is not None:
            gold[group][normalise(each["answer"])] += 1
            said[group][normalise(predictions[key])] += 1
    total = 0.0
    for group, counts in gold.items():
        square = sum((said[group][answer] - n) ** 2 / n for answer, n in counts.items())
        total += square * counts.total()
    scores = METRICS["gqa_distribution"](setting)(given, examples)
    expected = total / sum(counts.total() for counts in gold.values())
    assert 10_000 * scores.value == pytest.approx(expected)


def test_scores_follow_the_files(tmp_path: Path) -> None:
    config = write(tmp_path)
    examples = read(config).split("val")

    def default(split: str) -> tuple[str, ...]:
        return default_metrics(examples, Setting(data=config, split=split))

    always = ("normalised_match", "gqa_consistency", "gqa_distribution")
    assert default("val") == (*always, "gqa_validity", "gqa_plausibility")
    assert default("test") == always
    (tmp_path / "val_choices.json").unlink()
    assert default("val") == always
    with pytest.raises(EpalmError, match="gqa_validity needs the choices of the val split, such"):
        make_metrics(["gqa_validity"], Setting(data=config, split="val"))
    with pytest.raises(EpalmError, match="gqa_distribution is read from GQA's own files"):
        make_metrics(["exact_match", "gqa_distribution"], Setting())
    with pytest.raises(EpalmError, match="gqa_distribution is better the lower it is"):
        make_metrics(["gqa_distribution"], Setting(data=config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"03": None}, "field '03' is None; it must be an object"),
        ({"03": {"valid": SEATS}}, "03: field 'plausible' is missing"),
        ({"03": {"valid": "a", "plausible": SEATS}}, "03: field 'valid' is 'a'; it must be a list"),
        ({"03": {"valid": SEATS, "plausible": [float("nan")]}}, "03: field 'plausible' is nan"),
    ],
)
def test_broken_choices(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = write(tmp_path)
    examples = read(config).split("val")
    path = tmp_path / "val_choices.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | change))
    with pytest.raises(EpalmError, match=words) as error:
        score("gqa_validity", config, examples)
    assert str(error.value).startswith(f"{path}")
    del whole["03"]
    path.write_text(json.dumps(whole))
    with pytest.raises(EpalmError, match="field '03' is missing"):
        score("gqa_plausibility", config, examples)
    path.write_text(json.dumps(whole)[:-9])
    with pytest.raises(EpalmError, match="val_choices.json: not valid JSON"):
        score("gqa_validity", config, examples)


def test_questions_need_groups_for_their_distribution(tmp_path: Path) -> None:
    config = write(tmp_path)
    examples = read(config).split("val")
    path = tmp_path / "val_balanced_questions.json"
    whole = json.loads(path.read_text())
    del whole["02"]["groups"]
    path.write_text(json.dumps(whole))
    with pytest.raises(EpalmError, match="questions.json, 02: field 'groups' is missing"):
        score("gqa_distribution", config, examples)
    whole["02"] |= {"groups": {"global": 7}}
    path.write_text(json.dumps(whole))
    with pytest.raises(EpalmError, match="02, groups: field 'global' is 7"):
        score("gqa_distribution", config, examples)


def two_runs(
    toy: Callable[..., Path], config: DataConfig, answer: Callable[[str], str]
) -> list[Run]:
    """Both with these predictions, by question id."""
    data = {"kind": "gqa", "path": config.path, "files": config.files}
    runs = []
    for name in ("a", "b"):
        recipe = load_recipe(toy(name=name, data=data, evaluate={"split": "val"}))
        run = Run.create(recipe)
        lines = [
            json.dumps({"id": e.id, "references": e.references, "prediction": answer(e.id)})
            for e in load_dataset(recipe).split("val")
        ]
        (run.folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        runs.append(run)
    return runs


def test_two_runs_are_not_compared_by_their_distribution(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    """It is in scores.json, but cannot be resampled; the recipe names no metrics."""
    config = write(tmp_path)
    runs = two_runs(toy, config, PREDICTIONS.__getitem__)
    dataset = load_dataset(runs[0].recipe)
    metrics = evaluation_metrics(runs[0].recipe, dataset)
    of_kind = default_metrics(dataset.split("val"), Setting(data=config, split="val"))
    assert list(metrics) == list(of_kind)
    assert differences(*runs).keys() == metrics.keys() - {"gqa_distribution"}


def test_two_runs_are_not_compared_by_what_neither_has(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Of wrong answers alone no consistency follows; a difference of two such is no finding."""
    found = differences(*two_runs(toy, write(tmp_path), lambda _: "neither"))
    assert "normalised_match" in found and "gqa_consistency" not in found
