"""The processes that train together, and the device of each; accelerate does the work.

One process, unless started by `accelerate launch` or `torchrun`, which say in the environment which
of how many this is. The main process writes all files, bars and lines.
"""

import os
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from epalm.device import choose_device
from epalm.errors import EpalmError


def join_processes(device: str) -> Accelerator:
    """Take this process's place among those started together.

    Args:
        device: the recipe's.

    Raises:
        EpalmError: one device is named, but there are several processes.
    """
    launched = "LOCAL_RANK" in os.environ
    # a process of its own has the recipe's device, whatever accelerate thinks of it
    on_cpu = not launched or device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # formats are the recipe's: lm.dtype, and float32 for what is trained
        kwargs_handlers=[
            # a variant may have parameters that take no part in the loss
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # the others wait while the main process decodes a dataset, or scores it
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
        ],
    )
    # one that ends at once, at a mistake in the recipe, would leave the others a traceback
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1 and device not in ("auto", "cpu", "cuda"):
        raise EpalmError(
            f"device: {device!r} is one device, but there are {accelerator.num_processes} "
            "processes; set it to auto, and each takes its own"
        )
    return accelerator


def device_of(accelerator: Accelerator, name: str) -> torch.device:
    """The device that the recipe names, or this process's share of it."""
    return choose_device(name) if accelerator.num_processes == 1 else accelerator.device


def hush(accelerator: Accelerator) -> None:
    """Let only the main process write to standard output; errors are written by all."""
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")
