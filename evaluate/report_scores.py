"""A report's table of scores, each with its interval and the control, as numbers and as marks."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from epalm.evaluate.report_style import text

PARTS = 12  # question types of a kind that are listed; the others stand in scores.json

_NAMES = {
    "vqa_accuracy": "VQA accuracy", "vqa_accuracy_2017": "VQA accuracy (2017)",
    "gqa_consistency": "GQA consistency", "gqa_validity": "GQA validity",
    "gqa_plausibility": "GQA plausibility",
    "gqa_distribution": "GQA distribution (lower is better)",
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L", "cider": "CIDEr", "cider_d": "CIDEr-D", "cider_2015": "CIDEr (2015)",
    "meteor": "METEOR", "spice": "SPICE", "spider": "SPIDEr",
}  # fmt: skip


class Line(NamedTuple):
    """A row of the table; values are shares, None where there is none.

    Attributes:
        part: it is about some of the examples of the line above.
        kind: of type that tells these apart, such as question type, beside the examples' own.
    """

    name: str
    n: int
    value: float | None
    interval: tuple[float, float] | None
    shuffled: float | None = None
    majority: float | None = None
    part: bool = False
    kind: str = ""


def metric_name(name: str) -> str:
    """As papers print it."""
    source, colon, own = name.rpartition(": ")
    return f"{source}{colon}{_NAMES.get(own, own.replace('_', ' '))}"


def lines_of(scores: dict[str, Any]) -> list[Line]:
    """All metrics, and under the first of each source what it is for each type of question."""
    found: list[Line] = []
    detailed = set()
    for name, summary in scores["metrics"].items():
        source, _, own = name.rpartition(": ")
        control = scores.get("shuffled_metrics", {}).get(name, {})
        blind = scores if own == "exact_match" and not source else {}
        majority = blind.get("majority_accuracy")
        found.append(_line(metric_name(name), summary, control, majority))
        if source in detailed:
            continue
        detailed.add(source)
        by_type = blind.get("majority_accuracy_by_type", {})
        found += _parts(summary.get("by_type", {}), control.get("by_type", {}), by_type)
        for kind, parts in summary.get("by", {}).items():
            more = _parts(parts, control.get("by", {}).get(kind, {}), {})
            found += [line._replace(kind=kind.replace("_", " ")) for line in more]
    return found


def leaves_out(scores: dict[str, Any]) -> bool:
    """There are more question types than are listed."""
    kinds = [
        parts
        for summary in scores["metrics"].values()
        for parts in (summary.get("by_type", {}), *summary.get("by", {}).values())
    ]
    return any(len(parts) > PARTS for parts in kinds)


def score_table(lines: Iterable[Line]) -> str:
    """The lines as a table, their marks on one scale."""
    lines = list(lines)
    ends = [each for line in lines for each in (line.interval or ())]
    longest = max([1.0, *(line.value or 0.0 for line in lines), *ends])
    shuffled = any(line.shuffled is not None for line in lines)
    majority = any(line.majority is not None for line in lines)
    columns = ["", "n", "score", "95% interval"]
    columns += ["shuffled"] * shuffled + ["majority"] * majority
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    rows = [f"<thead><tr>{head}<th class=mark></th></tr></thead><tbody>"]
    kind = ""
    for line in lines:
        if line.kind and line.kind != kind:
            words = text(f"by {line.kind}", 60)
            rows.append(f"<tr class=kind><td colspan={len(columns) + 1}>{words}</td></tr>")
        kind = line.kind
        cells = [f"{line.n:,}", hundredfold(line.value), interval(line.interval)]
        cells += [hundredfold(line.shuffled)] * shuffled + [hundredfold(line.majority)] * majority
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        name = text(line.name, 60)
        rows.append(
            f"<tr class={'part' if line.part else 'head'}><td dir=auto>{name}</td>{row}"
            f"<td class=mark>{_marks(line, longest)}</td></tr>"
        )
    return "\n".join(["<div class=wide><table>", *rows, "</tbody></table></div>"])


def hundredfold(value: float | None) -> str:
    """A share as the papers print it."""
    return "–" if value is None else f"{100 * value:.1f}"


def interval(ends: tuple[float, float] | None) -> str:
    """Low and high end."""
    return "–" if ends is None else f"{hundredfold(ends[0])} – {hundredfold(ends[1])}"


def _line(
    name: str, summary: dict[str, Any], control: dict[str, Any], majority: float | None,
    part: bool = False,
) -> Line:  # fmt: skip
    ends = summary["interval"]
    return Line(name, summary["n"], summary["value"], ends and (ends[0], ends[1]),
                control.get("value"), majority, part)  # fmt: skip


def _parts(
    parts: dict[str, Any], control: dict[str, Any], majority: dict[str, float]
) -> list[Line]:
    counted = {kind: part for kind, part in parts.items() if part["n"]}
    if len(counted) < 2:  # the line above says it
        return []
    return [
        _line(kind or "other", part, control.get(kind, {}), majority.get(kind), part=True)
        for kind, part in list(counted.items())[:PARTS]
    ]


def _marks(line: Line, longest: float) -> str:
    """The line's numbers on a scale from 0 to `longest`."""

    def at(value: float) -> str:
        return f"{100 * value / longest:.2f}%"

    drawn = ['<line x1="0" x2="100%" y1="50%" y2="50%" stroke="var(--rule)"/>']
    if line.majority is not None:
        x = at(line.majority)
        drawn.append(
            f'<line x1="{x}" x2="{x}" y1="22%" y2="78%" stroke="var(--quiet)" stroke-width="1.3"/>'
        )
    if line.interval is not None:
        low, high = map(at, line.interval)
        drawn.append(
            f'<line x1="{low}" x2="{high}" y1="50%" y2="50%" stroke="var(--accent)" '
            'stroke-width="2"/>'
        )
    if line.shuffled is not None:
        drawn.append(
            f'<circle cx="{at(line.shuffled)}" cy="50%" r="3" fill="var(--paper)" '
            'stroke="var(--quiet)" stroke-width="1.3"/>'
        )
    if line.value is not None:
        drawn.append(f'<circle cx="{at(line.value)}" cy="50%" r="3.6" fill="var(--accent)"/>')
    return f"<svg aria-hidden=true>{''.join(drawn)}</svg>"
