"""The steps of `train_step.py`, and the matrix products that they cannot do without."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from step_world import MEDIA_SHAPES, PROMPT, VARIANTS, Case, World
from torch import nn
from torch.nn.functional import cross_entropy

from epalm.extract.encoder import Encoder, build
from epalm.model import attention, linears
from epalm.model.augmented import AugmentedLM
from epalm.model.shared import SharedLM
from epalm.model.text import Equal
from epalm.train.batches import Batch, TrainingBatches
from epalm.train.loss import losses_of
from epalm.train.optimiser import make_optimiser, set_learning_rates
from epalm.train.text_states import open_text_states
from epalm.train.together import join

Step = Callable[[], torch.Tensor]
IN_LOOP = {"float32": "encoder in loop", "bfloat16": "encoder, bf16"}


class Steps:
    """The steps of one case, by name; each returns its loss."""

    def __init__(self, world: World, case: Case):
        self.world, self.case = world, case
        self.config = world.recipe(case).train
        self.model = world.model(case)
        self.batches = world.batches(case)
        self.optimiser = make_optimiser(self.model, self.config)
        self.number = 0
        fused, plain = self._with_fused_attention, self._with_plain_linears
        self.by_name: dict[str, Step] = {
            "encoder in loop": fused(lambda: self._step(self._encoder_in_loop("float32"))),
            "naive": fused(lambda: self._step(self._naive(logits_at_labels=False, graph=True))),
            "logits": fused(lambda: self._step(self._naive(logits_at_labels=True, graph=True))),
            "graph": fused(lambda: self._step(self._naive(logits_at_labels=True, graph=False))),
            "attention": plain(lambda: self._step(self._naive(logits_at_labels=True, graph=False))),
            "prefix": plain(lambda: self._step(self._apart)),
            "packed": plain(lambda: self._step(self._whole_last_layer)),
            "last": plain(lambda: self._step(self._shared)),
            "linears": lambda: self._step(self._shared),
            "halves": self._step_in_halves,
            "three, together": self._step_of_three,
        }
        if world.dtype == torch.bfloat16:
            in_bf16 = fused(lambda: self._step(self._encoder_in_loop("bfloat16")))
            self.by_name = {"encoder, bf16": in_bf16, **self.by_name}
        if self.model.lower_is_frozen:
            self.with_states = world.batches(case)
            self.with_states.text_states = open_text_states(
                world.recipe(case), self.model, self.with_states.texts
            )
            self.by_name["states"] = lambda: self._step(self._shared, self.with_states)

    def data_seconds(self, count: int = 20) -> float:
        """What drawing a batch takes."""
        start = time.perf_counter()
        for step in range(count):
            self.batches[self.number + step]
        return (time.perf_counter() - start) / count

    @cached_property
    def _three(self) -> tuple[SharedLM, list[torch.optim.AdamW]]:
        models = [self.world.model(self.case) for _ in range(3)]
        return SharedLM(models), [make_optimiser(model, self.config) for model in models]

    def _step_in_halves(self) -> torch.Tensor:
        set_learning_rates(self.optimiser, self.number, self.config)
        self.optimiser.zero_grad(set_to_none=True)
        labels = self.batches.size(self.number).labels
        total = torch.zeros((), device=self.world.device)
        for index in range(2):
            sums, _ = losses_of(self.model, self.batches.piece(self.number, index, 2))
            loss = sums.sum() / labels
            loss.backward()
            total += loss.detach()
        self.optimiser.step()
        self.number += 1
        return total

    def _step_of_three(self) -> torch.Tensor:
        shared, optimisers = self._three
        for optimiser in optimisers:
            set_learning_rates(optimiser, self.number, self.config)
            optimiser.zero_grad(set_to_none=True)
        batch = join([self.batches[self.number + run] for run in range(3)])
        sums, counts = losses_of(shared, batch)
        loss = 3 * sums.sum() / counts.sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        self.number += 3
        return loss.detach() / 3

    def _step(
        self,
        loss_of: Callable[[AugmentedLM, Batch], torch.Tensor],
        batches: TrainingBatches | None = None,
    ) -> torch.Tensor:
        batch = (batches or self.batches)[self.number]
        set_learning_rates(self.optimiser, self.number, self.config)
        self.optimiser.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch)
        loss.backward()
        self.optimiser.step()
        self.number += 1
        return loss.detach()

    @staticmethod
    def _with_fused_attention(step: Step) -> Step:
        """The step with torch's own attention, as Hugging Face's models have it."""
        return Steps._with_plain_linears(_on_no_device(attention.WRITTEN_OUT_ON, step))

    @staticmethod
    def _with_plain_linears(step: Step) -> Step:
        """The step with linear layers as Hugging Face's models have them."""
        return _on_no_device(linears.OWN_LINEARS_ON, step)

    @cached_property
    def _image(self) -> torch.Tensor:
        return torch.randn(self.case.batch, *MEDIA_SHAPES["image"])

    @cached_property
    def _encoders(self) -> dict[str, Encoder]:
        return {
            dtype: build(self.world.recipe(self.case, dtype=dtype), self.world.device)
            for dtype in IN_LOOP
        }

    def _naive(self, logits_at_labels: bool, graph: bool) -> Callable[..., torch.Tensor]:
        """As usually written: everything for every example, at once."""

        def loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
            own = batch.features[batch.rows]
            return _joint_loss(model, batch, own, logits_at_labels, graph)

        return loss

    def _encoder_in_loop(self, dtype: str) -> Callable[..., torch.Tensor]:
        def loss(model: AugmentedLM, batch: Batch) -> torch.Tensor:
            features = self._encoders[dtype].encode(self._image, range(12)).squeeze(2)[:, -6:]
            return _joint_loss(model, batch, features.clone().to(model.device), False, True)

        return loss

    def _apart(self, model: AugmentedLM, batch: Batch) -> torch.Tensor:
        """First the prefixes, then the texts."""

        def states(
            ids: torch.Tensor,
            mask: torch.Tensor,
            features: torch.Tensor,
            rows: torch.Tensor,
            equal: Equal,
            *_: Any,
        ) -> torch.Tensor:
            return model.extend(model.perceive(features, rows), ids, mask, equal)[:, -batch.last :]

        apart = SimpleNamespace(
            lm=model.lm, trained=model.trained, family=model.family, states=states
        )
        return self._shared(apart, batch)

    def _whole_last_layer(self, model: AugmentedLM, batch: Batch) -> torch.Tensor:
        length = batch.input_ids.shape[1]
        offset = length - batch.last
        row, place = batch.labelled // batch.last, batch.labelled % batch.last
        whole = replace(batch, last=length, labelled=row * length + offset + place)
        return self._shared(model, whole)

    def _shared(self, model: Any, batch: Batch) -> torch.Tensor:
        sums, counts = losses_of(model, batch)
        return sums.sum() / counts.sum()


