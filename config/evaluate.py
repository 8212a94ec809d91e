"""`decode` and `evaluate`: how answers are generated, and what is scored."""

from typing import Literal

from pydantic import Field, model_validator

from epalm.config.section import Fraction, Positive, Section


class DecodeConfig(Section):
    """Generation at validation, evaluation and prediction."""

    num_beams: Positive = 1
    max_new_tokens: Positive = 10
    length_penalty: float = Field(
        1.0,
        description="power of its length that a beam's score is divided by; more: longer answers",
    )
    batch_size: Positive = 64
    do_sample: bool = Field(
        False, description="draw every token at random (the paper's random sampling)"
    )
    temperature: float | None = Field(None, gt=0, description="of the draws; default: 1")
    top_k: int | None = Field(
        None, ge=0, description="draw among the k likeliest tokens; 0: all; default: 50"
    )
    top_p: Fraction | None = Field(
        None, description="draw among the likeliest tokens that have this share; default: 1"
    )
    seed: int = Field(
        0, ge=0, description="of the draws, which depend on decode.batch_size and its order too"
    )

    @model_validator(mode="after")
    def _draws_are_asked_for(self) -> "DecodeConfig":
        given = [
            name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None
        ]
        if self.seed:
            given.append("seed")
        if given and not self.do_sample:
            raise ValueError(f"{given[0]} is for random draws; set do_sample to true")
        return self

    @model_validator(mode="after")
    def _penalised_beams_are_several(self) -> "DecodeConfig":
        if self.length_penalty != 1 and self.num_beams == 1:
            raise ValueError(
                "length_penalty compares beams; set num_beams to 2 or more, or length_penalty to 1"
            )
        return self


class EvalConfig(Section):
    """What is scored after training."""

    split: Literal["train", "val", "test"] = "test"
    examples: Positive | None = Field(None, description="seeded choice; None: all of them")
    control: bool = Field(True, description="also score with media shuffled between examples")
    metrics: tuple[str, ...] | None = Field(
        None,
        description="names in METRICS of evaluate/metrics, the first of which chooses the best "
        "checkpoint; default: by dataset, see docs/metrics.md",
    )
    official: bool = Field(
        False,
        description="captions: tokenize with Stanford's Java program; adds METEOR, SPICE and "
        "SPIDEr to the default metrics",
    )

    @model_validator(mode="after")
    def _has_metrics(self) -> "EvalConfig":
        if self.metrics is not None and (
            not self.metrics or len(set(self.metrics)) < len(self.metrics)
        ):
            raise ValueError("metrics must name at least one metric, and none twice")
        return self
