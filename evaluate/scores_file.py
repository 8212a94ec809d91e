"""Reading scores.json back: what `show`, `compare`, `sweep` and `evaluate --on` take from it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from epalm.errors import EpalmError
from epalm.train.run import Run


class _Part(BaseModel):
    value: float | None
    interval: tuple[float, float] | None
    n: int


class _Summary(_Part):
    by_type: dict[str, _Part] = {}
    by: dict[str, dict[str, _Part]] = {}


class _Scores(BaseModel):
    """What readers rely on; evaluate/scores.py writes more."""

    split: str
    examples: int
    accuracy: float
    accuracy_by_type: dict[str, float]
    examples_by_type: dict[str, int]
    metrics: dict[str, _Summary] = {}
    shuffled_metrics: dict[str, _Summary] = {}
    shuffled_accuracy: float = 0.0
    shuffled_accuracy_by_type: dict[str, float] = {}
    majority_accuracy: float = 0.0
    majority_accuracy_by_type: dict[str, float] = {}
    trained_parameters: int
    total_parameters: Annotated[int, Field(gt=0)]
    seconds: dict[str, float]
    rates: dict[str, str]

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> "_Scores":
        kinds, exact = self.accuracy_by_type, self.metrics.get("exact_match")
        beside: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
            "rates": (self.seconds, self.rates),
            "examples_by_type": (kinds, self.examples_by_type),
        }
        for blind in ("shuffled_accuracy", "majority_accuracy"):
            if blind in self.model_fields_set:
                beside[f"{blind}_by_type"] = kinds, getattr(self, f"{blind}_by_type")
        if exact and len(kinds) > 1:
            beside["metrics.exact_match.by_type"] = kinds, exact.by_type
        for name, shuffled in self.shuffled_metrics.items():
            if name in self.metrics:
                ours = self.metrics[name].by_type
                beside[f"shuffled_metrics.{name}.by_type"] = ours, shuffled.by_type
        for field, (wanted, there) in beside.items():
            if missing := sorted(wanted.keys() - there.keys()):
                raise ValueError(f"{field}: {missing[0]!r} is missing")
        return self


def read_scores(run: Run) -> dict[str, Any]:
    """A run's scores; EpalmError when it has not been evaluated, or somebody has changed them."""
    if not run.scores.is_file():
        raise EpalmError(f"{run.scores}: not there; run `evaluate` first")
    content = run.scores.read_bytes()
    try:
        _Scores.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise EpalmError(
            f"{run.scores}: not as `evaluate` wrote it: {wrong}; run `evaluate {run.folder}` again"
        ) from None
    scores: dict[str, Any] = json.loads(content)
    return scores