def _on_no_device(devices: set[str], step: Step) -> Step:
    """The step without what is done on these devices."""

    def stepped() -> torch.Tensor:
        usual = devices.copy()
        devices.clear()
        try:
            return step()
        finally:
            devices.update(usual)

    return stepped


def _joint_loss(
    model: AugmentedLM, batch: Batch, features: torch.Tensor, at_labels: bool, graph: bool
) -> torch.Tensor:
    """Loss of the whole sequences, run at once; `graph`: down to the words."""
    if graph:
        model.lm.enable_input_require_grads()
    states = model.joint_states(batch.input_ids, batch.attention_mask, features)
    if graph:
        model.lm.disable_input_require_grads()
    if at_labels:
        text = states[:, -batch.last :].flatten(0, 1)[batch.labelled]
        labels = batch.labels[:, -batch.last :].flatten()[batch.labelled]
        return cross_entropy(model.family.logits(text).float(), labels)
    logits = model.family.logits(states)[:, -batch.labels.shape[1] :].flatten(0, 1)
    return cross_entropy(logits.float(), batch.labels.flatten())


class Bound:
    """The matrix products of a case, ready to be run back to back.

    Args:
        lower_cached: without those of the lower half.
        prompts: with those of prompt tokens, once per step in the lower half and once per media
            above it; a layer's text and prefix in one product, which is faster.
        own: as `train` makes them, if it makes them otherwise than torch (`model/linears.py`).
    """

    def __init__(
        self,
        world: World,
        case: Case,
        lower_cached: bool = False,
        prompts: bool = False,
        own: bool = False,
    ):
        lm = world.lm
        layers = lm.model.decoder.layers
        half = len(layers) // 2
        texts, media = case.batch * (PROMPT + 1), case.batch // case.questions
        prompt = VARIANTS[case.variant]["prompt_length"]
        self._kind = linears._kind(texts) if own and world.device.type == "cpu" else None
        self._products: list[Callable[[], torch.Tensor]] = []
        linears_of = [
            [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
             layer.self_attn.out_proj, layer.fc1, layer.fc2]
            for layer in layers
        ]  # fmt: skip

        def rows_of(index: int) -> list[int]:
            upper = index >= half
            if prompts:
                return [texts + (media * (prompt + 1) if upper else prompt)]
            return [texts, media] if upper else [texts]

        for index, some in enumerate(linears_of):
            if index >= half or not lower_cached:
                for rows in rows_of(index):
                    self._forward(rows, some)
        self._forward(2 * case.batch, [lm.lm_head])
        self._backward(2 * case.batch, [lm.lm_head])
        lowest = 0 if prompt else half
        for index in reversed(range(lowest, len(layers))):
            some = linears_of[index]
            for rows in rows_of(index):
                # in the lowest layer text is reached as keys' queries are, but not its own input
                own_input = index == lowest and rows >= texts
                self._backward(rows, some[3:] if own_input else some)

    def _forward(self, rows: int, some: list[nn.Linear]) -> None:
        for layer in some:
            weight = layer.weight.detach()
            left = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
            if self._kind is None:
                self._products.append(partial(torch.mm, left, weight.t()))
            else:
                self._products.append(partial(linears._of(layer, self._kind).forward, left, False))

    def _backward(self, rows: int, some: list[nn.Linear]) -> None:
        for layer in reversed(some):
            weight = layer.weight.detach()
            left = torch.randn(rows, len(weight), device=weight.device, dtype=weight.dtype)
            if self._kind is None:
                self._products.append(partial(torch.mm, left, weight))
            else:
                self._products.append(partial(linears._of(layer, self._kind).backward, left))

    def __call__(self) -> None:
        for product in self._products:
            product()
