"""What a stage of the pipeline took."""

from typing import NamedTuple


class Stage(NamedTuple):
    """Wall time in seconds, and a rate in words."""

    seconds: float
    rate: str
