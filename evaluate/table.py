"""The table that ends a run, made of scores.json alone."""

from typing import Any


def format_table(scores: dict[str, Any]) -> str:
    """Time and rate of each stage, trained share, accuracy beside both baselines, and metrics."""
    lines = [f"{'stage':<12}{'seconds':>9}  rate"]
    for name, seconds in scores["seconds"].items():
        lines.append(f"{name:<12}{seconds:>9.1f}  {scores['rates'][name]}".rstrip())
    trained, total = scores["trained_parameters"], scores["total_parameters"]
    lines += ["", f"trained parameters: {trained:,} of {total:,} ({trained / total:.2%})", ""]
    metrics = scores.get("metrics", {})
    if not metrics or "exact_match" in metrics:
        lines += _accuracy(scores, metrics.get("exact_match"))
    others = [name for name in metrics if name != "exact_match"]
    if others and "exact_match" in metrics:
        lines.append("")
    if others:
        lines.append(
            f"{scores['split'] + ' score x 100':<24}{'examples':>9}{'model':>9}{'shuffled':>10}"
            f"{'95% interval':>16}"
        )
    for number, name in enumerate(others):
        shuffled = scores.get("shuffled_metrics", {}).get(name)
        lines.append(_row(name, metrics[name], shuffled))
        if number == 0:
            for kind, part in metrics[name].get("by_type", {}).items():
                if not part["n"]:  # a type of another source
                    continue
                control = shuffled and shuffled["by_type"][kind]
                lines.append(_row(f"  {kind or 'other'}", part, control))
    return "\n".join(lines)


def headline(scores: dict[str, Any]) -> str:
    """The first score and its control in words; exact match where it is among the metrics."""
    metrics, controls = scores["metrics"], scores.get("shuffled_metrics", {})
    if "exact_match" in metrics:
        score, shuffled = f"accuracy {scores['accuracy']:.1%}", scores.get("shuffled_accuracy")
        control = None if shuffled is None else f"{shuffled:.1%}"
    else:
        name = next(iter(metrics))
        score = f"{name} x 100 {_hundredfold(metrics[name]['value'])}"
        control = _hundredfold(controls[name]["value"]) if controls else None
    return score + (f" ({control} with media shuffled)" if control else "")


def _accuracy(scores: dict[str, Any], exact: dict[str, Any] | None) -> list[str]:
    lines = [
        f"{scores['split'] + ' accuracy':<16}{'examples':>9}{'model':>9}{'shuffled':>10}"
        f"{'majority':>10}" + (f"{'95% interval':>16}" if exact else "")
    ]
    kinds = list(scores["accuracy_by_type"])
    for kind in [None, *kinds] if len(kinds) > 1 else [None]:
        label = "overall" if kind is None else kind or "other"
        count = scores["examples"] if kind is None else scores["examples_by_type"][kind]
        cells = [_percent(scores, column, kind) for column in ("", "shuffled_", "majority_")]
        line = f"{label:<16}{count:>9}{cells[0]:>9}{cells[1]:>10}{cells[2]:>10}"
        if exact:
            line += f"{_interval(exact if kind is None else exact['by_type'][kind]):>16}"
        lines.append(line)
    return lines


def _row(label: str, summary: dict[str, Any], shuffled: dict[str, Any] | None) -> str:
    control = _hundredfold(shuffled["value"]) if shuffled else "-"
    return (
        f"{label:<24}{summary['n']:>9}{_hundredfold(summary['value']):>9}{control:>10}"
        f"{_interval(summary):>16}"
    )


def _hundredfold(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(summary: dict[str, Any]) -> str:
    if summary["interval"] is None:
        return "-"
    return " - ".join(_hundredfold(end) for end in summary["interval"])


def _percent(scores: dict[str, Any], column: str, kind: str | None) -> str:
    key = f"{column}accuracy"
    if key not in scores:
        return "-"
    value = scores[key] if kind is None else scores[f"{key}_by_type"][kind]
    return f"{value:.1%}"
