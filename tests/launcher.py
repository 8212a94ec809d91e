"""Starts the command line in two processes at once, as torchrun would, for test_distributed.py.

    python launcher.py FOLDER < jobs.json

It preloads the libraries and forks, so that a job costs what the work costs. A job is
`{"arguments": [...]}`, with "fails": RANK, "never_scores": RANK, "never_decodes": RANK or
"spare": true where processes are to be changed; what process r of job n writes is in
FOLDER/n/r.txt, and the exit codes of its processes are printed as one JSON list per job.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import epalm.evaluate.scores
import epalm.train.online
from epalm.errors import EpalmError
from epalm.model.connection import Connection
from epalm.train.batches import Batch, TrainingBatches

PROCESSES = 2
PATIENCE = 60  # seconds after which a job counts as hanging


def with_spare_part() -> None:
    """Give every connection a parameter that the loss does not depend on."""
    init = Connection.__init__

    def with_spare(self: Connection, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self.spare = nn.Parameter(torch.ones(3))

    Connection.__init__ = with_spare


def fail_at(step: int) -> None:
    """Let this process's training end with an error at a step."""
    piece = TrainingBatches.piece

    def failing(self: TrainingBatches, number: int, index: int, count: int) -> Batch:
        if number == step:
            raise EpalmError("one process fails")
        return piece(self, number, index, count)

    TrainingBatches.piece = failing


def never_score() -> None:
    """Let this process fail where it scores a validation."""

    def failing(*_: object) -> NoReturn:
        raise AssertionError("only the main process scores")

    epalm.evaluate.scores._validation_score = failing


def never_decode() -> None:
    """Let this process fail where it looks for media that cannot be decoded."""

    def failing(*_: object) -> NoReturn:
        raise AssertionError("only the main process looks")

    epalm.train.online.undecodable = failing


def work(job: dict[str, Any], rank: int, port: int, output: Path) -> None:
    """Be process `rank` of a job; does not return."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    code = 1
    try:
        from epalm.pipeline import main

        if job.get("spare"):
            with_spare_part()
        if job.get("fails") == rank:
            fail_at(2)
        if job.get("never_scores") == rank:
            never_score()
        if job.get("never_decodes") == rank:
            never_decode()
        main(job["arguments"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job: dict[str, Any], folder: Path) -> list[int]:
    """The exit codes of a job's processes; those that hang are killed."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if not child:
            work(job, rank, port, folder / f"{rank}.txt")
        children.append(child)
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < PROCESSES:
        for child in set(children) - codes.keys():
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    import matplotlib.pyplot  # noqa: F401
    import torchaudio  # noqa: F401
    import transformers.models.opt.modeling_opt  # noqa: F401
    import zarr  # noqa: F401

    import epalm.evaluate.figures
    import epalm.extract.image
    import epalm.train.loop  # noqa: F401

    torch.set_num_threads(1)
    for number, job in enumerate(json.load(sys.stdin)):
        print(json.dumps(run(job, Path(sys.argv[1]) / str(number))), flush=True)
