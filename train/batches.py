"""Training batches: a pure function of recipe, dataset and step, so that resuming is exact."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epalm.config import Recipe
from epalm.data.example import Example
from epalm.data.grouping import chunks, unique_rows
from epalm.errors import EpalmError
from epalm.extract.lookup import FeatureTable
from epalm.model.text import TextCodec, pad_left

POOL_BATCHES = 8  # batches among which examples are sorted by length


@dataclass(frozen=True)
class Batch:
    """B texts about M media.

    Attributes:
        input_ids: (B, T) prompt and answer without its last token, padded on the left.
        attention_mask: (B, T) 1 for real tokens.
        labels: (B, T) the id that follows each token, -100 where it is not learnt.
        features: (M, n, D) or (M, n, t, D) as stored.
        rows: (B,) which media each text is about.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    rows: torch.Tensor


class TrainingBatches:
    """Batches by step number, from 0."""

    def __init__(
        self,
        examples: Sequence[Example],
        features: FeatureTable,
        codec: TextCodec,
        recipe: Recipe,
        device: torch.device,
    ):
        """EpalmError when there are fewer examples than a batch needs, or a prompt is too long."""
        if len(examples) < recipe.train.batch_size:
            raise EpalmError(
                f"train.batch_size: {recipe.train.batch_size} wanted, the dataset has only "
                f"{len(examples)} training examples"
            )
        self.examples, self.features, self.codec = examples, features, codec
        self.config, self.seed, self.device = recipe.train, recipe.seed, device
        prompts = {e.prompt for e in examples}
        answers = {r for e in examples for r in e.references}
        self._prompt_ids = {text: codec.prompt(text) for text in prompts}
        self._answer_ids = {text: codec.answer(text) for text in answers}
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        size = self.config.batch_size
        epoch, place = divmod(step, len(self.examples) // size)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        chosen = [self.examples[i] for i in self._order[1][place * size : (place + 1) * size]]
        draw = random.Random(f"{self.seed} reference {step}")
        sequences, labels = [], []
        for example in chosen:
            prompt = self._prompt_ids[example.prompt]
            answer = self._answer_ids[draw.choice(example.references)]
            sequences.append([*prompt, *answer[:-1]])
            unlearnt = len(prompt) - 1 if self.config.loss == "answer" else 0
            labels.append([-100] * unlearnt + [*prompt, *answer][1 + unlearnt :])
        ids, mask = pad_left(sequences, self.codec.pad)
        media, rows = unique_rows(e.media for e in chosen)
        return Batch(
            ids.to(self.device),
            mask.to(self.device),
            pad_left(labels, -100)[0].to(self.device),
            self.features.fetch(media, self._views(epoch, media)).to(self.device),
            torch.tensor(rows, device=self.device),
        )

    def _views(self, epoch: int, media: Sequence[str]) -> list[int]:
        """The view of each media that an epoch learns from: one of 1..K, or 0 if there are none."""
        count = self.features.views
        if not count:
            return [0] * len(media)
        draws = (random.Random(f"{self.seed} view {epoch} {m}") for m in media)
        return [draw.randint(1, count) for draw in draws]

    def _shuffled(self, epoch: int) -> list[int]:
        """An epoch's order of examples.

        Examples about one media stand in groups, so that its prefix is shared; groups of like
        length stand together within a few batches, so that little is padded. Everything else is
        shuffled.
        """
        draw = random.Random(f"{self.seed} epoch {epoch}")
        by_media: dict[str, list[int]] = defaultdict(list)
        for index, example in enumerate(self.examples):
            by_media[example.media].append(index)
        groups: list[Sequence[int]] = []
        for indices in by_media.values():
            draw.shuffle(indices)
            indices.sort(key=self._length)
            groups += chunks(indices, self.config.examples_per_media)
        draw.shuffle(groups)
        size = self.config.batch_size
        pool_size = max(POOL_BATCHES * size // self.config.examples_per_media, 1)
        batches: list[Sequence[int]] = []
        carried: Sequence[int] = []
        for begin in range(0, len(groups), pool_size):
            pool = sorted(groups[begin : begin + pool_size], key=lambda g: self._length(g[-1]))
            *whole, carried = chunks([*carried, *(i for group in pool for i in group)], size)
            batches += whole
        if len(carried) == size:
            batches.append(carried)
        draw.shuffle(batches)
        return [index for batch in batches for index in batch]

    def _length(self, index: int) -> int:
        return len(self._prompt_ids[self.examples[index].prompt])
