"""The recipe: all sections, and what must hold between them."""

from typing import Annotated

from pydantic import Field, model_validator

from epalm.config.data import DataConfig
from epalm.config.encoder import EncoderConfig
from epalm.config.evaluate import DecodeConfig, EvalConfig
from epalm.config.lm import LMConfig, TextConfig
from epalm.config.section import Name, Section
from epalm.config.store import StoreConfig
from epalm.config.train import TrainConfig
from epalm.config.variant import VariantConfig

# before a slash, such names sort as they do alone
SourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
MAIN = "main"
"""Name of the source that a recipe's own `data` and `encoder` are."""


class Source(Section):
    """A further dataset and the encoder that it is seen or heard through."""

    data: DataConfig
    encoder: EncoderConfig


class Recipe(Section):
    """One whole run."""

    name: Name = Field(description="names the run folder")
    seed: int = Field(
        0, ge=0, lt=2**64, description="of subsets, initialisation, sampling and control"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    runs: str = Field("runs", description="folder that holds the run folders")
    data: DataConfig
    text: TextConfig = TextConfig()
    encoder: EncoderConfig
    also: dict[SourceName, Source] = Field(
        {},
        description="further sources by name, trained on together with data and encoder (the "
        f"source `{MAIN}`), each through a connection of its own",
    )
    store: StoreConfig = StoreConfig()
    lm: LMConfig
    variant: VariantConfig = VariantConfig()
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvalConfig = EvalConfig()

    @property
    def data_seed(self) -> int:
        """Of the choice of media and examples."""
        return self.seed if self.data.seed is None else self.data.seed

    def sources(self) -> dict[str, "Recipe"]:
        """By name in alphabetical order, the recipe that each source would have by itself."""
        alone = {MAIN: self.model_copy(update={"also": {}})}
        for name, source in self.also.items():
            update = {"data": source.data, "encoder": source.encoder, "also": {}}
            alone[name] = self.model_copy(update=update)
        return dict(sorted(alone.items()))

    @model_validator(mode="after")
    def _sources_have_their_own_names(self) -> "Recipe":
        if MAIN in self.also:
            raise ValueError(f"also: {MAIN} is the recipe's own data and encoder; rename it")
        encoders = [self.encoder, *(source.encoder for source in self.also.values())]
        if self.also and any(encoder.online for encoder in encoders):
            raise ValueError("encoder.online: only a recipe with one source; leave out `also`")
        return self

    @model_validator(mode="after")
    def _rates_are_of_what_is_trained(self) -> "Recipe":
        for rate, trained, switch in (
            ("lm_lr", self.variant.train_lm, "variant.train_lm"),
            ("encoder_lr", self.encoder.train, "encoder.train"),
        ):
            if getattr(self.train, rate) is not None and not trained:
                raise ValueError(f"train.{rate}: leave it out, or set {switch} to true")
            if trained and self.train.schedule == "official-caption":
                raise ValueError(
                    "train.schedule: official-caption has one peak for all that is trained; with "
                    f"{switch} set it to official or cosine"
                )
        return self

    @model_validator(mode="after")
    def _start_has_features(self) -> "Recipe":
        if self.encoder.online and self.train.connection_start == "answers":
            raise ValueError(
                "train.connection_start: answers needs features that are kept; set "
                "it to random, or encoder.online to false"
            )
        return self

    @model_validator(mode="after")
    def _lm_can_be_spread(self) -> "Recipe":
        variant = self.variant
        adapters = variant.attention_adapters.reduction or variant.feed_forward_adapters.reduction
        if self.lm.device_map and adapters:
            raise ValueError("lm.device_map: an LM with adapters cannot be spread over devices")
        return self
