"""Scores of captions: against pycocoevalcap called directly, numpy, Java, and by hand."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics import METRICS, java, make_metrics, spice_java
from epalm.evaluate.metrics.captions import as_tables, tokenized
from epalm.evaluate.metrics.ptb import DROPPED, ptb_tokens
from epalm.evaluate.metrics.scored import Setting
from epalm.evaluate.metrics.spice_java import LIBRARIES, MODELS, spice_values

GOLDEN = Path(__file__).parent / "golden"
PAIRS = 1200
NEEDS_JAVA = pytest.mark.skipif(
    shutil.which("java") is None, reason="no Java here, which the official programs need"
)
THINGS = ["man", "Woman", "dog", "two dogs", "t-shirt", "café", "black-and-white cat", "90's car",
          "fire-truck", "3/4-inch pipe", "A.M. radio", "young man's hat", "Straße", "日本", "none",
          "1,000 people", "children", "the U.S. flag", "Dr. Smith", "o'clock sign"]  # fmt: skip
DOINGS = ["rides", "isn't riding", "can't see", "is jumping over", "cannot hold", "they're near",
          "plays with", "who's on", "runs (quickly) to", 'says "hello" to', "looks — slowly — at",
          "has 2.5 pounds of", "waits until 10:30 for", "and/or"]  # fmt: skip
ENDS = ["", ".", " .", "!", "...", " on the beach.", ", in the snow", "; it's late", " & friends",
        " at 5 p.m.", "?!", " 😀", " for $5", " 50% off"]  # fmt: skip


def some_caption(rng: random.Random) -> str:
    article = rng.choice(["A ", "a ", "The ", "An ", "", "Some "])
    thing, doing, other = rng.choice(THINGS), rng.choice(DOINGS), rng.choice(THINGS)
    return f"{article}{thing} {doing} {rng.choice(['a ', 'the ', ''])}{other}{rng.choice(ENDS)}"


def some_pairs(seed: int) -> tuple[list[str], list[Example]]:
    """Predictions that share words with their references, some empty or nothing but signs."""
    rng = random.Random(seed)
    predictions, examples = [], []
    for number in range(PAIRS):
        texts = tuple(some_caption(rng) for _ in range(rng.choice([1, 2, 5])))
        words = (rng.choice(texts) + " " + some_caption(rng)).split()
        rng.shuffle(words)
        near = [" ".join(words[: rng.randint(1, 9)]), rng.choice(texts), some_caption(rng)]
        predictions.append(rng.choice([*near * 3, "", "...", "a a a a a"]))
        examples.append(Example(str(number), f"m{number}", "", texts, "test"))
    return predictions, examples


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[Example]]:
    return some_pairs(0)


Pairs = tuple[list[str], list[Example]]
Tables = tuple[dict[int, list[str]], dict[int, list[str]]]


@pytest.fixture(scope="module")
def tables(pairs: Pairs) -> Tables:
    return as_tables(*tokenized(*pairs, Setting()))


def test_bleu_is_that_of_the_coco_server(pairs: Pairs, tables: Tables) -> None:
    corpus, each = Bleu(4).compute_score(*tables, verbose=0)
    for order in (1, 2, 3, 4):
        scores = METRICS[f"bleu_{order}"](Setting())(*pairs)
        assert scores.value == pytest.approx(corpus[order - 1], abs=1e-9)
        assert scores.per_example == pytest.approx(np.array(each[order - 1]), abs=1e-9)
    assert corpus[3] > 0.05


def test_rouge_and_cider_are_those_of_the_coco_server(pairs: Pairs, tables: Tables) -> None:
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider()), ("cider_d", Cider())):
        corpus, each = scorer.compute_score(*tables)
        scores = METRICS[name](Setting())(*pairs)
        assert scores.value == pytest.approx(corpus, abs=1e-9)
        assert scores.per_example == pytest.approx(each, abs=1e-9)


def numpy_cider(tables: Tables, clipped: bool) -> np.ndarray:
    """CIDEr with dense vectors over all n-grams of one order at a time, from the equations."""
    references, hypotheses = tables
    values = np.zeros(len(hypotheses))
    for order in (1, 2, 3, 4):

        def count(text: str, order: int = order) -> Counter[tuple[str, ...]]:
            words = text.split()
            return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))

        held = [[count(t) for t in texts] for texts in references.values()]
        given = [count(texts[0]) for texts in hypotheses.values()]
        vocabulary = sorted({g for c in [*given, *(c for cs in held for c in cs)] for g in c})
        column = {ngram: i for i, ngram in enumerate(vocabulary)}
        documents = np.zeros(len(vocabulary))
        for counts in held:
            documents[[column[g] for g in set().union(*counts)]] += 1
        rarity = np.log(len(held)) - np.log(np.maximum(documents, 1))

        def vector(
            counts: Counter[tuple[str, ...]],
            column: dict[tuple[str, ...], int] = column,
            rarity: np.ndarray = rarity,
        ) -> np.ndarray:
            dense = np.zeros(len(column))
            dense[[column[g] for g in counts]] = list(counts.values())
            return dense * rarity

        for row, (theirs, ours) in enumerate(zip(held, given, strict=True)):
            a = vector(ours)
            for counts, text in zip(theirs, references[row], strict=True):
                b = vector(counts)
                dot = (np.minimum(a, b) if clipped else a) @ b
                cosine = dot / (np.linalg.norm(a) * np.linalg.norm(b) or 1)
                if clipped:  # the server's lengths are in bigrams
                    lengths = [max(len(t.split()) - 1, 0) for t in (hypotheses[row][0], text)]
                    cosine *= np.exp(-((lengths[0] - lengths[1]) ** 2) / 72)
                values[row] += 10 * cosine / (4 * len(theirs))
    return values


def test_cider_is_its_equation(pairs: Pairs, tables: Tables) -> None:
    for name, clipped in (("cider", True), ("cider_2015", False)):
        scores = METRICS[name](Setting())(*pairs)
        assert scores.per_example == pytest.approx(numpy_cider(tables, clipped), abs=1e-9)
        assert scores.value > 0.3


def test_aac_metrics_agree(pairs: Pairs) -> None:
    functional = pytest.importorskip(
        "aac_metrics.functional", reason="aac-metrics is not installed", exc_type=ImportError
    )
    # it takes the hard space of "5 3/4" for part of a word, pycocoevalcap for a space
    plain = [(p, e) for p, e in zip(*pairs, strict=True) if "3/4" not in f"{p} {e.references}"]
    predictions, examples = map(list, zip(*plain, strict=True))
    hypotheses, references = tokenized(predictions, examples, Setting())
    for name in ("cider_d", "bleu_1", "bleu_4", "rouge_l"):
        corpus, each = getattr(functional, name)(list(hypotheses), list(map(list, references)))
        scores = METRICS[name](Setting())(predictions, examples)
        assert scores.value == pytest.approx(float(corpus[name]), abs=1e-6)
        assert scores.per_example == pytest.approx(np.array(each[name]), abs=1e-6)


def test_repeating_a_frequent_word_pays_only_in_the_first_cider() -> None:
    texts = ["a dog runs on the grass", "a cat sleeps on the bed", "a bus stops in the street"]
    examples = [Example(str(i), str(i), "", (t,), "test") for i, t in enumerate(texts)]
    predictions = ["dog dog dog dog", *texts[1:]]
    first, clipped = (METRICS[n](Setting())(predictions, examples) for n in ("cider_2015", "cider"))
    assert first.per_example[0] > 2 * clipped.per_example[0]
    assert first.per_example[1:] == pytest.approx([10, 10])


def test_captions_without_a_word() -> None:
    empty = [Example(str(i), str(i), "", ("...",), "test") for i in range(3)]
    for name in ("cider", "cider_2015", "bleu_4"):
        assert METRICS[name](Setting())(["", "a dog", "."], empty).value == pytest.approx(
            0, abs=1e-6
        )
        assert METRICS[name](Setting())([], []).n == 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ('A man says: "Isn\'t it 10:30?"', "a man says is n't it 10:30"),
        ("A dog's (left) -- they're friends...", "a dog 's -lrb- left -rrb- they 're friends"),
        ("U.S. flags, e.g. 1,000 of 'em; cannot see.", "u.s. flags e.g. 1,000 of 'em can not see"),
        ("A black-and-white t-shirt and/or hat", "a black-and-white t-shirt and/or hat"),
        ("Don’t “quote” – 50% of $5 & £6", "do n't quote 50 % of $ 5 & # 6"),
        ("Salt &amp; pepper at an R&B show!!!", "salt & pepper at an r&b show !!!"),
        ("Number 33. Dr. No. What?!", "number 33 dr. no what ?!"),
        ("½ of a café 😀 in 日本\n\t", "1/2 of a café in 日本"),
        ("rock 'n' roll, y'all, o'clock, the '80s", "rock 'n' roll y' all o'clock the '80s"),
        ("", ""),
        ("... - ' \" ; :", ""),
    ],
)  # fmt: skip
def test_tokens(text: str, tokens: str) -> None:
    assert " ".join(ptb_tokens(text)) == tokens


@NEEDS_JAVA
def test_tokens_are_those_of_stanford() -> None:
    rng = random.Random(1)
    texts = [some_caption(rng) for _ in range(PAIRS)]
    for text, line in zip(texts, java.stanford_lines(texts), strict=True):
        assert ptb_tokens(text) == [t for t in line.split(" ") if t and t not in DROPPED], text


@NEEDS_JAVA
def test_official_scores_are_the_default_ones_on_such_texts(pairs: Pairs) -> None:
    for name in ("cider", "bleu_4", "rouge_l"):
        ours, official = (METRICS[name](Setting(official=o))(*pairs) for o in (False, True))
        assert ours.per_example == pytest.approx(official.per_example)


@NEEDS_JAVA
def test_meteor_is_that_of_the_coco_server(pairs: Pairs) -> None:
    """Recorded from pycocoevalcap's Meteor on the same tokens; each start of it takes seconds."""
    expected = json.loads((GOLDEN / "meteor.json").read_text())
    scores = METRICS["meteor"](Setting())(*pairs)
    assert scores.value == pytest.approx(expected["corpus"], abs=1e-9)
    assert scores.per_example == pytest.approx(np.array(expected["each"]), abs=1e-9)
    assert scores.n == PAIRS


