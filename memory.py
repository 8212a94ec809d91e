"""Memory that is freed and soon needed again."""

import ctypes
import platform

# by glibc's `mallopt.h`
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory(most: int = 1 << 30, largest: int = 64 << 20) -> None:
    """Have this process keep what it frees, for the next batch needs as much again.

    By itself, glibc gives whatever is larger than 32 MB back to the system as soon as it is freed,
    and the rest when 64 MB are free at its end. The system then clears the same pages for every
    batch anew, which on a CPU takes 5 to 15 % of a large encoder's time or of a large training
    step. Elsewhere than with glibc, nothing happens.

    Args:
        most: bytes that are kept.
        largest: of one tensor, in bytes. The larger it is, the more memory lies in pieces too small
            to be used: up to this, peaks were found to be what they were; at 1 GiB a quarter more.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, most)
        libc.mallopt(_MMAP_THRESHOLD, largest)
