"""The table that ends a run, made of scores.json alone."""

from typing import Any


def format_table(scores: dict[str, Any]) -> str:
    """Time and rate of each stage, trained share, accuracy beside both baselines."""
    lines = [f"{'stage':<12}{'seconds':>9}  rate"]
    for name, seconds in scores["seconds"].items():
        lines.append(f"{name:<12}{seconds:>9.1f}  {scores['rates'][name]}".rstrip())
    trained, total = scores["trained_parameters"], scores["total_parameters"]
    lines += [
        "",
        f"trained parameters: {trained:,} of {total:,} ({trained / total:.2%})",
        "",
        f"{scores['split'] + ' accuracy':<16}{'examples':>9}{'model':>9}{'shuffled':>10}"
        f"{'majority':>10}",
    ]
    kinds = list(scores["accuracy_by_type"])
    for kind in [None, *kinds] if len(kinds) > 1 else [None]:
        label = "overall" if kind is None else kind or "other"
        count = scores["examples"] if kind is None else scores["examples_by_type"][kind]
        cells = [_percent(scores, column, kind) for column in ("", "shuffled_", "majority_")]
        lines.append(f"{label:<16}{count:>9}{cells[0]:>9}{cells[1]:>10}{cells[2]:>10}")
    return "\n".join(lines)


def _percent(scores: dict[str, Any], column: str, kind: str | None) -> str:
    key = f"{column}accuracy"
    if key not in scores:
        return "-"
    value = scores[key] if kind is None else scores[f"{key}_by_type"][kind]
    return f"{value:.1%}"