def test_java_and_jars_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        for names, official in ((["meteor"], False), (["spice"], False), (["cider"], True)):
            with pytest.raises(EpalmError, match="no program `java` on the PATH"):
                make_metrics(names, Setting(official=official))
        make_metrics(["cider", "bleu_4"], Setting())  # do without
    program = tmp_path / "java"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java, "METEOR_JAR", "meteor/meteor-9.jar")
    with pytest.raises(EpalmError, match="missing .*meteor-9.jar"):
        java.require(java.METEOR_JAR)


def test_a_java_program_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(EpalmError, match="made 0 lines of 2 texts: out of memory"):
        java.stanford_lines(["a", "b"])
    with pytest.raises(EpalmError, match="meteor-1.5.jar: failed: out of memory"):
        METRICS["meteor"](Setting())(["a"], [Example("0", "m", "", ("a",), "test")])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what SPICE needs of pycocoevalcap, without the models, and a Java of our own."""
    real = java.require()
    (tmp_path / LIBRARIES).mkdir(parents=True)
    (tmp_path / "tokenizer").symlink_to(real / "tokenizer")
    # no link, as Java finds the libraries beside what a link points to
    shutil.copy(real / "spice/spice-1.0.jar", tmp_path / "spice")
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'openjdk version \"17.0.15\"' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(spice_java, "require", lambda *files: tmp_path)
    spice_values.cache_clear()
    yield tmp_path
    spice_values.cache_clear()


def test_what_spice_needs_is_named_with_its_place(package: Path) -> None:
    libraries = package / LIBRARIES
    for there, missing in (((), " and ".join(MODELS)), (MODELS[:1], MODELS[1])):
        for name in there:
            (libraries / name).touch()
        for metric in ("spice", "spider"):
            with pytest.raises(EpalmError, match=f"need {missing} in {libraries}; both are in"):
                make_metrics([metric], Setting())
    (libraries / MODELS[1]).touch()
    without = "this Java {} does not have: use a whole Java of 8 to 14, or put an engine"
    with pytest.raises(EpalmError, match=without.format(17)):
        make_metrics(["spice"], Setting())
    (libraries / "rhino.jar").touch()
    make_metrics(["spice", "spider"], Setting())
    (libraries / "rhino.jar").unlink()
    says = "#!/bin/sh\necho 'java version \"{}\"' >&2\necho java.base@11.0.13 {}\n"
    (package / "java").write_text(says.format("1.8.0_402", ""))
    make_metrics(["spice", "spider"], Setting())
    (package / "java").write_text(says.format("11.0.13", "jdk.scripting.nashorn@11.0.13"))
    make_metrics(["spice", "spider"], Setting())
    (package / "java").write_text(says.format("11.0.13", "java.scripting@11.0.13"))
    with pytest.raises(EpalmError, match=without.format(11)):
        make_metrics(["spice"], Setting())


SPICE_TEXTS = (
    "two brown dogs are playing with a red ball on the grass",
    "a woman in a blue dress is sitting on a sofa",
    "a man is holding his hat",
    *("a cat", "", "", "a dog"),
)
SPICE_REFERENCES = (
    ("a brown dog plays with a ball", "two dogs run on green grass"),
    ("a lady wearing a blue dress sits on the couch",),
    ("the man holds a black hat",),
    *(("a man in a hat",), ("a boat",), ("it",), ("",)),
)
SPICE_COUNTS = [(6, 2, 2), (3, 3, 3), (3, 0, 1), (0, 0, 3), (0, 0, 1), (0, 0, 0), (0, 1, 0)]
"""Tuples that match, that only the text has, and that only the references have.

