"""Evaluations that are interrupted, batched otherwise, shared by processes, or held elsewhere."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from PIL import Image

from epalm.config import load_recipe
from epalm.errors import EpalmError
from epalm.evaluate import generation
from epalm.evaluate.elsewhere import elsewhere
from epalm.evaluate.generation import generate_answers
from epalm.evaluate.order import evaluation_batches
from epalm.evaluate.partial import PartialAnswers, binding_of
from epalm.evaluate.scores import evaluate
from epalm.train.checkpoint import save_weights
from epalm.train.parts import Parts
from epalm.train.progress import Progress
from epalm.train.run import Run
from tests.test_cli import refused

Cli = Callable[..., Result]


@pytest.fixture
def parts(prepare: Callable[..., Parts]) -> Parts:
    """An untrained model whose answers depend on the image; batches of 4."""
    parts = prepare("decode.batch_size=4")
    for parameter in parts.model.trained["connection"].parameters():
        parameter.data *= 20
    return parts


@pytest.fixture
def run(parts: Parts) -> Run:
    """The same as a run folder."""
    run = Run.create(parts.recipe)
    save_weights(run.best, parts.model, Progress())
    run.bind_features(parts.features.spec)
    return run


def test_batches_waste_little() -> None:
    media = ["a", "b", "c"] * 40
    lengths = [5 + (7 * n) % 13 for n in range(120)]
    sources = ["x" if n < 60 else "y" for n in range(120)]
    batches = evaluation_batches(sources, media, lengths, 8)
    assert sorted(place for batch in batches for place in batch) == list(range(120))
    assert [len(batch) for batch in batches] == [8] * 15
    assert [sources[p] for batch in batches for p in batch] == sorted(sources)
    assert lengths[batches[0][0]] == max(lengths)
    padded = sum(len(batch) * max(lengths[p] for p in batch) for batch in batches)
    assert sum(lengths) / padded > 0.85
    prefixes = sum(len({media[p] for p in batch}) for batch in batches)
    assert prefixes < 120 / 3  # at most so many where every media stood alone in groups of 3


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(parts: Parts, beams: int) -> None:
    """In float32; in bfloat16 rounding alone, which padding changes, turns a near tie."""
    examples = parts.dataset.split("test")
    found = []
    for size in (1, 5, 64):
        update = {"batch_size": size, "num_beams": beams, "max_new_tokens": 4}
        decode = parts.recipe.decode.model_copy(update=update)
        found.append(
            generate_answers(parts.model, parts.codec, parts.features, examples, decode)
        )  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 5


class Interrupting:
    """`generate_texts` that is interrupted after some batches, and counts prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None):
        self.prompts, self.after, self.real = 0, after, generation.generate_texts
        monkeypatch.setattr(generation, "generate_texts", self)

    def __call__(self, model: object, codec: object, prompts: Sequence[str], *rest: object):
        if self.after == 0:
            raise KeyboardInterrupt
        if self.after is not None:
            self.after -= 1
        self.prompts += len(prompts)
        return self.real(model, codec, prompts, *rest)


def partial_files(run: Run) -> list[Path]:
    return sorted(run.folder.glob("partial-*"))


