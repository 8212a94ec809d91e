"""FeatureSpec: everything that decides a feature's value, and the fingerprint made of it.

Knobs that only move bytes (batch size, shard size, backend) are not in it, nor is the media: one
feature set serves every dataset that was encoded alike.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FeatureSpec:
    """What made a feature set.

    Attributes:
        modality: image.
        encoder: kind and architecture, e.g. `timm/vit_base_patch16_224`.
        encoder_arguments: what the architecture was built with beyond its defaults.
        encoder_parameters: number of the encoder's weights, which reports count as frozen.
        weights: SHA-256 of the weights file; empty when the file is not at hand (see `matches`).
        layers: number of encoder layers kept, L; all of them, in order.
        tokens: which tokens of a layer: cls.
        dim: width of a token, D.
        final_norm: the encoder's final norm applied to every layer's tokens (convention 11).
        compute: arithmetic of the encoder.
        preprocess: every resolved preprocessing number.
        view: 0, the plain evaluation transform.
        dtype: stored number format.
        version: of this format.
    """

    modality: str
    encoder: str
    encoder_arguments: dict[str, Any]
    encoder_parameters: int
    weights: str
    layers: int
    tokens: str
    dim: int
    final_norm: bool
    compute: str
    preprocess: dict[str, Any]
    view: int
    dtype: str
    version: int = FORMAT_VERSION

    def canonical(self) -> str:
        """The spec as JSON with sorted keys; equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def matches(self, other: "FeatureSpec") -> bool:
        """Equal, where an empty `weights` on this side stands for any."""
        return self == other or (not self.weights and replace(other, weights="") == self)

    def differences(self, other: "FeatureSpec") -> list[str]:
        """One line per field in which two specs differ."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        return [
            f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} wanted"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """Read `canonical()` back; ValueError or TypeError when it is something else."""
        return cls(**json.loads(text))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
