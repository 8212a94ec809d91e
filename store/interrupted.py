"""A conversion that was killed: while it runs, a feature set has other folders beside its own.

Nothing but `conversion.py` makes them; whoever looks for a set comes here first.
"""

import errno
from pathlib import Path

from epalm.errors import EpalmError

OLD = ".converted-"
"""Before the name of a set that a conversion has replaced, until it is deleted."""

NEW = ".converting-"
"""Before the name of a set that a conversion is making."""


def finish_conversion(folder: Path) -> None:
    """Bring back a set whose conversion was interrupted while folders changed places.

    Its folder may be there again, made by another process, with a lock and nothing else.

    Raises:
        EpalmError: there is something else in it.
    """
    moved = beside(folder, OLD)
    if not moved.is_dir() or (folder / "layout.json").is_file():
        return
    (folder / ".lock").unlink(missing_ok=True)
    try:
        moved.rename(folder)
    except FileNotFoundError:  # another process has brought it back
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise EpalmError(
            f"{folder}: has no layout.json; an interrupted conversion has left the set in {moved}: "
            "move away what is in the former, and repeat the command"
        ) from None


def leftovers(folder: Path) -> list[Path]:
    """What killed conversions of a set have left beside its folder, where that is whole."""
    if not (folder / "layout.json").is_file():
        return []
    return [path for path in (beside(folder, NEW), beside(folder, OLD)) if path.is_dir()]


def beside(folder: Path, prefix: str) -> Path:
    """Where a conversion puts another form of a set: `prefix` is NEW or OLD."""
    return folder.parent / f"{prefix}{folder.name}"
