"""What two recipes say otherwise."""

import re
from collections.abc import Set

from epalm.config.section import Section


def differences(old: Section, new: Section, free: Set[str], place: str = "") -> list[str]:
    """Where two recipes differ, a line a field.

    Args:
        free: fields and sections that do not count; of all sources, where it is one's.
        place: of the sections in the recipe.
    """
    found = []
    for key in type(old).model_fields:
        name, before, after = f"{place}{key}", getattr(old, key), getattr(new, key)
        if before == after or re.sub(r"^also\.\w+\.", "", name) in free:
            continue
        if isinstance(before, Section):
            found += differences(before, after, free, f"{name}.")
        elif key == "also" and before.keys() == after.keys():
            for source in before:
                found += differences(before[source], after[source], free, f"also.{source}.")
        else:
            found.append(f"{name}: {before!r} there, {after!r} wanted")
    return found
