"""Features made when they are needed: training and evaluation without a cache.

With `encoder.online` nothing of the encoder's output is kept. A batch holds the encoder's inputs,
decoded by worker processes while the step before runs, and the step encodes them. That is what an
encoder needs that is trained itself (`encoder.train`, table 12): its features change at every step.
A frozen one gives the features that `extract` would have stored, but for the rounding to the
store's number format; views are seeded alike.
"""

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.data.grouping import chunks
from epalm.data.media import Media
from epalm.errors import EpalmError
from epalm.extract.columns import column_specs, last_layers
from epalm.extract.decodable import LEDGER, undecodable
from epalm.extract.encoder import ENCODERS, Encoder, build, describe
from epalm.extract.hashing import hash_media
from epalm.extract.report import some_reasons
from epalm.extract.views import view_seed
from epalm.extract.workers import Batch, DecodePool, Task, prepare_workers
from epalm.store.feature_set import FeatureSet, Layout
from epalm.store.spec import FeatureSpec
from epalm.train.stopwatch import Stopwatch

Key = tuple[str, int]
"""Media id and view."""


class OnlineFeatures:
    """Features of a dataset's media, encoded anew each time; stands in for `FeatureTable`.

    Attributes:
        spec: of the features; an encoder that is trained starts as it says.
        views: K; the augmented views that training media have.
        encoder: its `model` is the module that is trained, where it is.
        encoding: time spent in `encode`.
    """

    extraction = None

    def __init__(
        self,
        recipe: Recipe,
        spec: FeatureSpec,
        encoder: Encoder,
        pool: DecodePool,
        files: Mapping[str, tuple[Media, str]],
    ):
        """
        Args:
            pool: of the encoder's preprocessing, for batches of `largest_batch`; it is closed when
                nothing refers to this object any more.
            files: by media id, where its bytes are and their SHA-256.
        """
        self.spec, self.encoder, self._pool, self._files = spec, encoder, pool, files
        self.views, self._seed = recipe.encoder.views.count, recipe.encoder.views.seed
        self.encoding = Stopwatch(encoder.device)
        self._layers = last_layers(recipe, column_specs(recipe, spec)[0])
        self._at_once, self._largest = recipe.encoder.batch_size, largest_batch(recipe)
        self._ahead: tuple[Sequence[Key], Batch] | None = None
        weakref.finalize(self, pool.close)

    def view_count(self, media: str) -> int:
        """As FeatureTable's."""
        return self.views

    def content_hash(self, media: str) -> str:
        """As FeatureTable's."""
        return self._files[media][1]

    @torch.no_grad()
    def fetch(
        self,
        media: Sequence[str],
        views: Sequence[int] | None = None,
        ahead: Sequence[str] = (),
    ) -> torch.Tensor:
        """(M, n, D), or (M, n, t, D) where t > 1 tokens of a layer are kept; float32, no gradients.

        While one piece is encoded the next is decoded. Errors as for `inputs`.

        Args:
            media, views: as for `FeatureTable.fetch`.
            ahead: media whose view 0 will be asked for next; their decoding begins.
        """
        keys = list(zip(media, views or [0] * len(media), strict=True))
        pieces = list(chunks(keys, self._largest))
        following = [*pieces[1:], [(m, 0) for m in ahead[: self._largest]]]
        found = []
        for piece, after in zip(pieces, following, strict=True):
            inputs = self._decoded(piece)
            if after:
                self._begin(after)
            found.append(self._encode(inputs))
        return torch.cat(found)

    def prepare(self, media: Sequence[str], views: Sequence[int]) -> None:
        """Begin to decode what the next call of `inputs` will ask for; returns at once."""
        self._begin(list(zip(media, views, strict=True)))

    def inputs(self, media: Sequence[str], views: Sequence[int]) -> torch.Tensor:
        """What the encoder is shown: (M, *shape) float32 on the CPU.

        Raises:
            EpalmError: media that changed, or cannot be decoded any more.
        """
        keys = list(zip(media, views, strict=True))
        return torch.cat([self._decoded(some) for some in chunks(keys, self._largest)])

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features as `fetch` gives them, with gradients where the encoder is trained."""
        with self.encoding.running():
            return self._encode(inputs)

    def _encode(self, inputs: torch.Tensor) -> torch.Tensor:
        pieces = inputs.split(self._at_once)
        return torch.cat([self.encoder.features(p, self._layers) for p in pieces]).squeeze(2)

    def _decoded(self, keys: Sequence[Key]) -> torch.Tensor:
        if self._ahead is None or self._ahead[0] != keys:
            self._begin(keys)
        assert self._ahead is not None
        (_, batch), self._ahead = self._ahead, None
        errors = [future.result().error for future in batch.outcomes]
        for (media, _), error in zip(keys, errors, strict=True):
            if error is not None:
                raise EpalmError(
                    f"{media}: could be decoded when it was checked, and now cannot "
                    f"({': '.join(error)}); restore the file, or start again"
                )
        return batch.inputs.clone()  # its memory is used again

    def _begin(self, keys: Sequence[Key]) -> None:
        if self._ahead is not None:  # a validation came between; what it decodes needs the memory
            wait(self._ahead[1].outcomes)
        tasks = []
        for media, view in keys:
            file, content_hash = self._files[media]
            tasks.append(Task(file, content_hash, view_seed(self._seed, content_hash, view)))
        self._ahead = (keys, self._pool.submit(tasks))


def open_online(
    recipe: Recipe, dataset: Dataset, device: torch.device, accelerator: Accelerator
) -> tuple[OnlineFeatures, Dataset]:
    """The recipe's encoder at work, and the dataset without media that it cannot be shown.

    All media are hashed and decoded once before, and what was found is noted in the recipe's
    feature set, which gets no features: so `data.bad_media` means what it means with a cache.

    Raises:
        EpalmError: weights that cannot be used, or bad media that the recipe does not accept.
    """
    config, largest = recipe.encoder, largest_batch(recipe)
    prepare_workers(ENCODERS[config.kind])
    spec, encoder = describe(recipe), build(recipe, device)
    layout = Layout(recipe.store.backend, recipe.store.shard_rows, config.weights)
    workers = config.worker_count
    with ExitStack() as stack:
        pool = DecodePool(encoder.preprocess, workers, config.decode_timeout, largest)
        stack.enter_context(pool)
        with accelerator.main_process_first():
            features = FeatureSet.create(Path(recipe.store.root), spec, layout)
            found = hash_media(dataset, features)
            media_of = {e.content_hash: dataset.media[m] for m, e in found.media.items()}
            main = accelerator.is_main_process
            reasons = undecodable(features, media_of, pool, largest) if main else {}
        failed = {media: failure.reason for media, failure in found.unreadable.items()}
        for media, entry in found.media.items():
            if entry.content_hash in reasons:
                failed[media] = reasons[entry.content_hash]
        # a decoder may be stuck in one process alone, and all must learn from the same examples
        (failed,) = broadcast_object_list([failed])
        files = {
            media: (dataset.media[media], entry.content_hash)
            for media, entry in found.media.items()
            if media not in failed
        }
        if failed and recipe.data.bad_media == "stop":
            raise EpalmError(_bad_media_message(failed, features))
        stack.pop_all()
    if failed:
        tqdm.write(f"{len(failed)} media that cannot be decoded are left out, with their examples")
    why = "its weights change" if config.train else "encoder.online"
    tqdm.write(f"no features are cached ({why}): media are decoded and encoded whenever needed")
    return OnlineFeatures(recipe, spec, encoder, pool, files), dataset.without_media(failed)


def largest_batch(recipe: Recipe) -> int:
    """Media that are decoded at a time."""
    return max(recipe.encoder.batch_size, recipe.train.batch_size // recipe.train.accumulate)


def _bad_media_message(failed: dict[str, str], features: FeatureSet) -> str:
    lines = [f"data: {len(failed)} media cannot be decoded", *some_reasons(failed)]
    lines.append(
        "mend these files, or leave them out with --set data.bad_media=skip (a file is tried again "
        f"when it changes, or when {features.folder / LEDGER} is deleted)"
    )
    return "\n".join(lines)
