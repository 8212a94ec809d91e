"""The datasets' fixtures: a few records each, written by hand in the official formats."""

import shutil
from pathlib import Path
from typing import Any

from epalm.config import DataConfig
from epalm.data.example import Dataset

FIXTURES = Path(__file__).parent / "fixtures"

CASES: dict[str, dict[str, Any]] = {
    "vqa2": {"kind": "vqa2"},
    "vqa2-karpathy": {"kind": "vqa2", "splits": "karpathy"},
    "vqa2-epalm": {"kind": "vqa2", "splits": "karpathy"},
    "gqa": {"kind": "gqa"},
    "coco": {"kind": "coco"},
    "nocaps": {"kind": "nocaps", "files": {"train": "nocaps_val_4500_captions.json"}},
    "cc3m": {"kind": "cc3m"},
    "msrvtt": {"kind": "msrvtt"},
    "msrvtt-7k": {"kind": "msrvtt", "splits": "7k"},
    "msrvtt-qa": {"kind": "msrvtt-qa"},
    "msvd-qa": {"kind": "msvd-qa"},
    "audiocaps": {"kind": "audiocaps"},
    "clotho": {"kind": "clotho"},
    "epalm-gqa": {
        "kind": "epalm-json",
        "files": {"train": "train.json", "test": "testdev.json"},
    },
    "epalm-msrvtt-qa": {
        "kind": "epalm-json",
        "files": {
            "train": "msrvtt_vqa_train.json",
            "val": "msrvtt_vqa_val.json",
            "test": "msrvtt_vqa_test.json",
        },
    },
    "epalm-msrvtt": {
        "kind": "epalm-json",
        "files": {
            "train": "msrvtt_caption_train7k.json",
            "test": "msrvtt_caption_test.json",
        },
    },
    "epalm-audiocaps": {
        "kind": "epalm-json",
        "files": {"train": "audiocaps_caption_train.json", "test": "audiocaps_caption_test.json"},
    },
    "jsonl": {"kind": "jsonl", "path": "data.jsonl"},
    "csv": {"kind": "csv", "path": "data.csv"},
}
"""Each case's `data` section, with `path` inside the folder where its files are laid out."""

SOURCES = {
    "vqa2-karpathy": ("vqa2", "coco"),
    "vqa2-epalm": ("vqa2", "epalm/vqa"),
    "msrvtt-7k": ("msrvtt",),
    "epalm-gqa": ("epalm/gqa",),
    "epalm-msrvtt-qa": ("epalm/msrvtt",),
    "epalm-msrvtt": ("epalm/msrvtt",),
    "epalm-audiocaps": ("epalm/audiocaps",),
    "jsonl": ("own",),
    "csv": ("own",),
}
"""Folders of fixtures whose files a case finds side by side; default: the one of its name."""


def lay_out(case: str, folder: Path) -> DataConfig:
    """Put a case's annotation files into a folder; media are expected in its `media`."""
    for source in SOURCES.get(case, (case,)):
        shutil.copytree(FIXTURES / source, folder, dirs_exist_ok=True)
    tree = CASES[case]
    path = folder / tree.get("path", "")
    return DataConfig(**(tree | {"path": str(path), "media_root": str(folder / "media")}))


def write_media(dataset: Dataset, root: Path, files: list[Path]) -> None:
    """Give each media one of these files' content, in the order of their ids."""
    for number, media in enumerate(sorted(dataset.media)):
        path = root / media
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[number % len(files)], path)
