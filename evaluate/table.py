"""The table that ends a run, made of scores.json alone."""

from typing import Any


def format_table(scores: dict[str, Any]) -> str:
    """Time and rate of each stage, trained share, accuracy beside both baselines."""
    lines = [f"{'stage':<12}{'seconds':>9}  rate"]
    for name, seconds in scores["seconds"].items():
        lines.append(f"{name:<12}{seconds:>9.1f}  {scores['rates'][name]}")
    trained, total = scores["trained_parameters"], scores["total_parameters"]
    lines += [
        "",
        f"trained parameters: {trained:,} of {total:,} ({trained / total:.2%})",
        "",
        f"{scores['split'] + ' accuracy':<16}{'examples':>9}{'model':>9}{'shuffled':>10}"
        f"{'majority':>10}",
    ]
    rows = [("overall", scores["examples"], "")]
    rows += [(kind, scores["examples_by_type"][kind], kind) for kind in scores["accuracy_by_type"]]
    for label, count, kind in rows if len(rows) > 2 else rows[:1]:
        cells = [_percent(scores, column, kind) for column in ("", "shuffled_", "majority_")]
        lines.append(f"{label:<16}{count:>9}{cells[0]:>9}{cells[1]:>10}{cells[2]:>10}")
    return "\n".join(lines)


def _percent(scores: dict[str, Any], column: str, kind: str) -> str:
    key = f"{column}accuracy"
    if key not in scores:
        return "-"
    value = scores[f"{key}_by_type"][kind] if kind else scores[key]
    return f"{value:.1%}"