def test_an_interrupted_evaluation_goes_on(
    parts: Parts, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = evaluate(run, parts)
    whole = (run.folder / "predictions.jsonl").read_text()
    run.scores.unlink()
    total = scores["examples"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupting(patch, after=3)
        evaluate(run, parts)
    (file,) = partial_files(run)
    assert len(file.read_text().splitlines()) == 3
    file.write_bytes(file.read_bytes()[:-5])  # a kill while a line was written

    with monkeypatch.context() as patch:
        counted = Interrupting(patch)
        assert evaluate(run, parts) | {"seconds": 0, "rates": 0} == scores | {
            "seconds": 0, "rates": 0
        }  # fmt: skip
    assert counted.prompts == 2 * total - 8  # both passes, but for two batches
    assert (run.folder / "predictions.jsonl").read_text() == whole
    assert partial_files(run) == []


def test_an_interrupted_control_leaves_the_answers(
    parts: Parts, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(parts.dataset.split("test"))
    batches = -(-total // 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupting(patch, after=batches + 1)
        evaluate(run, parts)
    with monkeypatch.context() as patch:
        counted = Interrupting(patch)
        evaluate(run, parts)
    assert counted.prompts == total - 4


def test_another_evaluation_starts_anew(parts: Parts) -> None:
    """Other weights, number format of the LM, examples, content of media, decoding; but the batch
    size of greedy answers does not matter."""
    examples = parts.dataset.examples

    def binding(examples: Sequence = examples, content: str = "", **changes: object) -> str:
        recipe = parts.recipe.model_copy(
            update={"decode": parts.recipe.decode.model_copy(update=changes)}
        )
        shown = [(e.media, content) for e in parts.dataset.examples]
        return binding_of(recipe, "features", parts.model, examples, shown)

    first = binding()
    same = {first, binding(batch_size=2)}
    drawn = {binding(do_sample=True), binding(do_sample=True, batch_size=2)}
    others = {binding(num_beams=2), binding(examples[::-1]), binding(content="x")}
    with torch.no_grad():
        next(parts.model.trained.parameters())[0] += 1
    others.add(binding())
    parts.model.lm.to(torch.bfloat16)  # as `lm.dtype: auto` would on another device
    others.add(binding())
    parts.model.lm.to(torch.float16)
    others.add(binding())
    assert (len(same), len(drawn), len(others)) == (1, 2, 6)
    assert len(same | drawn | others) == 9


def test_processes_see_what_all_have_answered(tmp_path: Path) -> None:
    one, other = (PartialAnswers(tmp_path, "evaluate", "x", place, 2) for place in (0, 1))
    one.add({0: "a\u2028", 3: "b"}, 2.0)
    other.add({1: "c"}, 4.0)
    alone = PartialAnswers(tmp_path, "evaluate", "x")
    assert alone.answers == {0: "a\u2028", 3: "b", 1: "c"} and alone.seconds == 3.0
    assert PartialAnswers(tmp_path, "evaluate", "y").answers == {}
    assert PartialAnswers(tmp_path, "control", "x").answers == {}


@pytest.mark.parametrize("answers", ['{"one": "a"}', '{"1": 2}', '"a"'])
def test_partial_answers_that_were_changed_are_refused(tmp_path: Path, answers: str) -> None:
    line = f'{{"answers": {answers}, "seconds": 1.0}}\n'
    (tmp_path / "partial-evaluate-x-0.jsonl").write_text(line)
    with pytest.raises(EpalmError, match=r"partial-evaluate-x-0\.jsonl.* answers"):
        PartialAnswers(tmp_path, "evaluate", "x")


def test_a_changed_bit_of_an_answer_is_noticed(tmp_path: Path) -> None:
    PartialAnswers(tmp_path, "evaluate", "x").add({0: "red", 3: "blue"}, 2.0)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("blue", "glue"))
    with pytest.raises(EpalmError, match=r"partial-evaluate-x-0\.jsonl.* not as they were"):
        PartialAnswers(tmp_path, "evaluate", "x")


def test_evaluation_on_another_dataset(cli: Cli, run: Run, tmp_path: Path) -> None:
    assert cli("evaluate", run.folder).exit_code == 0
    before = run.scores.read_text()
    images = tmp_path / "other"
    images.mkdir()
    lines = []
    for number, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (40, 40), colour).save(images / f"{colour}.png")
        lines.append({"id": number, "media": f"{colour}.png", "prompt": "what color?",
                      "answers": [colour], "split": "test"})  # fmt: skip
    data = images / "other.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "other.yaml"
    recipe.write_text(f"extends: toy.yaml\nname: other\ndata: {{path: {data}, name: null}}\n")
    refused(cli("evaluate", run.folder, "--on", recipe), "run `extract`")
    assert cli("extract", recipe).exit_code == 0
    done = cli("evaluate", run.folder, "--on", recipe)
    assert done.exit_code == 0, done.output
    there = run.folder / "on" / "other"
    own, found = (json.loads((f / "scores.json").read_text()) for f in (run.folder, there))
    words = f"a difference of {100 * (found['accuracy'] - own['accuracy']):+.1f}"
    assert words in done.output and "others than those" not in done.output
    assert "the gap is" not in done.output  # no run was trained on the other data
    assert (found["examples"], run.scores.read_text()) == (3, before)
    report = (there / "report.html").read_text()
    assert words in report and report.count("<img") == 3
    shown = cli("show", there)
    assert shown.exit_code == 0 and "extract" not in shown.output
    compared = cli("compare", run.folder, there)
    assert "toy-on-other" in compared.output
    target = tmp_path / "runs" / "other"
    target.mkdir()
    better = found["metrics"]["exact_match"] | {"value": found["accuracy"] + 0.125}
    better = found | {"metrics": {"exact_match": better}}
    (target / "scores.json").write_text(json.dumps(better))
    assert "the gap is -12.5." in cli("evaluate", run.folder, "--on", recipe).output


def test_a_trained_run_is_scored_as_it_was_trained(cli: Cli, run: Run) -> None:
    run.scores.write_text("of before")
    for override, said in (
        ("variant.inject_start=1", "variant.inject_start: None there, 1 wanted"),
        ("variant={prompt_length: 3}", "variant.encoder_layers: 3 there"),
        ("text.template='Q {prompt} A'", "text.template: "),
        ("lm.weights=x", "lm.weights: "),
        ("seed=9", "seed: 0 there, 9 wanted"),
        ("data.limits.test=1", "data.limits.test: None there, 1 wanted"),
    ):
        refused(cli("evaluate", run.folder, "--set", override), "makes another of it", f"  {said}")
    assert run.scores.read_text() == "of before"


def test_what_may_be_set_is_said(cli: Cli, run: Run) -> None:
    changes = {
        "lm.dtype": "'float32' there, 'bfloat16' wanted",
        "decode.max_new_tokens": "3 there, 2 wanted",
        "evaluate.control": "True there, False wanted",
        "text.max_prompt_tokens": "256 there, 99 wanted",
    }
    values = {key: words.split()[2].strip("'") for key, words in changes.items()}
    options = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    assert "Not as its recipe" not in cli("evaluate", run.folder).output
    done = cli("evaluate", run.folder, *options)
    assert done.exit_code == 0, done.output
    report = html.unescape((run.folder / "report.html").read_text())
    for key, words in changes.items():
        assert f"Not as its recipe says: {key}: {words}." in done.output
        assert f"Not as its recipe says: {key}: {words}." in report
        assert f"Not as its recipe says: {key}: {words}." in cli("show", run.folder).output
    done = cli("evaluate", run.folder, "--set", "store.placement=ram")
    assert done.exit_code == 0 and "Not as its recipe" not in done.output


def encoder(folder: Path, depth: int) -> Path:
    """Another random ViT of the toy's width."""
    torch.manual_seed(9)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(model, folder, model_args=size, safe_serialization=True)
    return folder


def test_evaluation_with_another_encoder_is_said(cli: Cli, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    other = encoder(tmp_path / "vit", depth=6)
    override = ("--set", f"encoder.weights={other}", "--set", "seed=4")
    cli("extract", recipe, *override)
    done = cli("evaluate", run.folder, "--on", recipe, *override)
    assert done.exit_code == 0, done.output
    assert "others than those of the training" in done.output and "differ in weights" in done.output
    assert "No gap: neither the run itself nor" in done.output
    deep = ("--set", f"encoder.weights={encoder(tmp_path / 'deep', depth=8)}")
    cli("extract", recipe, *deep)
    refused(
        cli("evaluate", run.folder, "--on", recipe, *deep),
        "has 8 layers of width 24, the run was trained on 6 of width 24",
    )


@pytest.mark.parametrize("ending", ["png", "html"])
def test_runs_are_drawn_side_by_side(cli: Cli, run: Run, tmp_path: Path, ending: str) -> None:
    cli("evaluate", run.folder)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    out = tmp_path / "new" / f"both.{ending}"
    done = cli("compare", run.folder, run.folder, "--paired", "--out", out)
    assert done.exit_code == 0, done.output
    if ending == "png":
        with Image.open(out) as picture:
            assert picture.size[0] == 1380
    else:
        page = out.read_text()
        assert "<svg" in page and "95% interval" in page
        assert f"{run.folder} less {run.folder}" in page
    unknown = cli("compare", run.folder, "--out", tmp_path / "x.pdf")
    refused(unknown, "must end in .png or .html")
    assert "trained" not in unknown.output  # before the table
    in_the_way = run.metrics / out.name
    refused(cli("compare", run.folder, "--out", in_the_way), f"compare --out: {run.metrics} cannot")


def test_recipes_of_several_sources_are_not_mixed(run: Run) -> None:
    tree = load_recipe(run.folder / "recipe.yaml").model_dump()
    two = run.recipe.model_validate(
        tree | {"also": {"more": {"data": tree["data"], "encoder": tree["encoder"]}}}
    )
    with pytest.raises(EpalmError, match="one source"):
        elsewhere(run, two)


def test_scores_that_were_changed_are_refused(cli: Cli, run: Run) -> None:
    cli("evaluate", run.folder)
    written = run.scores.read_bytes()
    tree = json.loads(written)
    untyped = tree["metrics"]["exact_match"] | {"by_type": {}}
    changed = {
        b"": "Invalid JSON",
        written[:-9]: "Invalid JSON",
        b"\xff" + written: "Invalid JSON",
        b"[]": "Input should be an object",
    } | {
        json.dumps(tree | change).encode(): words
        for change, words in (
            ({"split": 5}, "split: "),
            ({"examples": "60"}, "examples: "),
            ({"accuracy": None}, "accuracy: "),
            ({"total_parameters": 0}, "total_parameters: "),
            ({"seconds": {"train": "1"}}, "seconds.train: "),
            ({"rates": {}}, "rates: "),
            ({"examples_by_type": {"x": 1}}, "examples_by_type: "),
            ({"shuffled_accuracy_by_type": {}}, "shuffled_accuracy_by_type: "),
            ({"metrics": {"exact_match": {"value": 0.5, "n": 1}}}, "exact_match.interval: "),
            ({"shuffled_metrics": {"exact_match": untyped}}, "exact_match.by_type: "),
        )
    }  # fmt: skip
    for content, words in changed.items():
        run.scores.write_bytes(content)
        for command in ("show", "compare"):
            refused(cli(command, run.folder), f"{run.scores}: not as", words, "run `evaluate")
    run.scores.write_bytes(written)
    assert cli("show", run.folder).exit_code == 0


def test_predictions_that_were_changed_are_refused(cli: Cli, run: Run) -> None:
    cli("evaluate", run.folder)
    path = run.folder / "predictions.jsonl"
    first, second, *rest = path.read_bytes().split(b"\n")
    for changed, words in (
        (second[:-1], "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"{}", "has no field 'id'"),
        (second.replace(b'"prediction": ', b'"prediction": 5, "was": '), "prediction cannot be 5"),
    ):
        path.write_bytes(b"\n".join([first, changed, *rest]))
        paired = cli("compare", run.folder, run.folder, "--paired")
        refused(paired, f"{path}, line 2: {words}", "mend the line or delete it")
