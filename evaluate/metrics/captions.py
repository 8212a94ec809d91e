"""BLEU, ROUGE-L and CIDEr with the scorers of pycocoevalcap, which need no Java.

pycocoevalcap is the COCO caption server's code. Its scorers get texts that are tokenized already,
here by `ptb.py`, or by Stanford's own program with `evaluate.official: true`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from epalm.data.example import Example
from epalm.evaluate.metrics.java import PTB_JAR, require, stanford_lines
from epalm.evaluate.metrics.ptb import DROPPED, ptb_tokens
from epalm.evaluate.metrics.scored import Floats, Metric, Scores, Setting, mean_scores

Texts = tuple[str, ...]
BLEU_ORDER = 4


def bleu(order: int, setting: Setting) -> Metric:
    """Corpus BLEU of n-grams up to `order`: clipped counts summed over all examples.

    A value per example is the same formula on its counts alone, nearly 0 where no n-gram of the
    highest order matches; only the corpus value is BLEU.
    """
    require_tokenizer(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        statistics = _bleu_statistics(*tokenized(predictions, examples, setting))

        def combine(sums: Floats) -> Floats:
            return _bleu(sums, order)

        return Scores(combine(statistics), statistics, combine)

    return metric


def rouge_l(setting: Setting) -> Metric:
    """Longest common subsequence, F with beta 1.2, mean over examples."""
    require_tokenizer(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        from pycocoevalcap.rouge.rouge import Rouge

        hypotheses, references = tokenized(predictions, examples, setting)
        return mean_scores(Rouge().compute_score(*as_tables(hypotheses, references))[1])

    return metric


def cider(setting: Setting) -> Metric:
    """What caption papers print as CIDEr: the CIDEr-D of the COCO server, mean over examples.

    Words weigh by their rarity among the references of these very examples, so that scores of
    different selections of examples do not compare, and a single example has 0. The interval
    resamples the per-example values with those weights held.
    """
    require_tokenizer(setting)

    def metric(predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
        return mean_scores(cider_values(*tokenized(predictions, examples, setting)))

    return metric


def cider_values(hypotheses: Texts, references: tuple[Texts, ...]) -> Floats:
    """(N,) CIDEr-D of tokenized texts; 0 throughout where no reference has a word."""
    from pycocoevalcap.cider.cider import Cider

    if not any(text for texts in references for text in texts):
        return np.zeros(len(hypotheses))
    values: Floats = Cider().compute_score(*as_tables(hypotheses, references))[1]
    return values


def tokenized(
    predictions: Sequence[str], examples: Sequence[Example], setting: Setting
) -> tuple[Texts, tuple[Texts, ...]]:
    """Tokens, joined by spaces, of the N predictions and of each example's references."""
    hypotheses = _tokenize(tuple(predictions), setting.official)
    flat = iter(_tokenize(tuple(r for e in examples for r in e.references), setting.official))
    return hypotheses, tuple(tuple(next(flat) for _ in e.references) for e in examples)


def as_tables(
    hypotheses: Texts, references: tuple[Texts, ...]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and hypotheses by number, as pycocoevalcap's scorers take them."""
    return {n: list(t) for n, t in enumerate(references)}, {
        n: [t] for n, t in enumerate(hypotheses)
    }


def require_tokenizer(setting: Setting) -> None:
    """EpalmError unless the tokenizer of the setting can run here."""
    if setting.official:
        require(PTB_JAR)


@lru_cache(maxsize=4)  # predictions, those with shuffled media, references; for several metrics
def _tokenize(texts: Texts, official: bool) -> Texts:
    if not official:
        return tuple(" ".join(ptb_tokens(text)) for text in texts)
    return tuple(
        " ".join(token for token in line.split(" ") if token not in DROPPED)
        for line in stanford_lines(texts)
    )


@lru_cache(maxsize=2)
def _bleu_statistics(hypotheses: Texts, references: tuple[Texts, ...]) -> Floats:
    """(N, 2 * 4 + 2): matching n-grams, n-grams, length of hypothesis and of nearest reference."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        counts = cook_test(hypothesis, cook_refs(texts, n=BLEU_ORDER), n=BLEU_ORDER)
        length = counts["testlen"]
        nearest = min(counts["reflen"], key=lambda other: (abs(other - length), other))
        rows.append([*counts["correct"], *counts["guess"], length, nearest])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 * BLEU_ORDER + 2)


def _bleu(sums: Floats, order: int) -> Floats:
    """BLEU of (…, 10) statistics with the smoothing constants of pycocoevalcap."""
    correct, guess = sums[..., :order] + 1e-15, sums[..., BLEU_ORDER : BLEU_ORDER + order] + 1e-9
    precision = np.prod(correct / guess, axis=-1) ** (1 / order)
    ratio = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))
