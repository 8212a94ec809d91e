"""A report's examples: the best and the worst, each with its media, reference and prediction."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from epalm.evaluate.pictures import Picture
from epalm.evaluate.report_scores import hundredfold, metric_name
from epalm.evaluate.report_style import LONGEST, text

SHOWN = 8  # examples of each kind
REFERENCES = 4  # that are shown of an example

Row = dict[str, Any]


class Chosen(NamedTuple):
    """Lines of predictions.jsonl.

    Attributes:
        best, worst: no two of either about the same media. The highest score is not among the
            worst, nor the lowest among the best, unless all are alike.
    """

    best: list[Row]
    worst: list[Row]


def choose(rows: Sequence[Row], seed: int, count: int = SHOWN) -> Chosen:
    """The highest and the lowest scores; of equal ones a seeded choice, question types in turn.

    Args:
        rows: one or more.
    """
    drawn = list(rows)
    random.Random(f"{seed} report").shuffle(drawn)
    values = sorted(map(score_of, drawn))
    low, top = values[0], values[-1]
    high = [row for row in drawn if score_of(row) > low or low == top]
    best = _extreme([(-score_of(row), row) for row in high], count)
    worst = _extreme([(score_of(row), row) for row in drawn if score_of(row) < top], count)
    taken = {row["id"] for row in best}
    return Chosen(best, [row for row in worst if row["id"] not in taken])


def score_of(row: Row) -> float:
    """By the first metric that counts the example, or whether it is an exact match."""
    return float(next(iter(row["scores"].values()), row["match"]))


def gallery(
    rows: Sequence[Row], shuffled: Mapping[str, str], shown: Mapping[str, Picture], other: str
) -> str:
    """The examples as figures side by side.

    Args:
        shuffled: by id, the prediction with another media.
        shown: by media id.
        other: heading of that prediction, such as "other image".
    """
    long = any(len(reference) > 30 for row in rows for reference in row["references"])
    figures = [
        _figure(row, shuffled.get(row["id"]), shown[row["media"]], other) for row in rows
    ]  # fmt: skip
    return "\n".join([f'<div class="gallery{" long" * long}">', *figures, "</div>"])


def _extreme(ranked: Sequence[tuple[float, Row]], count: int) -> list[Row]:
    """Up to `count` rows of the lowest rank, about different media."""
    ranked = sorted(ranked, key=lambda pair: pair[0])
    media: set[str] = set()
    last = -1.0
    for rank, row in ranked:  # the rank down to which there are enough
        if row["media"] not in media:
            media.add(row["media"])
            last = rank
        if len(media) == count:
            break
    surely = [row for rank, row in ranked if rank < last]
    tied: dict[str, list[Row]] = defaultdict(list)
    for rank, row in ranked:
        if rank == last:
            tied[row["type"]].append(row)
    in_turn = [row for some in zip_longest(*tied.values()) for row in some if row is not None]
    found: dict[str, Row] = {}
    for row in [*surely, *in_turn]:
        if len(found) < count:
            found.setdefault(row["media"], row)
    return list(found.values())


def _figure(row: Row, shuffled: str | None, picture: Picture, other: str) -> str:
    # an answer can be fully right without being equal to a reference; a caption is never right
    hit = row["match"] or (row["prompt"] and score_of(row) >= 0.999)
    mark = " ✓" if hit else ""
    counts: Counter[str] = Counter(row["references"])
    shown = [
        f"<span dir=auto>{text(words, LONGEST)}{f' ×{n}' if n > 1 else ''}</span>"
        for words, n in counts.most_common(REFERENCES)
    ]
    if len(counts) > REFERENCES:
        shown.append(f"<span>and {len(counts) - REFERENCES} more</span>")
    prompt = f"<p dir=auto>{text(row['prompt'], LONGEST)}</p>" if row["prompt"] else ""
    small = [text(row["media"], 60)]
    if picture.uri and picture.note:
        small.append(text(picture.note))
    small += [
        f"{text(metric_name(name))} {hundredfold(value)}"
        for name, value in row["scores"].items()
        if value not in (0.0, 1.0)
    ][:1]
    if shuffled is not None:
        small.append(f"{other}: <bdi>{text(shuffled, 120) or '(nothing)'}</bdi>")
    answer = text(row["prediction"], LONGEST) or "(nothing)"
    return (
        f"<figure class=example><div class=picture>{_shown(picture, row['media'])}</div>"
        f"<figcaption>{prompt}<dl class=pair><dt>reference</dt><dd>{''.join(shown)}</dd>"
        f"<dt>prediction{mark}</dt><dd class={'hit' if hit else 'miss'}><bdi>{answer}</bdi></dd>"
        f"</dl><small>{' · '.join(small)}</small></figcaption></figure>"
    )


def _shown(picture: Picture, media: str) -> str:
    if not picture.uri:
        return f"<span>{text(picture.note, 200)}</span>"
    pixelated = " class=pixelated" if picture.pixelated else ""
    return f'<img src="{picture.uri}" alt="{text(media, 60)}"{pixelated}>'
