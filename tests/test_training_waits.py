"""Nothing in a step makes a GPU wait, seen on a CPU: by the operations that would."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epalm.config import AdapterConfig, TrainConfig, VariantConfig
from epalm.model import attention
from epalm.model.augmented import AugmentedLM
from epalm.model.text import Equal
from epalm.train.batches import Batch
from epalm.train.guard import FiniteGuard
from epalm.train.loss import losses_of
from epalm.train.optimiser import make_optimiser
from epalm.train.step import Outcome
from tests.test_augmented import LMS

# their result's value or size is read by the processor that launches what follows
WAITING = {"_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select", "equal"}
INDEXING = {"index", "index_put_", "index_put"}


class Waits(TorchDispatchMode):
    """Counts operations for whose result a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), named: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.found[name] += 1
        return function(*args, **(named or {}))


def test_what_waits_is_found() -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        assert int(numbers.max()) == 2
        assert len(numbers[numbers > 0]) == 2
    assert waits.found.keys() == {"_local_scalar_dense", "index"}


@pytest.mark.parametrize("kind", LMS)
def test_no_step_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, clipping, AdamW, and the look at whether all is finite; with the attention
    that a GPU has."""
    monkeypatch.setattr(attention, "WRITTEN_OUT_ON", set())
    everywhere = AdapterConfig(reduction=8)
    variant = VariantConfig(encoder_layers=3, prompt_length=4, attention_adapters=everywhere)
    model = AugmentedLM.from_config(LMS[kind](), variant, 4, 24)
    optimiser = make_optimiser(model, TrainConfig(steps=1))
    ids = torch.randint(3, 384, (4, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = 5
    rows, equal = torch.tensor([0, 0, 1, 1]), Equal.among([0, 1, 0, 2])
    batch = Batch(ids, mask, labels, torch.randn(2, 3, 24), rows, equal, torch.arange(8), 2)
    guard = FiniteGuard(torch.device("cpu"))
    parameters = list(model.trained.parameters())
    with Waits() as waits:
        loss = losses_of(model, batch)[0].sum() / 8
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimiser.step()
        guard.note(0, Outcome(loss.detach(), norm))
    assert not waits.found
