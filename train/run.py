"""The run folder that a training leaves.

RUNS/NAME/
    recipe.yaml                  the recipe, resolved
    features.json                what made the features it was trained on (FeatureSpec)
    metrics.jsonl                one line per logged step and per validation
    tensorboard/                 the same for TensorBoard
    checkpoints/last.safetensors, best.safetensors
    stages.json                  time and rate of each stage
    predictions.jsonl, predictions-shuffled.jsonl, scores.json, loss.png, examples.html
"""

import json
import shutil
from pathlib import Path
from typing import Any

from epalm.config import Recipe, dump_recipe, load_recipe
from epalm.errors import EpalmError
from epalm.store.atomic import read_json_lines, write_atomic
from epalm.store.spec import FeatureSpec
from epalm.store.stage import Stage

FREE_TO_CHANGE = {"evaluate", "device", "runs"}
"""Recipe fields that may differ when a training is resumed."""


class Run:
    """Paths and small files of one run."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe
        self.last = folder / "checkpoints" / "last.safetensors"
        self.best = folder / "checkpoints" / "best.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.scores = folder / "scores.json"
        self._stages = folder / "stages.json"

    @classmethod
    def create(cls, recipe: Recipe, overwrite: bool = False) -> "Run":
        """The recipe's run folder: a new one, or the one to resume.

        Raises:
            EpalmError: the folder holds a run of another recipe, or something else.
        """
        folder = Path(recipe.runs) / recipe.name
        written = folder / "recipe.yaml"
        if written.is_file() and overwrite:
            shutil.rmtree(folder)
        if written.is_file():
            differences = _differences(load_recipe(written), recipe)
            if differences:
                lines = "\n".join(f"  {line}" for line in differences)
                raise EpalmError(
                    f"{folder}: holds a run of another recipe:\n{lines}\nchoose another name "
                    "(--set name=…), or replace that run with --overwrite"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise EpalmError(f"{folder}: not empty and not a run; choose another name")
        write_atomic(written, dump_recipe(recipe))
        return cls(folder, recipe)

    @classmethod
    def open(cls, folder: str | Path, overrides: tuple[str, ...] = ()) -> "Run":
        """An existing run; EpalmError when the folder is none or holds no trained weights."""
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise EpalmError(f"{folder}: not a run folder (no recipe.yaml)")
        run = cls(folder, load_recipe(folder / "recipe.yaml", overrides))
        if not (run.last.is_file() or run.best.is_file()):
            raise EpalmError(f"{folder}: holds no trained weights ({run.last}); run `train` first")
        return run

    def bind_features(self, spec: FeatureSpec) -> None:
        """Record what made the features, or compare with what was recorded.

        Raises:
            EpalmError: the run was trained on other features (encoder weights replaced, say).
        """
        path = self.folder / "features.json"
        if not path.is_file():
            write_atomic(path, spec.canonical())
            return
        try:
            recorded = FeatureSpec.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            raise EpalmError(f"{path}: not readable by this version; train again") from None
        if recorded != spec:
            lines = "\n".join(f"  {line}" for line in spec.differences(recorded))
            raise EpalmError(
                f"{self.folder}: trained on other features:\n{lines}\nprovide the encoder it was "
                "trained with, or train again under another name"
            )

    def add_stage(self, name: str, stage: Stage) -> None:
        """Record what a stage took; one recorded before is replaced."""
        known = self.stages() | {name: stage}
        text = json.dumps({key: value._asdict() for key, value in known.items()}, indent=2)
        write_atomic(self._stages, text)

    def stages(self) -> dict[str, Stage]:
        """The stages recorded so far, by name."""
        if not self._stages.is_file():
            return {}
        known = json.loads(self._stages.read_text(encoding="utf-8"))
        return {name: Stage(**stage) for name, stage in known.items()}

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_json_lines(self.metrics)

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after a step."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        write_atomic(self.metrics, "".join(kept))


def _differences(old: Recipe, new: Recipe) -> list[str]:
    found = []
    for name in Recipe.model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if name in FREE_TO_CHANGE or before == after:
            continue
        if not hasattr(before, "model_fields_set"):
            found.append(f"{name}: {before!r} there, {after!r} wanted")
            continue
        for key in type(before).model_fields:
            one, other = getattr(before, key), getattr(after, key)
            if one != other:
                found.append(f"{name}.{key}: {one!r} there, {other!r} wanted")
    return found
