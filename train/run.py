"""The run folder that a training leaves.

RUNS/NAME/
    recipe.yaml                  the recipe, resolved
    features.json                what made its features (FeatureSpec, or JointSpec)
    inputs.json                  hashes of its LM and examples (train/inputs.py)
    metrics.jsonl                one line per logged step and per validation
    tensorboard/                 the same for TensorBoard
    checkpoints/last.safetensors, best.safetensors
    stages.json                  time and rate of each stage
    not-finite-STEP.json, .safetensors   the batch that stopped a training (docs/training.md)
    predictions.jsonl, predictions-shuffled.jsonl, scores.json, loss.png, report.html
    partial-PASS-….jsonl         answers of an evaluation that was interrupted
    .evaluating.lock             while it is evaluated
RUNS/.NAME.lock                  while it is trained
    on/NAME/                     an evaluation on another recipe's data
"""

import json
import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epalm.config import Recipe, differences, dump_recipe, load_recipe
from epalm.errors import EpalmError
from epalm.store.atomic import NUMBER, claim, read_json_lines, write_atomic
from epalm.store.spec import FeatureSpec, JointSpec, read_spec
from epalm.store.stage import Stage
from epalm.train.progress import read_progress

MOVES_BYTES = {
    "device", "runs", "store.root", "store.backend", "store.shard_rows", "store.placement",
    "lm.device_map", "encoder.batch_size", "encoder.workers", "encoder.decode_timeout",
    "decode.batch_size", "data.name", "data.media_root",
}  # fmt: skip
"""Recipe fields that say where things are, and in what pieces they are moved."""
FREE_TO_CHANGE = MOVES_BYTES | {
    "evaluate.split", "evaluate.examples", "evaluate.control", "train.accumulate",
    "train.log_every", "train.checkpoint_every",
}  # fmt: skip
"""Recipe fields that may differ when a training is resumed; metrics choose its best weights, and
nothing but `data.path` says what examples it is of."""
FREE_TO_SCORE = MOVES_BYTES | {
    "decode", "evaluate", "lm.dtype", "text.max_prompt_tokens", "data.path", "data.bad_media",
}  # fmt: skip
"""Fields and sections that may differ when a trained run is evaluated or asked."""
FREE_ELSEWHERE = FREE_TO_SCORE | {"name", "seed", "data", "encoder", "store"}
"""The same when it is evaluated on another recipe's data."""


_REMEDY = "choose another name (--set name=…), or replace that run with --overwrite"


_EVALUATING = ".evaluating.lock"


class BusyError(EpalmError):
    """Another process is training or evaluating the run."""


