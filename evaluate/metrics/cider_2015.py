"""CIDEr as its paper first defined it (Vedantam, Zitnick, Parikh 2015, equations 1 to 3).

No clipping and no penalty on length, which CIDEr-D has, so that repeating frequent words pays. Like
the authors' code it does not stem words, and multiplies by ten.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import log, sqrt
from statistics import fmean

from epalm.data.example import Example
from epalm.evaluate.metrics.captions import require_tokenizer, tokenized
from epalm.evaluate.metrics.scored import Metric, Scores, Setting, mean_scores

ORDERS = (1, 2, 3, 4)
Ngrams = Counter[tuple[str, ...]]


def cider_2015(setting: Setting) -> Metric:
    """Mean over examples of ten times the cosine of tf-idf vectors; of n-grams, of references."""
    require_tokenizer(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        hypotheses, references = tokenized(predictions, examples, setting)
        counted = [[_ngrams(text) for text in texts] for texts in references]
        frequency = Counter(
            ngram for texts in counted for ngram in set().union(*(n for t in texts for n in t))
        )
        rarity = {ngram: log(len(counted) / held) for ngram, held in frequency.items()}
        unseen = log(max(len(counted), 1))
        values = []
        for hypothesis, texts in zip(hypotheses, counted, strict=True):
            given = _ngrams(hypothesis)
            cosines = [
                _cosine(ours, theirs, rarity, unseen)
                for reference in texts
                for ours, theirs in zip(given, reference, strict=True)
            ]
            values.append(10 * fmean(cosines))
        return mean_scores(values)

    return metric


def _ngrams(text: str) -> list[Ngrams]:
    words = text.split()
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in ORDERS]


def _cosine(a: Ngrams, b: Ngrams, rarity: dict[tuple[str, ...], float], unseen: float) -> float:
    def weigh(ngram: tuple[str, ...]) -> float:
        return rarity.get(ngram, unseen)

    def norm(counts: Iterable[tuple[tuple[str, ...], int]]) -> float:
        return sqrt(sum((count * weigh(ngram)) ** 2 for ngram, count in counts))

    length = norm(a.items()) * norm(b.items())
    shared = sum(count * b[ngram] * weigh(ngram) ** 2 for ngram, count in a.items())
    return shared / length if length else 0.0
