"""Whether two runs differ on the questions that both were evaluated on."""

import json
from collections.abc import Sequence

from epalm.data.example import Example
from epalm.data.sources import load_sources
from epalm.errors import EpalmError
from epalm.evaluate.metrics.interval import Difference, compare
from epalm.evaluate.scores import evaluation_examples, evaluation_metrics
from epalm.train.run import Run


def differences(a: Run, b: Run) -> dict[str, Difference]:
    """Scores of run B less those of run A, for each metric of A's recipe, on the same examples.

    Both runs' predictions are scored again, by the dataset of A's recipe.

    Raises:
        EpalmError: predictions are missing or about other examples, or the dataset is.
    """
    dataset = load_sources(a.recipe)
    examples = evaluation_examples(a.recipe, dataset)
    predictions = [_predictions(run, examples) for run in (a, b)]
    media = [example.media for example in examples]
    if len(set(media)) < 2:
        raise EpalmError("two runs are compared on two media or more")
    found = {}
    for name, metric in evaluation_metrics(a.recipe, dataset).items():
        scores = [metric(given, examples) for given in predictions]
        found[name] = compare(scores[0], scores[1], media, a.recipe.data_seed)
    return found


def format_differences(a: str, b: str, found: dict[str, Difference]) -> str:
    """A line for each metric, in hundredths as the papers print them."""
    lines = [f"{f'{b} less {a}, x 100':<32}{'difference':>11}{'95% interval':>16}{'p':>8}"]
    for name, each in found.items():
        interval = " - ".join(f"{100 * end:+.1f}" for end in each.interval)
        line = f"{name:<32}{100 * each.value:>+11.1f}{interval:>16}{each.p:>8.4f}"
        lines.append(line + ("" if each.mcnemar is None else f"  McNemar {each.mcnemar:.4f}"))
    return "\n".join(lines)


def _predictions(run: Run, examples: Sequence[Example]) -> list[str]:
    path = run.folder / "predictions.jsonl"
    if not path.is_file():
        raise EpalmError(f"{path}: not there; run `evaluate` first")
    lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other line separators
    of_id = {row["id"]: row for row in map(json.loads, filter(None, lines))}
    for example in examples:
        row = of_id.get(example.id)
        if row is None or row["references"] != list(example.references):
            raise EpalmError(
                f"{path}: has no prediction for example {example.id} with its references; evaluate "
                "both runs on the same split and examples"
            )
    return [of_id[example.id]["prediction"] for example in examples]
