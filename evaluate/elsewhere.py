"""A run on data that it was not trained for: out of distribution, zero-shot (tables 3 and 5)."""

from typing import Any

from epalm.config import Recipe, ViewsConfig, dump_recipe
from epalm.errors import EpalmError
from epalm.evaluate.report_scores import hundredfold, metric_name
from epalm.evaluate.scores_file import read_scores
from epalm.store.atomic import write_atomic
from epalm.store.spec import FeatureSpec, JointSpec
from epalm.train.run import Run


def elsewhere(run: Run, other: Recipe) -> Run:
    """The run as it is evaluated on another recipe's data, in RUN/on/RECIPE.

    Data, encoder, store and what is scored are the other recipe's; model, text and decoding the
    run's. An encoder that the run has trained stays its own.

    Raises:
        EpalmError: one of the two has several sources.
    """
    for recipe in (run.recipe, other):
        if recipe.also:
            raise EpalmError(
                f"{recipe.name}: evaluate --on takes a run and a recipe of one source, not `also`"
            )
    recipe = run.recipe
    encoder = recipe.encoder if recipe.encoder.train else other.encoder
    mixed = recipe.model_copy(
        update={
            "name": f"{recipe.name}-on-{other.name}",
            "seed": other.seed,  # of the choice of examples and of the control
            "data": other.data,
            # only view 0 is needed
            "encoder": encoder.model_copy(update={"views": ViewsConfig()}),
            "store": other.store,
            "evaluate": other.evaluate,
        }
    )
    return Run(run.folder / "on" / other.name, mixed)


def begin(there: Run) -> None:
    """Make its folder, which says how it is evaluated; what an earlier one said is forgotten."""
    written, text = there.folder / "recipe.yaml", dump_recipe(there.recipe)
    if not written.is_file() or written.read_bytes() != text.encode():
        there.scores.unlink(missing_ok=True)  # they are of what the earlier recipe says
    (there.folder / "features.json").unlink(missing_ok=True)
    write_atomic(written, text)


def differences(run: Run, spec: FeatureSpec | JointSpec) -> list[str]:
    """What the features are there that they were not in training, in sentences.

    Args:
        spec: of the features there.

    Raises:
        EpalmError: they do not fit the trained connections.
    """
    trained = run.recorded_features()
    if not isinstance(trained, FeatureSpec) or not isinstance(spec, FeatureSpec):
        return ["It is not recorded what features the run was trained on."]  # an imported one
    if spec == trained:
        return []
    if (spec.layers, spec.dim) != (trained.layers, trained.dim):
        raise EpalmError(
            f"evaluate --on: {spec.encoder} has {spec.layers} layers of width {spec.dim}, the run "
            f"was trained on {trained.layers} of width {trained.dim} ({trained.encoder}); its "
            "connections fit no other"
        )
    return [
        f"The features are others than those of the training, which the connections have never "
        f"seen: {spec.encoder} ({spec.modality}) in the place of {trained.encoder} "
        f"({trained.modality}); they differ in {', '.join(spec.differing(trained))}."
    ]


def gap(run: Run, target: Run, scores: dict[str, Any]) -> list[str]:
    """What the run scores there beside what others do, in sentences.

    The paper's gap (table 3) is that to a model trained on the same data, the target; beside it
    stands the difference to what the run scores on its own data. Both by the metrics that the two
    share; where they share none, by exact match.

    Args:
        target: the other recipe's own run, whether it is there or not.
        scores: of the run there.
    """
    trained_on_it = f"a run trained on it ({target.folder})"
    found = _beside(scores, target, f"{trained_on_it} has", "the gap is")
    found += _beside(scores, run, f"on its own {run.recipe.data.kind} it has", "a difference of")
    return found or [
        f"No gap: neither the run itself nor {trained_on_it} is evaluated; `evaluate` does it."
    ]


def _beside(scores: dict[str, Any], other: Run, whose: str, what: str) -> list[str]:
    if not other.scores.is_file():
        return []
    theirs = read_scores(other)
    pairs = {
        metric_name(name): (part["value"], scores["metrics"][name]["value"])
        for name, part in theirs.get("metrics", {}).items()
        if name in scores["metrics"]
    } or {"exact match": (theirs["accuracy"], scores["accuracy"])}
    return [
        f"{name[:1].upper()}{name[1:]} {hundredfold(ours)} here ({scores['split']}); {whose} "
        f"{hundredfold(value)} ({theirs['split']}): {what} {100 * (ours - value):+.1f}."
        for name, (value, ours) in pairs.items()
        if value is not None and ours is not None
    ]
