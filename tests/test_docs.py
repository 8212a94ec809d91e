"""What documents and recipe heads name is there: commands, flags, fields, files, headings."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import Result
from pydantic import BaseModel

from epalm.config import DataConfig, Recipe, load_recipe, parse_recipe
from epalm.data.example import Example
from epalm.evaluate.metrics import METRICS
from epalm.pipeline import main
from epalm.sweep import load_sweep

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language; "": those that name none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [inside for named, inside in fences if named == language]


def commands(path: Path) -> Iterator[list[str]]:
    """The words behind `python pipeline.py` or `epalm`, of every command that a file shows."""
    text = path.read_text()
    if path.suffix == ".yaml":
        shown = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    else:
        shown = "\n".join(blocks(text, ""))
        for span in re.findall(r"`((?:python pipeline\.py|epalm) [^`]+)`", text):
            shown += "\n" + " ".join(span.split())
    shown = re.sub(r"\s*\\\n\s*", " ", shown)
    for line in re.findall(r"^(?:.*pipeline\.py|epalm) (.*)$", shown, re.MULTILINE):
        command = re.split(r"\s#|;|\s{2,}", line)[0]  # what follows is said about it
        yield shlex.split(re.sub(r"\[(--[\w-]+)\]", r"\1", command))


def parse(words: list[str]) -> dict[str, Any]:
    """What click makes of a command line; it raises click.UsageError where that does not exist."""
    command: click.Command = main
    while isinstance(command, click.Group):
        if not words:
            return {}
        if words[0] not in command.commands:
            raise click.UsageError(f"no command {words[0]}")
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words)).params


@pytest.mark.parametrize("path", PAGES + RECIPES, ids=lambda p: p.stem)
def test_commands_exist_and_their_recipes_resolve(path: Path) -> None:
    for words in commands(path):
        given = parse(words)
        overrides = given.get("overrides", ())
        recipes = [ROOT / word for word in words if word.startswith("recipes/")]
        for recipe in recipes or [DEMO]:
            if recipe.parent.name == "sweeps":
                assert load_sweep(recipe, overrides)
            else:
                load_recipe(recipe, overrides)


def test_commands_are_found() -> None:
    """The pages and heads above are not empty to this test, and a wrong flag is seen."""
    assert ["predict", "runs/demo", "--image", "photo.png", "--ask",
            "what shape is in the image?"] in commands(ROOT / "README.md")  # fmt: skip
    on = next(words for words in commands(ROOT / "recipes/paper/vqa2-pt-l.yaml") if "--on" in words)
    assert parse(on)["overrides"] == ("evaluate.split=val",)
    assert sum(1 for path in PAGES for _ in commands(path)) > 30
    assert all(any(commands(path)) for path in RECIPES if path.stem != "vqa2-base")
    for wrong in (["evaluate", "runs/demo", "--one", "x"], ["cache", "lst"], ["show"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize("path", PAGES + RECIPES, ids=lambda p: p.stem)
def test_overrides_in_prose_are_fields(path: Path) -> None:
    """One by one, or together where they follow one another."""
    text = path.read_text().replace("\n# ", " ")
    override = r"--set\s+'?([\w.]+=[\w.\[\],:/-]*[\w\]])'?"
    for found in re.finditer(rf"(?:{override}[\s\\]*)+", text):
        load_recipe(DEMO, tuple(re.findall(override, found[0])))


@pages
def test_fields_exist(page: Path) -> None:
    names = "|".join(name for name, f in Recipe.model_fields.items() if is_section(f.annotation))
    for dotted in re.findall(rf"`((?:{names})(?:\.[a-z_]+)+)[`:=]", page.read_text()):
        section: Any = Recipe
        for part in dotted.split("."):
            assert part in section.model_fields, dotted
            section = section.model_fields[part].annotation


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@pages
def test_yaml_is_part_of_a_recipe(page: Path) -> None:
    """Lines that begin alike are alternatives; each must be right."""
    for block in blocks(page.read_text(), "yaml"):
        for part in re.split(r"\n(?=\w)", block.strip()):
            # from where all of `encoder` is free: the demo's own start needs kept features
            demo = load_recipe(DEMO, ("train.connection_start=random",))
            tree = demo.model_dump(mode="json")
            for section, value in yaml.safe_load(part).items():
                tree[section] = tree.get(section, {}) | value if isinstance(value, dict) else value
            parse_recipe(tree, f"{page.name}: {part}")


def test_the_walk_through_shows_the_encoder_that_is_there() -> None:
    page = (ROOT / "docs" / "adding-an-encoder.md").read_text()
    lines = [line.strip() for line in (ROOT / "extract" / "whisper.py").read_text().splitlines()]
    for block in blocks(page, "python"):
        shown = [line.strip() for line in block.splitlines() if line.strip()]
        there = [line for line in lines if line]
        assert any(there[n : n + len(shown)] == shown for n in range(len(there))), block


def test_the_dataset_reader_shown_reads(tmp_path: Path) -> None:
    shown, _ = blocks((ROOT / "docs" / "extending.md").read_text(), "python")
    reader: dict[str, Any] = {}
    exec(shown, reader)
    for split, birds in (("train", ["wren", "owl"]), ("test", ["gull"])):
        records = [{"image": f"{bird}.jpg", "captions": [f"a {bird}"]} for bird in birds]
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    dataset = reader["load"](DataConfig(kind="birds", path=str(tmp_path)))
    assert dataset.counts() == {"train": (2, 2), "test": (1, 1)}
    assert dataset.examples[2].references == ("a gull",)
    assert all(name in DataConfig.model_fields for name in reader["SETTINGS"])


def test_the_metric_shown_scores(
    toy: Callable[..., Path],
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a whole run, by the row that the page gives."""
    page = (ROOT / "docs" / "extending.md").read_text()
    scope: dict[str, Any] = {}
    exec(blocks(page, "python")[1], scope)
    (row,) = re.findall(r'`("first_word": .*)`', page)
    monkeypatch.setitem(METRICS, "first_word", eval(f"{{{row}}}", scope)["first_word"])
    done = cli("run", toy(evaluate={"metrics": ["first_word"]}, train={"steps": 1}))
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "runs" / "toy" / "scores.json").read_text())
    assert list(scores["metrics"]) == ["first_word"]
    examples = [Example("1", "a", "", ("red shoe", "a boot"), "test")] * 3
    assert scope["first_word"](["red", "a hat", ""], examples).per_example.tolist() == [1, 1, 0]


