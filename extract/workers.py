"""Decoding in worker processes: what hangs is killed, what crashes is replaced.

Broken video and audio files can make their decoders loop, leak or crash. Each file is therefore
read, decoded and preprocessed by a process of its own right to fail; the encoder's process gets
the result in shared memory, or the reason why there is none.
"""

import ctypes
import hashlib
import math
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from epalm.data.media import Media
from epalm.errors import EpalmError
from epalm.extract.encoder import Preprocess

START_SECONDS = 300.0  # within which a worker must have loaded its libraries
_SPAWN = multiprocessing.get_context("forkserver")  # threads of ours make a plain fork unsafe
# a process's exit code can be read once, and to start one reads those of all that ended: of two
# threads at it, one would be told 255
_ENDED = threading.Lock()


class Task(NamedTuple):
    """One view of one media file.

    Attributes:
        media: where its bytes are.
        content_hash: SHA-256 that its content must have.
        seed: None for view 0, else the view's (see `views.view_seed`).
    """

    media: Media
    content_hash: str
    seed: int | None

    @classmethod
    def of_media(cls, media: Media) -> "Task":
        """View 0 of a file as it is now; OSError when it cannot be read."""
        return cls(media, media.sha256(), None)


class Outcome(NamedTuple):
    """What became of a task.

    Attributes:
        error: kind and text of the error; None: the input is in its place.
        read_seconds, decode_seconds: what it took.
    """

    error: tuple[str, str] | None
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


class Batch(NamedTuple):
    """Inputs being decoded: the place of each in shared memory, and what becomes of it."""

    inputs: torch.Tensor  # (B, *shape), valid where the outcome has no error
    outcomes: Sequence[Future[Outcome]]


def prepare_workers(module: str) -> None:
    """Begin to load a module, in the process that workers are forked from; returns at once."""
    _SPAWN.set_forkserver_preload([module])
    # it inherits what is blocked: Ctrl-C is for us alone, and would be a traceback of its loading
    resource_tracker.ensure_running()  # to start it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DecodePool:
    """Worker processes that turn media files into encoder inputs; use it in a `with`.

    Args:
        preprocess: the encoder's.
        workers: number of processes.
        timeout: seconds after which a worker is killed and replaced.
        batch_size: largest batch; two may be under way at a time.
    """

    def __init__(self, preprocess: Preprocess, workers: int, timeout: float, batch_size: int):
        numbers = 2 * batch_size * math.prod(preprocess.shape)
        memory = _SPAWN.RawArray(ctypes.c_float, numbers)
        self._slots = _as_slots(memory, preprocess.shape)
        self._batch_size, self._turn = batch_size, 0
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(preprocess, memory, timeout) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; what is under way is given up."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, tasks: Sequence[Task]) -> Batch:
        """Start decoding a batch. Its memory is used again by the next batch but one."""
        first = self._turn * self._batch_size
        self._turn = 1 - self._turn
        outcomes = [
            self._threads.submit(self._decode, task, first + position)
            for position, task in enumerate(tasks)
        ]
        return Batch(torch.from_numpy(self._slots[first : first + len(tasks)]), outcomes)

    def _decode(self, task: Task, slot: int) -> Outcome:
        worker = self._idle.get()
        try:
            return worker.decode(task, slot)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process, and the connection to it."""

    def __init__(self, preprocess: Preprocess, memory: Any, timeout: float):
        self._arguments = (preprocess, memory, preprocess.shape, timeout)
        self._timeout = timeout
        self._stopped = False
        self._start()

    def decode(self, task: Task, slot: int) -> Outcome:
        try:
            if self._ready and not self._is_alive():  # killed while it had nothing to do
                self._kill()
                self._start()
            if not self._ready:
                self._wait_until_ready()
            self._connection.send((task, slot))
            if self._connection.poll(self._timeout):
                return self._connection.recv()
            reason = ("TimeoutError", f"the decoder was stuck for {self._timeout:g} s")
        except (EOFError, OSError):
            if self._stopped:
                return Outcome(("Stopped", "the pool was closed"))
            if not self._ready:
                raise EpalmError(
                    f"a decoding process died while starting (exit code {self._exit_code()}); its "
                    "own message stands above"
                ) from None
            reason = ("DecoderCrash", f"the decoder crashed (exit code {self._exit_code()})")
        self._kill()
        self._start()
        return Outcome(reason)

    def stop(self) -> None:
        """End the process; a thread that waits for it comes back."""
        self._stopped = True
        self._process.kill()

    def close(self) -> None:
        self._kill()

    def _start(self) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        with _ENDED:
            self._process.start()
        theirs.close()
        self._ready = False

    def _wait_until_ready(self) -> None:
        if not self._connection.poll(START_SECONDS):
            raise EpalmError(f"a decoding process did not start within {START_SECONDS:g} s")
        self._connection.recv()
        self._ready = True

    def _kill(self) -> None:
        self._process.kill()
        with _ENDED:
            self._process.join()
        self._connection.close()

    def _is_alive(self) -> bool:
        with _ENDED:
            return self._process.is_alive()

    def _exit_code(self) -> int | None:
        with _ENDED:
            self._process.join(5)
            return self._process.exitcode


def _serve(
    connection: Connection, preprocess: Preprocess, memory: Any, shape: tuple[int, ...],
    timeout: float,
) -> None:  # fmt: skip
    """A worker's life: decode what comes, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    os.nice(10)  # where cores are few, the encoder's threads must not wait for one another
    torch.set_num_threads(1)
    slots = _as_slots(memory, shape)
    connection.send("ready")
    while True:
        try:
            task, slot = connection.recv()
        except (EOFError, ConnectionResetError):  # the latter where it was killed
            return
        # should nobody be left to kill a stuck decoder, the system does
        signal.alarm(math.ceil(timeout) + 5)
        outcome = _attempt(preprocess, task, slots[slot])
        signal.alarm(0)
        try:
            connection.send(outcome)
        except OSError:
            return


def _attempt(preprocess: Preprocess, task: Task, slot: NDArray[np.float32]) -> Outcome:
    start = time.perf_counter()
    read = start
    error = None
    try:
        content = _read(task)
        read = time.perf_counter()
        slot[...] = preprocess(content, task.seed).numpy()
    except Exception as problem:  # whatever a broken file does to its decoder
        error = describe_error(problem)
    return Outcome(error, read - start, time.perf_counter() - read)


def _read(task: Task) -> bytes:
    try:
        content = task.media.read()
    except OSError as error:  # it could be read when it was hashed
        raise ChangedFile(f"{task.media}: cannot be read any more ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != task.content_hash:
        raise ChangedFile(f"{task.media}: changed while it was extracted")
    return content


class ChangedFile(Exception):
    """A file's content is not what it was when it was hashed."""


def describe_error(error: Exception) -> tuple[str, str]:
    """Kind and text of an error, in one line, without objects by their address in memory."""
    kind = type(error).__name__
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", str(error)).split())
    return kind, text or f"{kind}, no reason given"


def _as_slots(memory: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.frombuffer(memory, np.float32).reshape(-1, *shape)
