"""`data`: which dataset, which part of it, and how many of its examples."""

from typing import Literal

from pydantic import Field, model_validator

from epalm.config.section import Positive, Section


class Limits(Section):
    """How many media of each split are used; a seeded choice. None means all."""

    train: Positive | None = None
    val: Positive | None = None
    test: Positive | None = None


class FewShotConfig(Section):
    """A seeded choice of training examples; with one seed, a larger one holds a smaller one."""

    fraction: float | None = Field(
        None, gt=0, le=1, description="share of the training examples; None: all of them"
    )
    count: Positive | None = Field(None, description="number of examples, instead of a fraction")
    balanced: bool = Field(
        False, description="as many examples of each answer as of any other, while they last"
    )

    @model_validator(mode="after")
    def _one_size(self) -> "FewShotConfig":
        if self.fraction is not None and self.count is not None:
            raise ValueError("give fraction or count, not both")
        if self.balanced and self.fraction is None and self.count is None:
            raise ValueError("balanced says how to choose; give fraction or count too")
        return self


class DataConfig(Section):
    """Which dataset, and which part of it."""

    kind: str = Field(description="a reader of data/, see READERS there")
    path: str = Field(description="annotation file, folder of such files, or wheel: address")
    splits: str = Field(
        "standard", description="which of a dataset's published splits, e.g. karpathy for VQA v2"
    )
    files: dict[Literal["train", "val", "test"], str] = Field(
        {},
        description="annotation file of each split, in the folder `path`; default: the names that "
        "the dataset is distributed with; a split that is left out is not read",
    )
    media_root: str | None = Field(
        None,
        description="folder, zip or tar archive, or several of these by glob or brace list, that "
        "media paths are relative to; default: beside the annotations",
    )
    media_name: str | None = Field(
        None,
        description="media paths as a pattern such as {video}.mp4, where files are named otherwise "
        "than the reader expects; its file lists the names that may stand in braces",
    )
    name: str | None = Field(
        None, description="dataset name under which the feature set lists media; default from path"
    )
    limits: Limits = Limits()
    seed: int | None = Field(
        None, ge=0, description="of subsets and held-out media; default: the recipe's seed"
    )
    val_from_train: int = Field(
        0, ge=0, description="training media held out as `val` where the dataset has no such split"
    )
    few_shot: FewShotConfig = Field(
        FewShotConfig(), description="examples that are trained on, of those that limits leaves"
    )
    bad_media: Literal["stop", "skip"] = Field(
        "stop", description="media that are missing or cannot be decoded: stop, or leave them out"
    )
