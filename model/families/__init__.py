"""LM families, by Hugging Face's `model_type`."""

from transformers import PreTrainedModel

from epalm.errors import EpalmError
from epalm.model.families.base import LMFamily
from epalm.model.families.gpt2 import GPT2Family
from epalm.model.families.gpt_neox import GPTNeoXFamily
from epalm.model.families.llama import LlamaFamily
from epalm.model.families.opt import OPTFamily

FAMILIES: dict[str, type[LMFamily]] = {
    "opt": OPTFamily,
    "llama": LlamaFamily,  # TinyLlama, Vicuna, SmolLM2 too
    "mistral": LlamaFamily,
    "qwen2": LlamaFamily,
    "qwen3": LlamaFamily,
    "olmo": LlamaFamily,
    "phi3": LlamaFamily,  # Phi-4 too
    "smollm3": LlamaFamily,
    "gemma": LlamaFamily,  # its embedding scales the words itself; a soft prompt is not scaled
    "gpt2": GPT2Family,
    "gpt_neox": GPTNeoXFamily,  # Pythia
}


def family_of(lm: PreTrainedModel) -> LMFamily:
    """The family of an LM; EpalmError when it has none yet."""
    kind = lm.config.model_type
    check_family(kind)
    return FAMILIES[kind](lm)


def check_family(kind: str) -> None:
    """EpalmError when LMs of this `model_type` have no family yet."""
    if kind not in FAMILIES:
        raise EpalmError(
            f"lm.weights: LM family {kind!r} is not one of {', '.join(FAMILIES)}; choose an LM of "
            "these, or add its family (docs/extending.md)"
        )
