"""Datasets: one file per family, each with `load(config) -> Dataset`. No torch here."""

import importlib

from epalm.config import Recipe
from epalm.data.example import Dataset
from epalm.errors import EpalmError

READERS = {
    "easy-vqa": "epalm.data.easy_vqa",
    "jsonl": "epalm.data.jsonl",
}


def load_dataset(recipe: Recipe) -> Dataset:
    """The recipe's dataset: read, split, and cut to the recipe's limits.

    Raises:
        EpalmError: no such reader, or a bad annotation file.
    """
    config = recipe.data
    if config.kind not in READERS:
        raise EpalmError(f"data.kind: {config.kind!r} is not one of {', '.join(READERS)}")
    dataset: Dataset = importlib.import_module(READERS[config.kind]).load(config)
    if config.val_from_train:
        if dataset.split("val"):
            raise EpalmError("data.val_from_train: the dataset has a val split; set it to 0")
        dataset = dataset.hold_out(config.val_from_train, recipe.seed)
    return dataset.limit(config.limits.model_dump(), recipe.seed)
