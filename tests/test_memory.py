"""Memory that a batch frees serves the next one."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from epalm.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def batch():
    tensors = [torch.ones(12 << 20) for _ in range(4)]  # of 48 MB
    small = [torch.ones(1 << 20) for _ in range(40)]

for _ in range(3):
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is set")
def test_a_batch_has_the_memory_of_the_one_before() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("keep", "as before")
    }
    assert faults["keep"] < 100 < 1_000 < faults["as before"]
