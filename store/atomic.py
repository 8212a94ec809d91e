"""Files that are complete or absent, and logs whose last line may be cut."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write beside the place, flush to disk, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is appended to line by line; none when it is not there.

    A line that a crash cut short is left out.
    """
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
