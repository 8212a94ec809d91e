"""Metrics: one file per family, one row per name."""

import difflib
from collections.abc import Callable, Sequence

from epalm.data.example import Example
from epalm.data.gqa_extras import choices_file
from epalm.errors import EpalmError
from epalm.evaluate.metrics.captions import bleu, cider, rouge_l
from epalm.evaluate.metrics.cider_2015 import cider_2015
from epalm.evaluate.metrics.exact import accuracy as accuracy
from epalm.evaluate.metrics.exact import accuracy_by_type as accuracy_by_type
from epalm.evaluate.metrics.exact import exact_match, strict_match
from epalm.evaluate.metrics.exact import is_match as is_match
from epalm.evaluate.metrics.exact import majority_answer as majority_answer
from epalm.evaluate.metrics.gqa import (
    gqa_consistency,
    gqa_distribution,
    gqa_plausibility,
    gqa_validity,
)
from epalm.evaluate.metrics.meteor_java import meteor
from epalm.evaluate.metrics.normalised import normalised_match, normalised_match_top1k
from epalm.evaluate.metrics.scored import Metric, Setting
from epalm.evaluate.metrics.spice_java import spice, spider
from epalm.evaluate.metrics.vqa import for_ten_answers, vqa_accuracy, vqa_accuracy_2017

METRICS: dict[str, Callable[[Setting], Metric]] = {
    "exact_match": lambda _: exact_match,
    "strict_match": lambda _: strict_match,
    "vqa_accuracy": lambda setting: for_ten_answers(vqa_accuracy, setting),
    "vqa_accuracy_2017": lambda setting: for_ten_answers(vqa_accuracy_2017, setting),
    "normalised_match": lambda _: normalised_match,
    "normalised_match_top1k": normalised_match_top1k,
    "gqa_consistency": lambda _: gqa_consistency,
    "gqa_validity": gqa_validity,
    "gqa_plausibility": gqa_plausibility,
    "gqa_distribution": gqa_distribution,
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
    "gqa": ("normalised_match", "gqa_consistency", "gqa_distribution"),
    "msrvtt-qa": ("normalised_match",),
    "msvd-qa": ("normalised_match",),
}
GQA_OF_CHOICES = ("gqa_validity", "gqa_plausibility")
LOWER_IS_BETTER = {"gqa_distribution"}
CAPTIONS = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
CAPTIONS_IN_JAVA = ("meteor", "spice", "spider")


def default_metrics(examples: Sequence[Example], setting: Setting) -> tuple[str, ...]:
    """Of a dataset kind without a row: captions where no example has a prompt, else exact match.

    GQA's further scores are among them as far as its files allow. Answers in the official eP-ALM
    code's files are compared as that does (convention 29).
    """
    data = setting.data
    if data is not None and data.kind in DEFAULTS:
        chosen = data.kind == "gqa" and choices_file(data, setting.split) is not None
        return DEFAULTS[data.kind] + GQA_OF_CHOICES * chosen
    if any(example.prompt for example in examples):
        theirs = data is not None and data.kind == "epalm-json"
        return ("normalised_match",) if theirs else ("exact_match",)
    return CAPTIONS + CAPTIONS_IN_JAVA if setting.official else CAPTIONS


def make_metrics(names: Sequence[str], setting: Setting) -> dict[str, Metric]:
    """Metrics by name, in the order given.

    Raises:
        EpalmError: an unknown name, a metric that needs what is not there, or first one by which no
            checkpoint can be chosen.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
            raise EpalmError(f"evaluate.metrics: no metric {name!r}; {hint}")
    if names[0] in LOWER_IS_BETTER:
        raise EpalmError(
            f"evaluate.metrics: {names[0]} is better the lower it is, and the first metric chooses "
            "the best checkpoint by its highest value; name another before it"
        )
    return {name: METRICS[name](setting) for name in names}
