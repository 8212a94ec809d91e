"""Whether two runs differ on the questions that both were evaluated on."""

from collections.abc import Sequence
from typing import Any

from epalm.data.example import Example
from epalm.data.sources import load_sources
from epalm.errors import EpalmError
from epalm.evaluate.metrics.interval import Difference, compare
from epalm.evaluate.scores import evaluation_metrics
from epalm.store.atomic import Kinds, read_json_lines
from epalm.train.run import Run


def differences(a: Run, b: Run) -> dict[str, Difference]:
    """Scores of run B less those of run A, on the same examples.

    For each metric of A's recipe that can be resampled, and by which both have a score.

    Both runs' predictions are scored again, by the dataset of A's recipe.

    Raises:
        EpalmError: predictions are missing or about other examples, or the dataset is.
    """
    dataset = load_sources(a.recipe)
    of_a, of_b = _predictions(a), _predictions(b)
    if of_a.keys() != of_b.keys():
        raise EpalmError(
            f"{a.folder} and {b.folder}: evaluated on different examples; evaluate both on the "
            "same split and examples"
        )
    by_id = {example.id: example for example in dataset.examples}
    examples = [_the_same(by_id.get(key), key, (of_a[key], of_b[key])) for key in of_a]
    predictions = [[rows[key]["prediction"] for key in of_a] for rows in (of_a, of_b)]
    media = [example.media for example in examples]
    if len(set(media)) < 2:
        raise EpalmError("two runs are compared on two media or more")
    found = {}
    for name, metric in evaluation_metrics(a.recipe, dataset).items():
        scores = [metric(given, examples) for given in predictions]
        if scores[0].of_rows is not None or not all(each.n for each in scores):
            continue
        found[name] = compare(scores[0], scores[1], media, a.recipe.data_seed)
    return found


def format_differences(a: str, b: str, found: dict[str, Difference]) -> str:
    """A line for each metric, in hundredths as the papers print them."""
    head = f"{b} less {a}, x 100"
    width = max(32, len(head))
    lines = [f"{head:<{width}}{'difference':>11}{'95% interval':>16}{'p':>8}"]
    for name, each in found.items():
        interval = " - ".join(f"{100 * end:+.1f}" for end in each.interval)
        line = f"{name:<{width}}{100 * each.value:>+11.1f}{interval:>16}{each.p:>8.4f}"
        lines.append(line + ("" if each.mcnemar is None else f"  McNemar {each.mcnemar:.4f}"))
    return "\n".join(lines)


def _predictions(run: Run) -> dict[str, dict[str, Any]]:
    """The lines of a run's predictions, by example id."""
    path = run.folder / "predictions.jsonl"
    if not path.is_file():
        raise EpalmError(f"{path}: not there; run `evaluate` first")
    kinds: Kinds = {"id": str, "prediction": str, "references": list}
    return {row["id"]: row for row in read_json_lines(path, kinds, whole=True)}


def _the_same(example: Example | None, key: str, rows: Sequence[dict[str, Any]]) -> Example:
    """The dataset's example; EpalmError where it is not what was asked."""
    if example is None or any(row["references"] != list(example.references) for row in rows):
        raise EpalmError(
            f"example {key}: not in the dataset, or with other references; evaluate both runs again"
        )
    return example
