"""What a benchmark ran on, in words: a number means nothing without it."""

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil


def describe(folder: Path, packages: Sequence[str]) -> str:
    """Date, processor, memory, the disk that holds `folder`, load, and versions of packages."""
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "\n".join(
        [
            f"date      {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            f"machine   {_processor()}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} "
            f"GiB memory; {platform.system()} {platform.release()}; load before: {load:.1f}",
            f"disk      {_file_system(folder)} ({folder})",
            "versions  "
            + ", ".join([f"Python {platform.python_version()}", *map(_version, packages)]),
        ]
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """Kind of the file system that a folder is on, and its device."""
    path = folder.resolve()
    above = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    if not above:
        return "unknown file system"
    nearest = max(above, key=lambda p: len(p.mountpoint))
    return f"{nearest.fstype} on {nearest.device}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
