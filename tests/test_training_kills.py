"""Training killed at random moments: it ends with the weights of an undisturbed run, bit for bit.

EPALM_KILLS says how often it is killed (default 3). A killer process preloads the libraries and
forks a child per attempt, which is the command line's own `train`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from epalm.store.atomic import read_json_lines
from epalm.train.parts import Parts

KILLS = int(os.environ.get("EPALM_KILLS", "3"))
KILLER = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import epalm.evaluate.scores, epalm.extract.image, epalm.train.loop, epalm.train.parts
import transformers.models.opt.modeling_opt, torchaudio, zarr
from epalm.pipeline import main

job = json.load(sys.stdin)
random.seed(0)

def attempt(name):
    child = os.fork()
    if not child:
        try:
            main([*job["train"], "--set", f"name={name}"])
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(1)
    return child

def finish(child):
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a training ended with status {status}")

start = time.monotonic()
finish(attempt("whole"))
seconds = time.monotonic() - start
kills = resumable = 0
while kills < job["kills"]:
    child = attempt("cut")
    time.sleep(random.uniform(0, seconds))
    if os.waitpid(child, os.WNOHANG)[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        resumable += os.path.exists(f"{job['runs']}/cut/checkpoints/last.safetensors")
    else:  # it had got to the end: begin anew
        shutil.rmtree(f"{job['runs']}/cut")
finish(attempt("cut"))
print(resumable)
"""


@pytest.mark.timeout(120 + 5 * KILLS)
def test_killed_at_any_moment_it_ends_with_the_same_weights(
    prepare: Callable[..., Parts], tmp_path: Path
) -> None:
    prepare()
    recipe, runs = tmp_path / "toy.yaml", tmp_path / "runs"
    # most kills lose some steps, and some come while a checkpoint is written
    sets = ("train.steps=20", "train.checkpoint_every=3", "train.val_every=10", "train.log_every=2")
    job = {
        "train": ["train", str(recipe), *(word for s in sets for word in ("--set", s))],
        "runs": str(runs),
        "kills": KILLS,
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout.splitlines()[-1]) > 0  # some left a checkpoint to go on from
    for name in ("last", "best"):
        whole, cut = (runs / n / "checkpoints" / f"{name}.safetensors" for n in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name
    whole, cut = (
        [(line["step"], line.get("loss"), line.get("val_score")) for line in lines]
        for lines in (read_json_lines(runs / n / "metrics.jsonl") for n in ("whole", "cut"))
    )
    assert whole == cut
