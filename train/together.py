"""Several runs that train together: the rows of all in one batch, against one frozen LM.

Each run has its own trained parts, optimiser, batches, metrics and checkpoints, and ends as it
would have ended alone. What they share is each pass through the LM.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate

import torch
from torch.nn.functional import pad

from epalm.config import Recipe
from epalm.device import send
from epalm.errors import EpalmError
from epalm.extract.sources import open_sources
from epalm.model.connection import media_of
from epalm.model.prefix import Rows
from epalm.model.shared import SharedFeatures, SharedLM
from epalm.model.text import Equal
from epalm.train.batches import Batch
from epalm.train.guard import NotFiniteError
from epalm.train.loop import Training
from epalm.train.loss import losses_of
from epalm.train.parts import Parts, assemble, augment
from epalm.train.step import Outcome

OWN = ("lr", "prompt_lr", "weight_decay")
"""Fields of `train` in which runs that train together may differ, beside name and seed."""


def groups(recipes: Sequence[Recipe], together: int) -> list[list[int]]:
    """Which recipes train together, by index: at most so many, in order of the first.

    They are alike but for their own fields. The LM must be the same for all, their features kept,
    and the mask causal; others train alone.
    """
    found: dict[str, list[list[int]]] = {}
    for index, recipe in enumerate(recipes):
        variant = recipe.variant
        alone = variant.train_lm or variant.mask == "reference" or recipe.encoder.online
        alike = found.setdefault(_shared_fields(recipe), [])
        if alike and len(alike[-1]) < together and not alone:
            alike[-1].append(index)
        else:
            alike.append([index])
    return sorted(group for alike in found.values() for group in alike)


def assemble_together(recipes: Sequence[Recipe]) -> list[Parts]:
    """The parts of recipes of a group, with one LM for all.

    They have one dataset and one table of features too, where their `data_seed` is the same.

    Raises:
        EpalmError: as in `assemble`; or there are several processes.
    """
    first = assemble(recipes[0])
    if first.accelerator.num_processes > 1:
        raise EpalmError(
            "sweep --together: runs train together in one process; leave it out, or start the "
            "sweep without accelerate launch"
        )
    return [first, *(_beside(first, recipe) for recipe in recipes[1:])]


def train_together(trainings: Sequence[Training]) -> dict[Training, NotFiniteError]:
    """Take all steps of runs of a group; of each as `train` does, but for the order of sums.

    Runs that were interrupted at different steps first go on alone, up to the furthest one's. One
    that loses its patience leaves the others, and so does one that is not finite any more.

    Args:
        trainings: in one process, of parts from `assemble_together`.

    Returns:
        Of those that are not finite, what is wrong.
    """
    stopped: dict[Training, NotFiniteError] = {}

    def go_on(training: Training, outcome: Outcome) -> None:
        try:
            training.after(outcome)
        except NotFiniteError as error:
            stopped[training] = error

    going = [training for training in trainings if not training.over]
    furthest = max((training.progress.step for training in going), default=0)
    with ExitStack() as stack:
        for training in going:
            stack.enter_context(training)
            if training.progress.step < furthest:
                alone = training.stepper()
                while training.progress.step < furthest and not (
                    training.over or training in stopped
                ):
                    go_on(training, alone(training.progress.step))
        while going := [t for t in going if not (t.over or t in stopped)]:
            step = SharedStepper(going)
            while not any(t.over or t in stopped for t in going):
                outcomes = step(going[0].progress.step)
                for training, outcome in zip(going, outcomes, strict=True):
                    go_on(training, outcome)
    return stopped


class SharedStepper:
    """Takes optimiser steps of several runs at once; all are at the same step."""

    def __init__(self, trainings: Sequence[Training]):
        self.model = SharedLM([training.parts.model for training in trainings])
        self.steppers = [training.stepper() for training in trainings]
        self.clocks = [training.clock for training in trainings]

    def __call__(self, step: int) -> list[Outcome]:
        """Learn from the batches of a step, from 0; the outcome for each run."""
        own_factors = [stepper.begin(step) for stepper in self.steppers]
        factors = send(torch.tensor(own_factors), self.model.device)
        total = torch.zeros_like(factors)
        for index in range(self.steppers[0].config.accumulate):
            batches = [stepper.piece(step, index) for stepper in self.steppers]
            begin = time.perf_counter()
            sums, _ = losses_of(self.model, join(batches))
            sums.sum().backward()
            total += sums.detach().view(len(batches), -1).sum(dim=1) * factors
            share = (time.perf_counter() - begin) / len(batches)
            for clock in self.clocks:
                clock.spent["step"] += share
        ends = zip(self.steppers, own_factors, strict=True)
        norms = [stepper.end(factor) for stepper, factor in ends]
        return [Outcome(*pair) for pair in zip(total, norms, strict=True)]


def join(batches: Sequence[Batch]) -> Batch:
    """The batches of R runs as one of SharedLM's, run after run; all have as many texts."""
    length = max(batch.input_ids.shape[1] for batch in batches)
    last = max(batch.last for batch in batches)
    media = [media_of(batch.features) for batch in batches]
    texts = [len(batch.rows) for batch in batches]
    different = [len(batch.equal.first) for batch in batches]
    before = {
        key: [0, *accumulate(counts)]
        for key, counts in {"media": media, "texts": texts, "different": different}.items()
    }

    def padded(name: str, value: int) -> torch.Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        return torch.cat([pad(t, (length - t.shape[1], 0), value=value) for t in tensors])

    def shifted(tensors: Sequence[torch.Tensor], key: str) -> torch.Tensor:
        return torch.cat([t + first for t, first in zip(tensors, before[key], strict=False)])

    labelled = []
    for batch, first in zip(batches, before["texts"], strict=False):
        row, place = batch.labelled // batch.last, batch.labelled % batch.last
        labelled.append((row + first) * last + place + last - batch.last)
    states = [batch.text_states for batch in batches if batch.text_states is not None]
    if len(states) < len(batches):  # a run that is too short for them has none
        states = []
    return Batch(
        padded("input_ids", 0),
        padded("attention_mask", 0),
        padded("labels", -100),
        SharedFeatures([batch.features for batch in batches], Rows(media, different, texts)),
        shifted([batch.rows for batch in batches], "media"),
        Equal(
            shifted([batch.equal.first for batch in batches], "texts"),
            shifted([batch.equal.row for batch in batches], "different"),
        ),
        torch.cat(labelled),
        last,
        torch.cat([pad(s, (0, 0, length - s.shape[1], 0)) for s in states]) if states else None,
    )


def _shared_fields(recipe: Recipe) -> str:
    """All that runs of a group have alike."""
    tree = recipe.model_dump(mode="json", exclude={"name": True, "seed": True, "train": set(OWN)})
    return json.dumps(tree, sort_keys=True)


def _beside(first: Parts, recipe: Recipe) -> Parts:
    """The recipe's parts, on the LM of others."""
    features, dataset = first.features, first.dataset
    if recipe.data_seed != first.recipe.data_seed:
        features, dataset = open_sources(recipe)
        features.place(recipe.store.placement, first.device)
    model = augment(first.model.lm, first.codec, recipe, features.spec)
    return replace(first, recipe=recipe, features=features, dataset=dataset, model=model)