class Run:
    """Paths and small files of one run.

    Attributes:
        writes: False in all of several processes but one.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe, self.writes = folder, recipe, True
        self.last = folder / "checkpoints" / "last.safetensors"
        self.best = folder / "checkpoints" / "best.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.scores = folder / "scores.json"
        self.inputs = folder / "inputs.json"
        self._stages = folder / "stages.json"
        self._features = folder / "features.json"

    @property
    def begun(self) -> bool:
        """It has been trained, if only for a step, or its weights were imported."""
        return any(path.is_file() for path in (self.last, self.best, self.metrics))

    @classmethod
    def create(cls, recipe: Recipe, overwrite: bool = False) -> "Run":
        """The recipe's run folder: a new one, or the one to resume.

        Raises:
            EpalmError: as in `planned`.
            BusyError: it is to be replaced, and another process is evaluating it.
        """
        run = cls.planned(recipe, overwrite)
        written = run.folder / "recipe.yaml"
        if written.is_file() and (overwrite or not run.begun):
            for place in (run.folder, *run.folder.glob("on/*")):
                with cls(place, recipe).scoring():
                    pass  # its scores would come to stand in the new run
            old = run.folder.with_name(f".{run.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            run.folder.replace(old)  # a run is there or not, never half of it
            shutil.rmtree(old)
        write_atomic(written, dump_recipe(recipe))
        return run

    @classmethod
    def planned(cls, recipe: Recipe, overwrite: bool = False, remedy: str = _REMEDY) -> "Run":
        """The run that `create` would begin or resume.

        Args:
            remedy: what to do where it holds a run of another recipe.

        Raises:
            EpalmError: it cannot be written to, or holds something else, or a run of another recipe
                that has been begun and is not to be overwritten.
        """
        run = cls.of(recipe)
        folder = run.folder
        # os.path: a folder that may not be looked into counts as absent, and the one above is named
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise EpalmError(f"runs: {there} is no folder that can be written to; set another")
        written = folder / "recipe.yaml"
        if run.begun and written.is_file() and not overwrite:
            if found := differences(load_recipe(written), recipe, FREE_TO_CHANGE):
                lines = "\n".join(f"  {line}" for line in found)
                raise EpalmError(f"{folder}: holds a run of another recipe:\n{lines}\n{remedy}")
        elif not written.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise EpalmError(f"{folder}: not empty and not a run; choose another name")
        return run

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, no other process trains this run; the lock ends with the process.

        Raises:
            BusyError: one does.
        """
        path = self.folder.with_name(f".{self.folder.name}.lock")  # a run may be replaced
        choice = "is training this run; wait for it, or choose another name (--set name=…)"
        with _held(path, f"{self.folder}: another process {choice}"):
            yield

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Within it, no other process writes the folder's predictions and scores.

        Raises:
            BusyError: one does.
        """
        words = "another process is evaluating this run; wait for it"
        with _held(self.folder / _EVALUATING, f"{self.folder}: {words}"):
            yield

    @classmethod
    def of(cls, recipe: Recipe) -> "Run":
        """The recipe's run, whether it is there or not."""
        return cls(Path(recipe.runs) / recipe.name, recipe)

    @classmethod
    def open(
        cls, folder: str | Path, overrides: tuple[str, ...] = (), trained: bool = True
    ) -> "Run":
        """An existing run.

        Args:
            overrides: as in `load_recipe`.
            trained: False: only what was written of it is wanted, its weights need not be there.

        Raises:
            EpalmError: the folder is none, or holds no trained weights; or an override is of
                something that its training has settled.
        """
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise EpalmError(f"{folder}: not a run folder (no recipe.yaml)")
        run = cls(folder, load_recipe(folder / "recipe.yaml", overrides))
        run.check_changes(FREE_ELSEWHERE)
        if trained and not (run.last.is_file() or run.best.is_file()):
            raise EpalmError(f"{folder}: holds no trained weights ({run.last}); run `train` first")
        return run

    def changes(self, free: Set[str] = MOVES_BYTES) -> list[str]:
        """What its recipe says otherwise than that in its folder, but for such fields."""
        return differences(load_recipe(self.folder / "recipe.yaml"), self.recipe, free)

    def check_changes(self, free: Set[str]) -> None:
        """EpalmError where its recipe differs from that in its folder in other than such fields."""
        if changes := self.changes(free):
            lines = "\n".join(f"  {line}" for line in changes)
            raise EpalmError(
                f"{self.folder}: --set has no effect on a trained run, or makes another of it:\n"
                f"{lines}\nleave it out; docs/evaluation.md says what may be set"
            )

    def bind_features(self, spec: FeatureSpec | JointSpec) -> None:
        """Record what made the features, or compare with what was recorded.

        Raises:
            EpalmError: the run was trained on other features (encoder weights replaced, say).
        """
        recorded = self.recorded_features()
        if recorded is None:
            self.write(self._features, spec.canonical())
        elif recorded != spec:
            lines = "\n".join(f"  {line}" for line in spec.differences(recorded))
            raise EpalmError(
                f"{self.folder}: trained on other features:\n{lines}\nprovide the encoder it was "
                "trained with, or train again under another name"
            )

    def recorded_features(self) -> FeatureSpec | JointSpec | None:
        """What made the features it was trained on; None: not recorded yet.

        Raises:
            EpalmError: the record cannot be read.
        """
        if not self._features.is_file():
            return None
        try:
            return read_spec(self._features.read_text(encoding="utf-8"))
        except (ValueError, TypeError):
            raise EpalmError(
                f"{self._features}: not readable by this version; restore it, or train again with "
                "--overwrite"
            ) from None

    def write(self, path: Path, content: str) -> None:
        """Write one of the run's files, in the process that writes."""
        if self.writes:
            write_atomic(path, content)

    def weights(self, checkpoint: str) -> Path:
        """The checkpoint called `best` or `last`.

        A run that was stopped before its first validation has no best one yet; then it is the last.

        Raises:
            EpalmError: it had a best one, which is gone.
        """
        if checkpoint == "last":
            return self.last
        if not self.best.is_file() and self.last.is_file():
            step = read_progress(self.last).best_step
            if step < 0:
                return self.last
            raise EpalmError(
                f"{self.best}: not there, with the weights of step {step}, the best so far; "
                "restore it, or train again with --overwrite"
            )
        return self.best

    def add_stage(self, name: str, stage: Stage) -> None:
        """Record what a stage took; one recorded before is replaced."""
        known = self.stages() | {name: stage}
        text = json.dumps({key: value._asdict() for key, value in known.items()}, indent=2)
        self.write(self._stages, text)

    def stages(self) -> dict[str, Stage]:
        """The stages recorded so far, by name; EpalmError where somebody has changed them."""
        if not self._stages.is_file():
            return {}
        try:
            known = json.loads(self._stages.read_text(encoding="utf-8"))
            return {name: Stage.of(tree) for name, tree in known.items()}
        except (ValueError, AttributeError) as error:
            raise EpalmError(
                f"{self._stages}: must give `seconds` and `rate` of each stage ({error}); delete "
                "it, and the times so far are not reported"
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; EpalmError where somebody has changed one."""
        plotted = {"loss": NUMBER, "val_score": NUMBER}
        return read_json_lines(self.metrics, {"step": int}, plotted)

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after a step."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        write_atomic(self.metrics, "".join(kept))


@contextmanager
def _held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of this file, which is made for it; BusyError with such words if one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    while (stream := claim(path)) is None:
        if path.is_file():
            raise BusyError(busy)
        path.touch()  # whoever had it has just ended
    with stream:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
