"""Metrics: one file per family, one row per name."""

import difflib
from collections.abc import Callable, Sequence

from epalm.data.example import Example
from epalm.errors import EpalmError
from epalm.evaluate.metrics.captions import bleu, cider, rouge_l
from epalm.evaluate.metrics.cider_2015 import cider_2015
from epalm.evaluate.metrics.exact import accuracy as accuracy
from epalm.evaluate.metrics.exact import accuracy_by_type as accuracy_by_type
from epalm.evaluate.metrics.exact import exact_match, strict_match
from epalm.evaluate.metrics.exact import is_match as is_match
from epalm.evaluate.metrics.exact import majority_answer as majority_answer
from epalm.evaluate.metrics.gqa import gqa_consistency
from epalm.evaluate.metrics.java_captions import meteor, spice, spider
from epalm.evaluate.metrics.normalised import normalised_match, normalised_match_top1k
from epalm.evaluate.metrics.scored import Metric, Setting
from epalm.evaluate.metrics.vqa import vqa_accuracy, vqa_accuracy_2017

METRICS: dict[str, Callable[[Setting], Metric]] = {
    "exact_match": lambda _: exact_match,
    "strict_match": lambda _: strict_match,
    "vqa_accuracy": lambda _: vqa_accuracy,
    "vqa_accuracy_2017": lambda _: vqa_accuracy_2017,
    "normalised_match": lambda _: normalised_match,
    "normalised_match_top1k": normalised_match_top1k,
    "gqa_consistency": lambda _: gqa_consistency,
    "bleu_1": lambda setting: bleu(1, setting),
    "bleu_2": lambda setting: bleu(2, setting),
    "bleu_3": lambda setting: bleu(3, setting),
    "bleu_4": lambda setting: bleu(4, setting),
    "rouge_l": rouge_l,
    "cider": cider,
    "cider_d": cider,
    "cider_2015": cider_2015,
    "meteor": meteor,
    "spice": spice,
    "spider": spider,
}
# where a recipe names none, by data.kind; the first is what the best checkpoint is chosen by
DEFAULTS = {
    "vqa2": ("vqa_accuracy",),
    "gqa": ("normalised_match",),
    "msrvtt-qa": ("normalised_match",),
    "msvd-qa": ("normalised_match",),
}
CAPTIONS = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
CAPTIONS_IN_JAVA = ("meteor", "spice", "spider")


def default_metrics(kind: str, examples: Sequence[Example], official: bool) -> tuple[str, ...]:
    """Of a dataset kind without a row: captions where no example has a prompt, else exact match."""
    if kind in DEFAULTS:
        return DEFAULTS[kind]
    if any(example.prompt for example in examples):
        return ("exact_match",)
    return CAPTIONS + CAPTIONS_IN_JAVA if official else CAPTIONS


def make_metrics(names: Sequence[str], setting: Setting) -> dict[str, Metric]:
    """Metrics by name, in the order given.

    Raises:
        EpalmError: an unknown name, or a metric that needs what is not there.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
            raise EpalmError(f"evaluate.metrics: no metric {name!r}; {hint}")
    return {name: METRICS[name](setting) for name in names}
