"""What an extraction did, and what it says of media that it could not use."""

from dataclasses import dataclass, field

from epalm.store.feature_set import FeatureSet

STAGES = ("hash", "read", "decode", "encode", "write")


@dataclass
class Report:
    """What one extraction did.

    Attributes:
        features: the set that now holds the dataset's features.
        encoded: rows (views of media) encoded by this call; 0 when all were there.
        found: rows that were there before, or that another process made meanwhile.
        failed: reason by id of media without features.
        removed: ids that the catalogue knows, and whose files are gone.
        seconds: spent in each stage. Reading and decoding run beside encoding, in several
            processes whose times are added up.
        total_seconds: wall time of the whole call.
    """

    features: FeatureSet
    encoded: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    total_seconds: float = 0.0


def bad_media_message(failed: dict[str, str], features: FeatureSet) -> str:
    """What to tell a user whose recipe does not accept bad media."""
    return "\n".join(
        [f"data: {len(failed)} media have no features (ledger: {features.ledger})"]
        + some_reasons(failed)
        + [
            "mend these files, or leave them out with --set data.bad_media=skip (a file that could "
            "not be decoded is tried again when it changes, or with `extract --retry-failed`)"
        ]
    )


def some_reasons(failed: dict[str, str]) -> list[str]:
    """Lines for the first few of these media, and how many more there are."""
    first = [f"  {media}: {reason}" for media, reason in list(failed.items())[:5]]
    return first + ([f"  and {len(failed) - 5} more"] if len(failed) > 5 else [])
