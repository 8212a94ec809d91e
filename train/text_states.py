"""States of texts as they enter the first injection layer, cached like features.

Where nothing below that layer is trained (eP-ALM_lin), the frozen LM's lower half makes the same
states of a text at every step. They are kept in a feature set whose encoder is the LM's lower half,
a row per text, a column per length; a training then runs the upper half alone. No dataset's
catalogue speaks of them: each run notes in the set which shards it needs, for `cache gc`.
"""

import hashlib
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.grouping import chunks
from epalm.errors import EpalmError
from epalm.model.augmented import AugmentedLM
from epalm.model.load import lm_digest
from epalm.store.column import Column
from epalm.store.feature_set import FeatureSet, Layout
from epalm.store.maintenance import give_up, verify
from epalm.store.marker import Row
from epalm.store.needs import note_need
from epalm.store.spec import ColumnSpec, FeatureSpec
from epalm.store.writer import ColumnWriter
from epalm.train.run import Run

Text = tuple[int, ...]
"""Token ids that enter the LM."""

AT_ONCE = 64  # texts
WAIT = 0.2  # s
FREE_SHARE = 0.5  # of the free disk that `auto` may fill


class TextStates:
    """The texts' states in a feature set; computed where they are not there yet."""

    def __init__(self, model: AugmentedLM, features: FeatureSet):
        self.model, self.features = model, features
        self.folder = features.folder
        self._columns: dict[int, Column] = {}

    def missing(self, texts: Iterable[Text]) -> dict[int, dict[Row, Text]]:
        """By length, the texts of which not all have states."""
        return {
            length: rows
            for length, rows in _by_length(texts).items()
            if not all(row in self._column(length) for row in rows)
        }

    def fill(self, texts: Collection[Text], run: Path) -> None:
        """Compute the states of texts that have none; safe to interrupt, shard by shard.

        Broken shards are made again.

        Args:
            run: folder of the run that needs them; the set keeps them for it.
        """
        note_need(self.features, run, None)  # until it is known which
        give_up(verify(self.features, list))
        missing = self.missing(texts)
        total = sum(len(rows) for rows in missing.values())
        with tqdm(total=total, desc="text states", unit="text", disable=not total) as bar:
            for length, rows in missing.items():
                self._fill(length, rows, bar)
        note_need(self.features, run, self._shards(texts))

    def fetch(self, texts: Sequence[Text]) -> torch.Tensor:
        """(U, T, H) as stored, padded on the left with zeros; T: the longest's length."""
        longest = max(map(len, texts))
        out = np.zeros((len(texts), longest, self.features.spec.dim), self._dtype(texts))
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, text in enumerate(texts):
            by_length[len(text)].append(place)
        for length, places in by_length.items():
            column = self._column(length)
            rows = column.rows([_row(texts[p]) for p in places])
            out[places, longest - length :] = column.gather(rows)[:, 0]
        return torch.from_numpy(out)

    def _fill(self, length: int, texts: dict[Row, Text], bar: "tqdm[Any]") -> None:
        column = self._column(length)
        writer = ColumnWriter(column)
        bar.update(sum(row in column for row in texts))
        while pending := writer.plan(list(texts)):
            made = [self._make(shard, texts, writer) for shard in pending]
            bar.update(sum(made))
            if not any(made):
                time.sleep(WAIT)  # other processes are at them

    def _make(self, shard: int, texts: dict[Row, Text], writer: ColumnWriter) -> int:
        """Make a planned shard; the number of its texts, 0 where another process has it."""
        claim = writer.claim(shard)
        if claim is None:
            return 0
        if not texts.keys() >= set(claim.plan.rows):  # begun by a training with other texts
            writer.give_up(claim)
            return 0
        with claim.stream:
            wanted = [texts[row] for row in claim.plan.rows]
            states = torch.cat([self._states(some) for some in chunks(wanted, AT_ONCE)])
            writer.write(claim.plan, states[:, None].numpy(), {})
            return len(wanted)

    def _shards(self, texts: Iterable[Text]) -> dict[str, list[int]]:
        """By column, the shards that texts stand in."""
        found = {}
        for length, rows in _by_length(texts).items():
            column = self._column(length)
            shards = np.unique(column.rows(list(rows)) // column.shard_rows)
            found[column.folder.name] = shards.tolist()
        return found

    @torch.inference_mode()
    def _states(self, texts: Sequence[Text]) -> torch.Tensor:
        """(U, T, H) float32 on the CPU, of texts of one length."""
        ids = torch.tensor(texts, device=self.model.device)
        return self.model.text_states(ids, torch.ones_like(ids)).float().cpu()

    def _dtype(self, texts: Sequence[Text]) -> str:
        dtypes = {self._column(length).dtype() for length in {len(t) for t in texts}}
        return "float32" if "float32" in dtypes else dtypes.pop()

    def _column(self, length: int) -> Column:
        if length not in self._columns:
            wanted = ColumnSpec(f"text{length}", length, (self.model.plan.start,))
            (self._columns[length],) = self.features.columns_for(wanted)
        return self._columns[length]


def open_text_states(
    recipe: Recipe, model: AugmentedLM, texts_of: Callable[[], Collection[Text]]
) -> TextStates | None:
    """The cached states of the texts, computed where they are missing.

    None where something below the first injection layer is trained, and where `auto` finds that the
    training is too short to be worth it.

    Args:
        texts_of: makes the texts, where they are wanted.

    Raises:
        EpalmError: the recipe insists on them, and they are not the same at every step.
    """
    wanted = recipe.train.text_states
    possible = model.lower_is_frozen and not model.reference_mask
    if wanted == "always" and not possible:
        raise EpalmError(
            "train.text_states: always, but this variant trains something below the first "
            "injection layer, or injects at layer 0, or has the reference's mask; set it to auto"
        )
    uses = recipe.train.steps * recipe.train.batch_size
    if not possible or wanted == "never":
        return None
    texts = texts_of()
    if wanted == "auto" and uses < 2 * len(texts):
        return None
    spec, root = text_spec(recipe, model), Path(recipe.store.root)
    layout = Layout(recipe.store.backend, recipe.store.shard_rows, recipe.lm.weights)
    states = TextStates(model, FeatureSet.create(root, spec, layout))
    place = spec.dim * np.dtype(spec.dtype).itemsize
    new = place * sum(length * len(rows) for length, rows in states.missing(texts).items())
    if wanted == "auto" and new > FREE_SHARE * shutil.disk_usage(root).free:
        tqdm.write(f"text states are not kept: {new / 1e9:,.1f} GB, too much for {root}")
        return None
    size = place * sum(map(len, texts))
    tqdm.write(f"text states: {size / 1e6:,.1f} MB of {len(texts):,} texts in {states.folder}")
    states.fill(texts, Run.of(recipe).folder)
    return states


def text_spec(recipe: Recipe, model: AugmentedLM) -> FeatureSpec:
    """What makes the states: the LM's weights and arithmetic."""
    lm = model.lm
    compute = str(lm.dtype).removeprefix("torch.")
    return FeatureSpec(
        modality="text",
        encoder=f"lm/{type(lm).__name__}",
        encoder_arguments={},
        encoder_parameters=sum(p.numel() for p in lm.parameters()),
        weights=lm_digest(recipe.lm.weights),
        layers=len(model.family.layers),
        tokens=0,
        dim=model.family.hidden_size,
        final_norm=False,
        compute=compute,
        preprocess={},
        dtype="float32" if compute == "float32" else "float16",
    )


def _by_length(texts: Iterable[Text]) -> dict[int, dict[Row, Text]]:
    found: dict[int, dict[Row, Text]] = defaultdict(dict)
    for text in texts:
        found[len(text)][_row(text)] = text
    return dict(sorted(found.items()))


def _row(text: Text) -> Row:
    return Row(hashlib.sha256(np.array(text, "<i8").tobytes()).hexdigest(), 0)
