"""Where there is room for features while training."""

import os

import psutil
import torch

FREE_SHARE = 0.5  # of the free memory that features may take


class FreeMemory:
    """What features may take of the memory that is free now: on a GPU, and in this process.

    Features that are placed together take from it in turn, so that they never have more than
    their share, whatever was measured meanwhile.
    """

    def __init__(self, device: torch.device):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # started together; each has its own
        self._left = {"ram": FREE_SHARE * psutil.virtual_memory().available / processes}
        if device.type == "cuda":
            self._left = {"device": FREE_SHARE * torch.cuda.mem_get_info(device)[0], **self._left}

    def take(self, size: int) -> str:
        """The first placement with room for so many bytes, which it has no more; else `disk`."""
        for placement, left in self._left.items():
            if size <= left:
                self._left[placement] -= size
                return placement
        return "disk"
