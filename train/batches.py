"""Training batches: a pure function of recipe, dataset and step, so that resuming is exact."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from epalm.config import Recipe
from epalm.data.example import Example
from epalm.data.grouping import unique_rows
from epalm.device import send
from epalm.errors import EpalmError
from epalm.extract.lookup import FeatureTable
from epalm.extract.sources import SourceTables
from epalm.model.connection import Features, to_device
from epalm.model.text import Equal, TextCodec, pad_left
from epalm.train.online import OnlineFeatures
from epalm.train.order import order_of_epoch
from epalm.train.text_states import Text, TextStates


@dataclass(frozen=True)
class Batch:
    """B texts about M media.

    Attributes:
        input_ids: (B, T) prompt and answer without its last token, padded on the left.
        attention_mask: (B, T) 1 for real tokens.
        labels: (B, T) the id that follows each token, -100 where it is not learnt.
        features: (M, n, D) or (M, n, t, D) as stored; of several sources, of each by name; where
            nothing is cached, what the encoder is shown.
        rows: (B,) which media each text is about.
        equal: which texts are.
        labelled: (N,) where in the flat labels of the last tokens something is to be learnt.
        last: of how many tokens at the end any text learns something.
        text_states: (U, T, H) of the texts that differ as they enter the first injection layer;
            None: to be computed.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    features: Features
    rows: torch.Tensor
    equal: Equal
    labelled: torch.Tensor
    last: int
    text_states: torch.Tensor | None = None


class Size(NamedTuple):
    """How much a batch or a piece of one holds, known before it is made.

    Attributes:
        tokens: that enter the LM, pads not counted.
        labels: tokens that are learnt.
    """

    examples: int
    tokens: int
    labels: int


def check_examples(examples: Sequence[Example], recipe: Recipe) -> None:
    """EpalmError when there are fewer examples than a batch needs."""
    if len(examples) < recipe.train.batch_size:
        raise EpalmError(
            f"train.batch_size: {recipe.train.batch_size} wanted, the dataset has only "
            f"{len(examples)} training examples; make it smaller"
        )


