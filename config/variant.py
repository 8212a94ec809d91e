"""`variant`: what is trained, and where it enters the LM."""

from typing import Literal

from pydantic import Field, model_validator

from epalm.config.section import Positive, Section


class AdapterConfig(Section):
    """Adapters in one kind of sub-layer of the LM's layers (paper, appendix A; convention 9)."""

    reduction: int = Field(
        0, ge=0, description="r: width H of the LM over the adapter's; 0: no adapters there"
    )
    start: int = Field(
        0,
        ge=0,
        description="first LM layer that has them, from 0 (the paper's); from the first injection "
        "layer on, the LM below stays frozen, and its text states can be kept",
    )
    placement: Literal["sequential", "parallel", "scaled"] = Field(
        "sequential",
        description="sequential: on the sub-layer's output; parallel: beside it, on its input; "
        "scaled: parallel, times a trained scale",
    )
    layer_norm: bool = Field(False, description="LayerNorm before the adapter's first layer")

    @model_validator(mode="after")
    def _are_there(self) -> "AdapterConfig":
        if not self.reduction and (names := self.changed()):
            raise ValueError(f"{names[0]} is of adapters, and reduction 0 has none; set reduction")
        return self


class VariantConfig(Section):
    """What is trained, and where it enters the LM (paper 3.1, appendix B)."""

    connection: Literal["separate", "shared"] = Field(
        "separate", description="one linear layer per encoder layer used, or one for all"
    )
    encoder_layers: Positive = Field(6, description="n: the last n encoder layers are used")
    inject_start: int | None = Field(
        None,
        description="first injection layer, from 0, or negative: from the top; default: half of "
        "the LM's layers",
    )
    inject_end: int | None = Field(
        None,
        description="layer before which injection ends, from 0, or negative: from the top; "
        "default: the LM's layer count",
    )
    text_step: Positive = Field(1, description="inject only at layers divisible by this")
    levels: dict[int, int] | None = Field(
        None,
        description="LM layer to encoder layer, both from 0, in the place of inject_start, "
        "inject_end and text_step (tables 9 and 14); encoder_layers then says how many different "
        "encoder layers it names",
    )
    token_norm: Literal["free", "lm", "rms"] = Field(
        "free",
        description="length of the perceptual tokens: as the connection makes them (the paper's), "
        "the mean length of the LM's words as they enter it, or the square root of its width",
    )
    token_affine: bool = Field(
        False, description="trained scale and bias of the perceptual tokens of each encoder layer"
    )
    prompt_length: int = Field(10, ge=0, description="soft prompt tokens; 0: none (eP-ALM_lin)")
    prompt_mlp: bool = Field(True, description="two-layer MLP behind the prompt")
    deep_prompt: int = Field(
        0,
        ge=0,
        description="trained tokens at the input of every LM layer, in the place of the soft "
        "prompt, whose length must then be 0; 0: none",
    )
    attention_adapters: AdapterConfig = Field(
        AdapterConfig(), description="adapters on the attention of every LM layer"
    )
    feed_forward_adapters: AdapterConfig = Field(
        AdapterConfig(), description="adapters on the feed-forward part of every LM layer"
    )
    train_lm: bool = Field(
        False, description="train the LM's own weights too, and save all of them (table 12)"
    )
    mask: Literal["causal", "reference"] = Field(
        "causal",
        description="reference: the perceptual token sees later text too, as in the official code "
        "(its bug 2); only for parity with published checkpoints",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "VariantConfig":
        if self.deep_prompt and self.prompt_length:
            raise ValueError("deep_prompt takes the soft prompt's place; set prompt_length to 0")
        if self.levels is None:
            return self
        if (self.inject_start, self.inject_end, self.text_step) != (None, None, 1):
            raise ValueError("levels says all; leave out inject_start, inject_end and text_step")
        named = len(set(self.levels.values()))
        if not named:
            raise ValueError("levels must name at least one LM layer")
        if named != self.encoder_layers:
            raise ValueError(
                f"levels names {named} encoder layers, encoder_layers says {self.encoder_layers}; "
                f"set it to {named}"
            )
        return self
