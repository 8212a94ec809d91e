"""`train`: optimisation on features."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from epalm.config.section import Fraction, Positive, Section

_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Optimisation on features (paper, appendix A; conventions 12, 13, 24, 25)."""

    steps: Positive = Field(description="optimiser steps")
    batch_size: Positive = Field(64, description="examples per step")
    accumulate: Positive = Field(
        1,
        description="pieces in which each process computes its share of a batch, one after the "
        "other; takes less memory, changes nothing else",
    )
    examples_per_media: Positive = Field(
        4, description="at most so many examples about one media stand together in a batch"
    )
    lr: float = Field(2e-5, gt=0, description="peak learning rate of the connections")
    connection_start: Literal["random", "answers"] = Field(
        "random",
        description="random: as linear layers do, the paper's; answers: ours, perceptual tokens "
        "near the LM's states of the media's answers (yes and no left out)",
    )
    warmup_lr: float = Field(0.0, ge=0, description="learning rate that the warm-up starts from")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step")
    schedule: Literal["cosine", "official", "official-caption"] = Field(
        "cosine",
        description="cosine: linear warm-up, then a cosine over the steps; official: the official "
        "code's stair of 400 steps, then a cosine that moves once an epoch; official-caption: the "
        "same as its caption scripts have it, where only biases are scheduled (bug 4)",
    )
    epochs: Positive | None = Field(
        None, description="equal parts of the steps at which an official schedule moves"
    )
    warmup: Fraction = Field(
        0.1, description="share of the steps spent warming up; of the cosine schedule"
    )
    prompt_lr: float | None = Field(
        None, gt=0, description="of soft prompt, deep prompts and adapters; default: lr"
    )
    prompt_schedule: Literal["cosine", "constant"] = "cosine"
    lm_lr: float | None = Field(
        None, gt=0, description="of the LM's own weights where they are trained; default: lr"
    )
    encoder_lr: float | None = Field(
        None, gt=0, description="of the encoder's own weights where they are trained; default: lr"
    )
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; None: no limit")
    loss: Literal["answer", "all"] = Field(
        "answer",
        description="answer: mean over answer and EOS tokens; all: summed over all text "
        "tokens, divided by the batch, times loss_scale (conventions 12, 13)",
    )
    loss_scale: float = Field(1.0, gt=0, description="factor on the loss; the reference's is 0.1")
    text_states: Literal["auto", "always", "never"] = Field(
        "auto",
        description="keep the states of texts at the first injection layer in the feature store, "
        "where nothing below it is trained (eP-ALM_lin), so that half the LM is not run again; "
        "auto: where the training would run them at least twice; always: an error where it "
        "cannot be",
    )
    log_every: Positive = Field(10, description="steps between metric lines")
    val_every: Positive | None = Field(None, description="steps between validations; None: at end")
    val_examples: Positive | None = Field(None, description="seeded choice; None: all of them")
    patience: Positive | None = Field(
        None, description="validations without a better score that end the training; None: never"
    )
    checkpoint_every: Positive = Field(100, description="steps between checkpoints")

    @model_validator(mode="after")
    def _goes_together(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be divisible by accumulate "
                f"({self.accumulate})"
            )
        if (self.schedule == "cosine") != (self.epochs is None):
            raise ValueError("epochs belongs to the official schedules, and they need it")
        if self.schedule != "cosine" and self.warmup != type(self).model_fields["warmup"].default:
            raise ValueError("warmup is of the cosine schedule; the official ones have 400 steps")
        if self.patience is not None and self.val_every is None:
            raise ValueError("patience counts validations; set val_every too")
        return self
