"""What a stage of the pipeline took."""

from typing import Any, NamedTuple

from epalm.store.atomic import NUMBER, wrong_field


class Stage(NamedTuple):
    """Wall time in seconds, and a rate in words."""

    seconds: float
    rate: str

    @classmethod
    def of(cls, tree: Any) -> "Stage":
        """What `_asdict` gave; ValueError when it is something else."""
        if wrong := wrong_field(tree, {"seconds": NUMBER, "rate": str}):
            raise ValueError(wrong)
        return cls(tree["seconds"], tree["rate"])
