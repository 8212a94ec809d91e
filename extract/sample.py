"""Decoding a few media, as `data check --decode` does, without keeping anything."""

import random

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.data.grouping import chunks
from epalm.device import choose_device
from epalm.extract.encoder import ENCODERS, build
from epalm.extract.workers import DecodePool, Task, prepare_workers


def undecodable(recipe: Recipe, dataset: Dataset, count: int) -> tuple[int, dict[str, str]]:
    """How many media were tried, of a seeded choice of `count`, and which cannot be decoded.

    Media that are missing are passed over.

    Returns:
        The number tried; and by id those that failed, with the reason in words.

    Raises:
        EpalmError: encoder weights that cannot be had; they say what a decoded media looks like.
    """
    there = [media for _, media in sorted(dataset.media.items()) if media.exists()]
    chosen = random.Random(f"{recipe.seed} decode").sample(there, min(count, len(there)))
    prepare_workers(ENCODERS[recipe.encoder.kind])
    config = recipe.encoder
    preprocess = build(recipe, choose_device(recipe.device)).preprocess
    workers = config.worker_count
    reasons: dict[str, str] = {}
    with DecodePool(preprocess, workers, config.decode_timeout, config.batch_size) as pool:
        for some in chunks(chosen, config.batch_size):
            tasks = []
            for media in some:
                try:
                    tasks.append((media, Task.of_media(media)))
                except OSError as fault:
                    reasons[media.id] = f"{media.id} (cannot be read: {fault.strerror or fault})"
            batch = pool.submit([task for _, task in tasks])
            for (media, _), future in zip(tasks, batch.outcomes, strict=True):
                if error := future.result().error:
                    reasons[media.id] = f"{media.id} ({error[1]})"
    return len(chosen), reasons
