"""Scores of answers: against recorded official results, and against naive second formulations."""

import hashlib
import json
import random
from collections import Counter
from itertools import combinations
from math import nan
from pathlib import Path

import numpy as np
import pytest

from epalm.config import DataConfig, load_recipe
from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics import METRICS, default_metrics, make_metrics
from epalm.evaluate.metrics.exact import strict_match
from epalm.evaluate.metrics.gqa import gqa_consistency
from epalm.evaluate.metrics.normalise import _CONTRACTIONS, normalise, strip_punctuation
from epalm.evaluate.metrics.normalised import normalised_match, normalised_match_top1k
from epalm.evaluate.metrics.scored import Setting, mean_scores
from epalm.evaluate.metrics.summary import summarise
from epalm.evaluate.metrics.vqa import vqa_accuracy, vqa_accuracy_2017

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "metrics.json").read_text())
PAIRS = 3000
SIGNS = [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`',
         ',', '?', '!']  # fmt: skip
NUMBERS = "zero one two three four five six seven eight nine ten".split()
WORDS = [
    *("none zero two ten a an the The A CAT cat dogs dont wont its it's somebody'd youre").split(),
    *(
        "1,000 3.5 5. .5 u.s.a. t-shirt black-white on/off 10:30 (left) [b] $5 50% & ' . , - ?"
    ).split(),
    *("naïve STRASSE straße 日本 😀 İ ﬁ \u00a0 \u2003 e\u0301 ... , _ @home `q` \\ = > !").split(),
    "." * 40,
]


def some_text(rng: random.Random) -> str:
    joint = rng.choice([" ", " ", "", "-", ", ", ",", ". ", "\t", "\n"])
    words = rng.choices(WORDS, k=rng.choice([0, 1, 1, 2, 3, 5]))
    return rng.choice(["", " ", "\n"]) + joint.join(words) + rng.choice(["", "", " ", "."])


def example(number: int, answers: tuple[str, ...], **more: object) -> Example:
    return Example(str(number), f"m{number}", "?", answers, "test", **more)


def naive_punctuation(text: str) -> str:
    commas = any(
        a.isdecimal() and b == "," and c.isdecimal()
        for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    neighbours = {a + b for a, b in zip(text, text[1:], strict=False)}
    left = text
    for sign in SIGNS:
        gone = commas or bool({sign + " ", " " + sign} & neighbours)  # of the text as given
        left = "".join(("" if gone else " ") if c == sign else c for c in left)
    kept, stops = "", 0
    for at, letter in enumerate(left):
        if letter == "." and not left[at + 1 : at + 2].isdecimal() and stops < 32:
            stops += 1
        else:
            kept += letter
    return kept


def naive_normalise(text: str) -> str:
    text = naive_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    out = []
    for word in text.lower().split():
        if word in NUMBERS:
            word = str(NUMBERS.index(word))
        if word == "none":
            word = "0"
        if word not in ("a", "an", "the"):
            out.append(_CONTRACTIONS.get(word, word))  # the table has a test of its own
    return " ".join(out)


def test_normalisation_is_the_recorded_one() -> None:
    given = [normalise(text) for text in GOLDEN["strings"]]
    assert given == GOLDEN["processed"] == GOLDEN["normalize_answer"]


def test_normalisation_is_the_naive_one() -> None:
    rng = random.Random(0)
    for text in (some_text(rng) for _ in range(PAIRS)):
        assert normalise(text) == naive_normalise(text), repr(text)


def test_contractions_are_those_of_the_script() -> None:
    """Its entries less those that capitals make unreachable and those that change nothing."""
    rows = json.dumps(sorted(_CONTRACTIONS.items())).encode()
    expected = "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"
    assert hashlib.sha256(rows).hexdigest() == expected


def vqa_golden() -> tuple[list[str], list[Example]]:
    examples = [
        Example(key, key, "?", tuple(answers), "test", kinds[1], {"question_type": kinds[0]})
        for (key, answers), kinds in zip(
            GOLDEN["vqa_gt"].items(), GOLDEN["vqa_types"].values(), strict=True
        )
    ]
    return [GOLDEN["vqa_pred"][e.id] for e in examples], examples


def test_vqa_2017_is_the_recorded_one() -> None:
    predictions, examples = vqa_golden()
    scores = vqa_accuracy_2017(predictions, examples)
    assert dict(zip([e.id for e in examples], scores.per_example * 100, strict=True)) == (
        pytest.approx(GOLDEN["vqa_per_question"])
    )
    summary = summarise(scores, examples, seed=0)
    official = GOLDEN["vqa_accuracy"]
    assert 100 * summary["value"] == pytest.approx(official["overall"])
    for ours, theirs in (
        (summary["by_type"], official["perAnswerType"]),
        (summary["by"]["question_type"], official["perQuestionType"]),
    ):
        assert {k: 100 * part["value"] for k, part in ours.items()} == pytest.approx(theirs)
        assert sum(part["n"] for part in ours.values()) == len(examples)


def test_vqa_since_2021_normalises_both_sides_alike() -> None:
    predictions, examples = vqa_golden()
    scores = vqa_accuracy(predictions, examples)
    # 3: "two" among "2" and "two"; 6: "none" ten times over; 7: "a dog" four times of ten
    assert scores.per_example * 100 == pytest.approx([100, 60, 100, 100, 30, 100, 100, 100])


@pytest.mark.parametrize("metric", [vqa_accuracy, vqa_accuracy_2017])
def test_vqa_is_the_mean_over_all_choices_of_nine(metric: object) -> None:
    rng = random.Random(1)
    predictions, examples, expected = [], [], []
    for number in range(PAIRS):
        pool = [some_text(rng) for _ in range(rng.choice([1, 2, 3, 6]))]
        answers = tuple(rng.choices(pool, k=10))
        prediction = rng.choice([*pool, some_text(rng)])
        predictions.append(prediction)
        examples.append(example(number, answers))
        if metric is vqa_accuracy_2017:
            theirs = answers if len(set(answers)) == 1 else tuple(map(strip_punctuation, answers))
            given = normalise(prediction)
        else:
            plain = [
                t.replace("\n", " ").replace("\t", " ").strip() for t in (prediction, *answers)
            ]
            if len(set(plain[1:])) > 1:
                plain = [normalise(text) for text in plain]
            given, theirs = plain[0], tuple(plain[1:])
        nines = [min(1, sum(t == given for t in nine) / 3) for nine in combinations(theirs, 9)]
        expected.append(sum(nines) / 10)
    scores = metric(predictions, examples)
    assert scores.per_example == pytest.approx(expected, abs=1e-12)
    assert 0.05 < scores.value < 0.95  # the pairs are neither all right nor all wrong


def test_vqa_needs_enough_people() -> None:
    with pytest.raises(EpalmError, match="example 0 has 1: use exact_match"):
        vqa_accuracy(["yes"], [example(0, ("yes",))])
    for name in ("vqa_accuracy", "vqa_accuracy_2017"):  # before anything is trained
        with pytest.raises(EpalmError, match="example 1 has 3: use exact_match"):
            make_metrics([name], Setting(scored=[example(1, ("yes",) * 3)]))


def test_normalised_match_is_the_recorded_one() -> None:
    labels = GOLDEN["gqa_labels"]
    examples = [Example(k, k, "?", tuple(label), "test") for k, label in labels.items()]
    predictions = [GOLDEN["gqa_pred"][k] for k in labels]
    assert normalised_match(predictions, examples).value == GOLDEN["gqa_normalized"]
    raw = [p in e.references for p, e in zip(predictions, examples, strict=True)]
    assert np.mean(raw) == GOLDEN["gqa_raw"]  # why predictions are stripped


def test_normalised_match_is_the_naive_one() -> None:
    rng = random.Random(2)
    examples = [example(i, (some_text(rng),)) for i in range(PAIRS)]
    predictions = [rng.choice([e.references[0].upper(), some_text(rng)]) for e in examples]
    expected = [
        naive_normalise(p) == naive_normalise(e.references[0])
        for p, e in zip(predictions, examples, strict=True)
    ]
    scores = normalised_match(predictions, examples)
    assert scores.per_example.tolist() == expected
    assert 0.1 < scores.value < 0.9


def test_top1k_counts_questions_with_frequent_answers() -> None:
    frequent = [example(i, (f"word{i % 1000}",)) for i in range(2000)]
    training = [*frequent, example(0, ("Rare!",)), example(1, ("rarer",))]
    metric = normalised_match_top1k(Setting(training=training))
    examples = [example(0, ("Word5.",)), example(1, ("rare",)), example(2, ("word7",))]
    scores = metric(["word5", "rare", "no"], examples)
    assert scores.per_example == pytest.approx([1, nan, 0], nan_ok=True)
    assert (scores.value, scores.n) == (0.5, 2)
    assert summarise(metric(["x"], examples[1:2]), examples[1:2], 0) == {
        "value": None, "interval": None, "n": 0,
    }  # fmt: skip


def some_questions(seed: int) -> tuple[list[str], list[Example]]:
    """Answered rightly, in other spelling, or otherwise; each entails some of the others."""
    rng = random.Random(seed)
    examples = [
        example(i, (some_text(rng),), entails=tuple(str(rng.randrange(2 * PAIRS)) for _ in "ab"))
        for i in range(PAIRS)
    ]
    predictions = []
    for one in examples:
        (answer,) = one.references
        near = [answer, f" {answer}\n", answer.upper(), f"the {answer}."]
        predictions.append(rng.choice([*near, some_text(rng)]))
    return predictions, examples


def test_matches_are_the_naive_ones() -> None:
    predictions, examples = some_questions(3)
    pairs = [(p, e.references[0]) for p, e in zip(predictions, examples, strict=True)]
    strict = [len(p.strip()) == len(a.strip()) and a.strip() in p for p, a in pairs]
    exact = [p.casefold().strip() == a.casefold().strip() for p, a in pairs]
    assert METRICS["strict_match"](Setting())(predictions, examples).per_example.tolist() == strict
    assert METRICS["exact_match"](Setting())(predictions, examples).per_example.tolist() == exact
    assert 0.2 < np.mean(strict) < np.mean(exact) < 0.95


def test_consistency_is_the_naive_one() -> None:
    predictions, examples = some_questions(4)
    right = {
        e.id: naive_normalise(p) == naive_normalise(e.references[0])
        for p, e in zip(predictions, examples, strict=True)
    }
    shares = []
    for one in examples:
        there = [right[other] for other in one.entails if other in right]
        if right[one.id] and there:
            shares.append(sum(there) / len(there))
    scores = gqa_consistency(predictions, examples)
    assert scores.n == len(shares) > 1000
    assert scores.value == pytest.approx(sum(shares) / len(shares))


def test_top1k_is_the_naive_one() -> None:
    rng = random.Random(5)
    # most words stand for many answers, so that the thousandth is no rare one
    training = [example(i, (f"{some_text(rng)} {rng.randrange(9)}",)) for i in range(4 * PAIRS)]
    counts = Counter(naive_normalise(e.references[0]) for e in training)
    known = set(sorted(counts, key=lambda text: (-counts[text], text))[:1000])
    examples, predictions = (
        training[:PAIRS],
        [rng.choice(training).references[0] for _ in range(PAIRS)],
    )
    predictions = [
        rng.choice([p, e.references[0]]) for p, e in zip(predictions, examples, strict=True)
    ]
    expected = [
        naive_normalise(p) == naive_normalise(e.references[0])
        for p, e in zip(predictions, examples, strict=True)
        if naive_normalise(e.references[0]) in known
    ]
    scores = normalised_match_top1k(Setting(training=training))(predictions, examples)
    assert PAIRS > scores.n == len(expected) > 1000
    assert scores.value == pytest.approx(np.mean(expected))


def test_top1k_needs_training_answers() -> None:
    with pytest.raises(EpalmError, match="use normalised_match"):
        make_metrics(["normalised_match_top1k"], Setting())


def test_strict_match_compares_characters() -> None:
    examples = [example(i, ("red",)) for i in range(4)]
    scores = strict_match([" red", "Red", "red.", "red shirt"], examples)
    assert scores.per_example.tolist() == [1, 0, 0, 0]


def test_consistency_is_about_what_right_answers_entail() -> None:
    examples = [
        example(0, ("yes",), entails=("1", "2", "elsewhere")),
        example(1, ("red",), entails=("0",)),
        example(2, ("no",), entails=("0", "1")),  # answered wrongly: does not count
        example(3, ("cat",), entails=("elsewhere",)),  # nothing of it is here
        example(4, ("dog",)),
    ]
    scores = gqa_consistency(["yes", "Red", "yes", "cat", "dog"], examples)
    assert scores.per_example == pytest.approx([0.5, 1, nan, nan, nan], nan_ok=True)
    assert scores.value == 0.75


def test_scores_of_no_examples_and_of_empty_answers() -> None:
    for name in ("exact_match", "strict_match", "vqa_accuracy", "normalised_match"):
        metric = METRICS[name](Setting())
        assert metric([], []).n == 0
        assert metric([""], [example(0, ("yes",) * 10)]).value == 0


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(EpalmError, match="no metric 'vqa_acuracy'; did you mean vqa_accuracy?"):
        make_metrics(["vqa_acuracy"], Setting())
    with pytest.raises(EpalmError, match="known: exact_match, "):
        make_metrics(["perplexity"], Setting())
    for value in ("[]", "[cider, cider]"):
        with pytest.raises(EpalmError, match="at least one metric, and none twice"):
            load_recipe(ROOT / "recipes" / "demo.yaml", (f"evaluate.metrics={value}",))


def test_default_metrics_follow_the_dataset() -> None:
    asked, shown = example(0, ("yes",)), Example("1", "m", "", ("a dog",), "test")

    def default(kind: str, one: Example, official: bool = False) -> tuple[str, ...]:
        data = DataConfig(kind=kind, path="nowhere")
        return default_metrics([one], Setting(official=official, data=data))

    assert default("jsonl", asked) == ("exact_match",)
    assert default("vqa2", asked) == ("vqa_accuracy",)
    assert default("msvd-qa", asked) == default("epalm-json", asked) == ("normalised_match",)
    assert default("epalm-json", shown)[0] == "cider"
    captions = default("coco", shown)
    assert captions[0] == "cider" and not {"meteor", "spice"} & set(captions)
    assert {"meteor", "spice", "spider"} < set(default("coco", shown, official=True))


def test_summary_breaks_down_by_every_type() -> None:
    examples = [
        Example(str(i), f"m{i}", "?", ("a",), "test", "xy"[i % 2], {"length": "short"})
        for i in range(6)
    ]
    summary = summarise(mean_scores([1, 0, 1, 0, 1, 1]), examples, seed=0)
    assert {k: (v["value"], v["n"]) for k, v in summary["by_type"].items()} == {
        "x": (1.0, 3),
        "y": (pytest.approx(1 / 3), 3),
    }
    assert summary["by"]["length"]["short"]["value"] == summary["value"]
    low, high = summary["interval"]
    assert low <= summary["value"] <= high
    assert json.loads(json.dumps(summary)) == summary
