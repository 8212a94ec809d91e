"""Datasets: one file per family, each with `load(config) -> Dataset`. No torch here."""

import gc
import importlib
from types import ModuleType

from epalm.config import DataConfig, FewShotConfig, Recipe
from epalm.data.example import Dataset
from epalm.errors import EpalmError

READERS = {
    "easy-vqa": "epalm.data.easy_vqa",
    "vqa2": "epalm.data.vqa2",
    "gqa": "epalm.data.gqa",
    "coco": "epalm.data.coco",
    "nocaps": "epalm.data.nocaps",
    "cc3m": "epalm.data.cc3m",
    "msrvtt": "epalm.data.msrvtt",
    "msrvtt-qa": "epalm.data.video_qa",
    "msvd-qa": "epalm.data.video_qa",
    "audiocaps": "epalm.data.audiocaps",
    "clotho": "epalm.data.clotho",
    "epalm-json": "epalm.data.epalm_json",
    "jsonl": "epalm.data.jsonl",
    "csv": "epalm.data.jsonl",
}


def reader(kind: str) -> ModuleType:
    """The module that reads such a dataset; EpalmError when there is none.

    It has `load(config)`; SETTINGS, the fields of `data` of which it makes something, beside those
    that all readers do; and where counts were published, `published(config)`, by split.
    """
    if kind not in READERS:
        raise EpalmError(f"data.kind: {kind!r} is not one of {', '.join(READERS)}")
    return importlib.import_module(READERS[kind])


def read(config: DataConfig) -> Dataset:
    """All of a dataset.

    Raises:
        EpalmError: no such reader, a setting that it does not know, or a bad annotation file.
    """
    module = reader(config.kind)
    for name in ("splits", "files", "media_root", "media_name"):
        if name not in module.SETTINGS and getattr(config, name) != _default(name):
            raise EpalmError(
                f"data.{name}: has no meaning for the kind {config.kind}; leave it out"
            )
    collects = gc.isenabled()
    gc.disable()  # it would look at millions of small objects again and again, and find nothing
    try:
        dataset: Dataset = module.load(config)
        return dataset
    finally:
        if collects:
            gc.enable()


def _default(name: str) -> object:
    return DataConfig.model_fields[name].default


def load_dataset(recipe: Recipe) -> Dataset:
    """The recipe's dataset: read, split, and cut to the recipe's limits and few-shot choice.

    Raises:
        EpalmError: no such reader, a bad annotation file, or more examples wanted than there are.
    """
    return select(read(recipe.data), recipe)


def select(dataset: Dataset, recipe: Recipe) -> Dataset:
    """What a recipe uses of a dataset as it was read; EpalmError as for `load_dataset`."""
    config = recipe.data
    if config.val_from_train:
        if dataset.split("val"):
            raise EpalmError("data.val_from_train: the dataset has a val split; set it to 0")
        there = len({example.media for example in dataset.split("train")})
        if 0 < there <= config.val_from_train:
            raise EpalmError(
                f"data.val_from_train: {config.val_from_train} media wanted of {there} training "
                "media, which leaves none; make it smaller"
            )
        dataset = dataset.hold_out(config.val_from_train, recipe.data_seed)
    dataset = dataset.limit(config.limits.model_dump(), recipe.data_seed)
    return _few_shot(dataset, config.few_shot, recipe.data_seed)


def _few_shot(dataset: Dataset, config: FewShotConfig, seed: int) -> Dataset:
    if config.fraction is None and config.count is None:
        return dataset
    there = len(dataset.split("train"))
    count = config.count or round((config.fraction or 0) * there)
    if count > there:
        raise EpalmError(
            f"data.few_shot.count: {count} wanted, the dataset has only {there} training examples"
        )
    if not count:
        raise EpalmError(
            f"data.few_shot.fraction: {config.fraction} of {there} training examples is none; "
            "raise it, or give a count"
        )
    return dataset.few_shot(count, config.balanced, seed)
