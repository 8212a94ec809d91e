"""LM families, by Hugging Face's `model_type`."""

from transformers import PreTrainedModel

from epalm.errors import EpalmError
from epalm.model.families.base import LMFamily
from epalm.model.families.llama import LlamaFamily
from epalm.model.families.opt import OPTFamily

FAMILIES: dict[str, type[LMFamily]] = {"opt": OPTFamily, "llama": LlamaFamily}


def family_of(lm: PreTrainedModel) -> LMFamily:
    """The family of an LM; EpalmError when it has none yet."""
    kind = lm.config.model_type
    if kind not in FAMILIES:
        raise EpalmError(f"lm.weights: LM family {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind](lm)
