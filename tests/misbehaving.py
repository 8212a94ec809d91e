"""Decoders that misbehave, in a module that worker processes can import (see test_bad_media.py)."""

import ctypes
import os
import signal
import time
from collections.abc import Callable

import torch

from epalm.extract.encoder import Preprocess

DEEDS: dict[bytes, Callable[[], object]] = {
    b"hang": lambda: time.sleep(3600),
    b"exit": lambda: os._exit(3),
    b"kill": lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the system does when memory is out
    b"segfault": lambda: ctypes.string_at(0),
    b"memory": lambda: bytearray(2**62),
}


class Misbehaving:
    """A `Preprocess` that does what a file's content says; other files go to `inner`."""

    def __init__(self, inner: Preprocess):
        self.inner, self.shape = inner, inner.shape

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        if content in DEEDS:
            DEEDS[content]()
        return self.inner(content, seed)


class Level:
    """A `Preprocess` for files that hold a number."""

    shape: tuple[int, ...] = (2, 3)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        return torch.full(self.shape, float(content))