class TrainingBatches:
    """Batches by step number, from 0; whole, or cut into equal pieces.

    Pieces are consecutive parts of the batch, so that examples about one media stay together.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: FeatureTable | SourceTables | OnlineFeatures,
        codec: TextCodec,
        recipe: Recipe,
        device: torch.device,
    ):
        """EpalmError when there are fewer examples than a batch needs, or a prompt is too long."""
        check_examples(examples, recipe)
        self.examples, self.features, self.codec = examples, features, codec
        self.online = features if isinstance(features, OnlineFeatures) else None
        self.config, self.seed, self.device = recipe.train, recipe.seed, device
        prompts = {e.prompt for e in examples}
        answers = {r for e in examples for r in e.references}
        self._prompt_ids = {text: codec.prompt(text) for text in prompts}
        self._answer_ids = {text: codec.answer(text) for text in answers}
        self._epoch = -1  # the last one asked for, with its order and references
        self._order: list[int] = []
        self._references: list[str] = []
        self._chosen: tuple[int, list[tuple[Example, str]]] = (-1, [])  # for the last step
        self.text_states: TextStates | None = None

    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(
            len(self._prompt_ids[e.prompt]) + len(self._answer_ids[r]) - 1
            for e in self.examples
            for r in e.references
        )

    def texts(self) -> list[Text]:
        """All different texts that batches may hold."""
        pairs = ((e.prompt, reference) for e in self.examples for reference in e.references)
        return list(dict.fromkeys(self._text(*pair) for pair in pairs))

    def __getitem__(self, step: int) -> Batch:
        return self.piece(step, 0, 1)

    def chosen(self, step: int) -> list[tuple[Example, str]]:
        """The examples of a step's batch, each with the reference that it learns.

        One of its references, drawn alike: one that stands there more often is drawn more often
        (convention 18).
        """
        if self._chosen[0] != step:
            size = self.config.batch_size
            epoch, place = divmod(step, self._steps_per_epoch)
            if self._epoch != epoch:
                self._begin(epoch)
            some = self._order[place * size : (place + 1) * size]
            pairs = [(self.examples[i], self._references[i]) for i in some]
            pairs.sort(key=lambda pair: pair[0].source)  # as their features stand
            self._chosen = (step, pairs)
        return self._chosen[1]

    def _begin(self, epoch: int) -> None:
        """Draw an epoch's references and order."""
        draw = random.Random(f"{self.seed} epoch {epoch}")
        self._epoch = epoch
        self._references = [draw.choice(e.references) for e in self.examples]
        pairs = zip(self.examples, self._references, strict=True)
        lengths = [len(self._text(e.prompt, reference)) for e, reference in pairs]
        media = [e.media for e in self.examples]
        config = self.config
        self._order = order_of_epoch(
            media, lengths, config.batch_size, config.examples_per_media, draw
        )

    def size(self, step: int, index: int = 0, count: int = 1) -> Size:
        """What piece `index` of `count` holds; by default, the whole batch."""
        pairs = self._share(step, index, count)
        prompts = [len(self._prompt_ids[example.prompt]) for example, _ in pairs]
        answers = sum(len(self._answer_ids[reference]) for _, reference in pairs)
        tokens = sum(prompts) + answers - len(pairs)
        return Size(len(pairs), tokens, answers if self.config.loss == "answer" else tokens)

    def piece(self, step: int, index: int, count: int) -> Batch:
        """Piece `index` of `count` of a step's batch, which must have a multiple of `count`."""
        chosen = self._share(step, index, count)
        epoch = step // self._steps_per_epoch
        texts, labels = [], []
        for example, reference in chosen:
            texts.append(self._text(example.prompt, reference))
            prompt, answer = self._prompt_ids[example.prompt], self._answer_ids[reference]
            unlearnt = len(prompt) - 1 if self.config.loss == "answer" else 0
            labels.append([-100] * unlearnt + [*prompt, *answer][1 + unlearnt :])
        ids, mask = pad_left(texts, self.codec.pad)
        states = self.text_states
        different = list(dict.fromkeys(texts))
        media, rows = unique_rows(e.media for e, _ in chosen)
        read = self.features.fetch if self.online is None else self.online.inputs
        padded_labels = pad_left(labels, -100)[0]
        last = max(len(of_text) - of_text.count(-100) for of_text in labels)
        return Batch(
            send(ids, self.device),
            send(mask, self.device),
            send(padded_labels, self.device),
            to_device(read(media, self._views(epoch, media)), self.device),
            send(torch.tensor(rows), self.device),
            Equal.among(texts, self.device),
            send((padded_labels[:, -last:].flatten() != -100).nonzero()[:, 0], self.device),
            last,
            None if states is None else send(states.fetch(different), self.device),
        )

    def prepare(self, step: int, index: int, count: int) -> None:
        """Begin to decode media of the piece that is asked for next, where nothing is cached."""
        if self.online is not None:
            media, _ = unique_rows(e.media for e, _ in self._share(step, index, count))
            self.online.prepare(media, self._views(step // self._steps_per_epoch, media))

    def _share(self, step: int, index: int, count: int) -> list[tuple[Example, str]]:
        size = self.config.batch_size // count
        return self.chosen(step)[index * size : (index + 1) * size]

    @property
    def _steps_per_epoch(self) -> int:
        return len(self.examples) // self.config.batch_size

    def _text(self, prompt: str, reference: str) -> Text:
        """Prompt and answer without its last token."""
        return (*self._prompt_ids[prompt], *self._answer_ids[reference][:-1])

    def _views(self, epoch: int, media: Sequence[str]) -> list[int]:
        """The view of each media that an epoch learns from: one of 1..K, or 0 if there are none."""
        counts = [self.features.view_count(m) for m in media]
        if not any(counts):
            return counts
        draws = (random.Random(f"{self.seed} view {epoch} {m}") for m in media)
        return [
            draw.randint(1, count) if count else 0
            for draw, count in zip(draws, counts, strict=True)
        ]