Looked at by hand: of the first text, `ball on grass` and `ball red` are its own, `dog run on grass`
and `grass green` the references'.
"""
SPICE_F = [2 * both / max(1, 2 * both + one + other) for both, one, other in SPICE_COUNTS]


def test_spice_is_read_as_its_program_writes_it(package: Path) -> None:
    """Recorded from it: values of all sizes, nothing right, nothing said, nothing to say."""
    recorded = GOLDEN / "spice.json"
    (package / "java").write_text(
        f'#!/bin/sh\nwhile [ "$1" != -out ]; do shift; done\ncp {recorded} "$2"\n'
    )
    for name in (*MODELS, "rhino.jar"):
        (package / LIBRARIES / name).touch()
    examples = [Example(str(i), f"m{i}", "", r, "test") for i, r in enumerate(SPICE_REFERENCES)]
    scores = {name: METRICS[name](Setting())(SPICE_TEXTS, examples) for name in ("spice", "cider")}
    assert scores["spice"].per_example == pytest.approx(SPICE_F)
    assert scores["spice"].value == pytest.approx(sum(SPICE_F) / len(SPICE_F))
    # SPIDEr's is not computed again, as parsing takes minutes: a program that fails is not asked
    (package / "java").write_text("#!/bin/sh\necho 'version \"17.0.15\"' >&2\nexit 1\n")
    both = METRICS["spider"](Setting())(SPICE_TEXTS, examples)
    assert both.per_example == pytest.approx(
        (scores["spice"].per_example + scores["cider"].per_example) / 2
    )
    assert METRICS["spice"](Setting())([], []).n == 0


def test_spice_computes_what_was_recorded() -> None:
    """The real program; what the test before this one reads, it still writes."""
    try:
        METRICS["spice"](Setting())
    except EpalmError as problem:
        pytest.skip(str(problem))
    assert spice_values(SPICE_TEXTS, SPICE_REFERENCES).tolist() == pytest.approx(SPICE_F)


@NEEDS_JAVA
def test_spice_that_fails_says_why(package: Path) -> None:
    """The real program, which finds none of its libraries."""
    (package / "java").unlink()
    cause = r"spice-1.0.jar: failed: java.lang.(NoClassDefFoundError|ClassNotFoundException): "
    with pytest.raises(EpalmError, match=cause):
        spice_values(("a dog",), (("a dog",),))


def test_spice_is_that_of_the_coco_server(pairs: Pairs, tables: Tables) -> None:
    try:
        metric = METRICS["spice"](Setting())
    except EpalmError as problem:
        pytest.skip(str(problem))
    if not spice_java.brings_javascript():
        pytest.skip("pycocoevalcap finds no JavaScript engine but Java's own")
    from pycocoevalcap.spice.spice import Spice

    few = tuple({row: table[row] for row in range(100)} for table in tables)
    corpus, each = Spice().compute_score(*few)
    scores = metric(pairs[0][:100], pairs[1][:100])
    assert scores.value == pytest.approx(corpus, abs=1e-9)
    assert scores.per_example == pytest.approx([s["All"]["f"] for s in each], abs=1e-9)