def test_your_data_runs_as_the_page_says(
    tmp_path: Path, easy_vqa: Path, opt_folder: Path, vit_folder: Path, cli: Callable[..., Result]
) -> None:
    """Examples as shown, as many as are said to be the least; small models in the demo's place."""
    page = (ROOT / "docs" / "your-data.md").read_text()
    shown = [json.loads(line) for line in blocks(page, "json")[0].splitlines()]
    examples = [{**shown[0], "id": f"t{n}", "media": f"photos/{n}.png"} for n in range(24)]
    examples += shown[1:]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "photos").mkdir()
    for number, example in enumerate(examples):
        image = easy_vqa / "train" / "images" / f"{number}.png"
        shutil.copyfile(image, tmp_path / example["media"])
    tree = yaml.safe_load(DEMO.read_text())
    for section, value in yaml.safe_load(blocks(page, "yaml")[0]).items():
        merged = isinstance(value, dict) and section != "data"
        tree[section] = tree[section] | value if merged else value
    tree["encoder"] |= {"weights": str(vit_folder), "arch": None}
    tree |= {"lm": {"weights": str(opt_folder)}, "variant": {"encoder_layers": 3}}
    recipe = tmp_path / "my.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    changes = (f"data.path={data}", f"runs={tmp_path}", f"store.root={tmp_path / 'features'}",
               "encoder.workers=1", "train.steps=1")  # fmt: skip
    here = [word for change in changes for word in ("--set", change)]
    checked = cli("data", "check", recipe, *here)
    assert checked.exit_code == 0, checked.output
    done = cli("run", recipe, *here)
    assert done.exit_code == 0, done.output


@pages
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]
    for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9*.-]+\.(?:py|yaml|md))`", text):
        assert any(list(folder.glob(name)) for folder in (ROOT, ROOT / "recipes")), name
