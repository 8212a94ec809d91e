"""The loss curve as PNG, and a page of test images with answers."""

import base64
import html
import json
import random
from pathlib import Path

from epalm.data.example import Dataset
from epalm.store.atomic import write_atomic
from epalm.train.run import Run

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.5rem }}
figure {{ margin: 0; padding: 1rem; border: 1px solid #ddd; border-radius: .5rem }}
img {{ width: 100%; image-rendering: pixelated; border-radius: .25rem }}
dl {{ margin: .75rem 0 0 }} dt {{ color: #777; font-size: .8rem }} dd {{ margin: 0 0 .25rem }}
.right {{ color: #17723c }} .wrong {{ color: #b3261e }}
</style>
<h1>{title}</h1><p>{summary}</p><main>
{figures}
</main></html>
"""
_FIGURE = """<figure><img src="data:image;base64,{image}" alt="{media}"><dl>
<dt>question</dt><dd>{prompt}</dd><dt>answer</dt><dd>{answer}</dd>
<dt>prediction</dt><dd class="{verdict}">{prediction}</dd></dl></figure>"""


def draw_loss(run: Run) -> Path:
    """Training loss and, where there is any, validation accuracy over steps; loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = run.read_metrics()
    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axis.plot(*zip(*losses, strict=True), label="training loss")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    scores = [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]
    if scores:
        right = axis.twinx()
        right.plot(*zip(*scores, strict=True), "o--", color="tab:green", label="val accuracy")
        right.set(ylabel="val accuracy", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    path = run.folder / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def write_examples(run: Run, dataset: Dataset, count: int = 12) -> Path:
    """A page of a seeded choice of predictions, each about another image; examples.html."""
    text = (run.folder / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    random.Random(f"{run.recipe.seed} page").shuffle(rows)
    chosen = list({row["media"]: row for row in rows}.values())[:count]
    figures = [
        _FIGURE.format(
            image=base64.b64encode(dataset.media[row["media"]].path.read_bytes()).decode(),
            media=html.escape(row["media"]),
            prompt=html.escape(row["prompt"]),
            answer=html.escape(", ".join(row["references"])),
            prediction=html.escape(row["prediction"]),
            verdict="right" if row["match"] else "wrong",
        )
        for row in chosen
        if dataset.media[row["media"]].path.is_file()
    ]
    hits = sum(row["match"] for row in rows)
    page = _PAGE.format(
        title=html.escape(run.recipe.name),
        summary=f"{hits} of {len(rows)} answers are right ({hits / len(rows):.1%}); "
        f"here is a random choice.",
        figures="\n".join(figures),
    )
    path = run.folder / "examples.html"
    write_atomic(path, page)
    return path
