"""Which media can be decoded, found out once: for a training that keeps no features.

What was found is noted in the feature set's folder by content hash, so that no later start has to
decode everything again.
"""

import json

from tqdm import tqdm

from epalm.data.grouping import chunks
from epalm.data.media import Media
from epalm.errors import EpalmError
from epalm.extract.workers import DecodePool, Task
from epalm.store.atomic import read_json_lines
from epalm.store.feature_set import FeatureSet

TRANSIENT = ("TimeoutError", "DecoderCrash")
"""Kinds of failure that may be the machine's fault."""

LEDGER = "decoded.jsonl"
"""In the set's folder: a line per media that was tried; an empty reason: it can be decoded."""


def undecodable(
    features: FeatureSet, media_of: dict[str, Media], pool: DecodePool, at_once: int
) -> dict[str, str]:
    """By content hash, why media cannot be decoded. Those that were tried before are not again.

    Args:
        features: the set whose encoder will see them.
        media_of: by content hash.
        pool: of that encoder's preprocessing.
        at_once: media given to it at a time.

    Raises:
        EpalmError: a file changed since it was hashed, or the ledger was changed.
    """
    ledger = features.folder / LEDGER
    known = read_json_lines(ledger, {"hash": str, "reason": str})
    reasons = {line["hash"]: line["reason"] for line in known}
    left = [content_hash for content_hash in media_of if content_hash not in reasons]
    with tqdm(total=len(left), desc="decode", unit="media", disable=not left) as bar:
        for some in chunks(left, at_once):
            batch = pool.submit([Task(media_of[h], h, None) for h in some])
            lines = []
            for content_hash, future in zip(some, batch.outcomes, strict=True):
                error = future.result().error
                if error is not None and error[0] == "ChangedFile":
                    features.distrust(content_hash)
                    raise EpalmError(f"{error[1]}; start again")
                reasons[content_hash] = "" if error is None else f"cannot be decoded: {error[1]}"
                if error is not None and error[0] in TRANSIENT:
                    continue  # another start, on a less busy machine, may decode it
                line = {"hash": content_hash, "media": media_of[content_hash].id,
                        "reason": reasons[content_hash]}  # fmt: skip
                lines.append(json.dumps(line) + "\n")
            with ledger.open("a", encoding="utf-8") as stream:
                stream.write("\n" + "".join(lines))  # apart from a line that a kill cut short
            bar.update(len(some))
    return {h: reasons[h] for h in media_of if reasons[h]}
