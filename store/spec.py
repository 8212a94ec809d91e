"""What made a feature: the specs of a feature set and of a column of it, and their names.

Knobs that only move bytes (batch size, shard size, backend) are in neither, nor is the media: one
feature set serves every dataset that was encoded alike.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, get_origin, get_type_hints

from epalm.store.atomic import wrong_field

FORMAT_VERSION = 2


@dataclass(frozen=True)
class FeatureSpec:
    """What made a feature set: the encoder, and what it is shown.

    Attributes:
        modality: image, video or audio; text: an LM's states of texts (train/text_states.py).
        encoder: kind and architecture, e.g. `timm/vit_base_patch16_224`.
        encoder_arguments: what the architecture was built with beyond its defaults.
        encoder_parameters: number of the encoder's weights, which reports count as frozen.
        weights: SHA-256 of the weights file; empty when the file is not at hand (see `matches`).
        layers: number of layers the encoder has; a column keeps some or all of them.
        tokens: number of tokens an encoder layer has, class token included.
        dim: width of a token, D.
        final_norm: the encoder's final norm applied to every layer's tokens (convention 11).
        compute: arithmetic of the encoder.
        preprocess: every resolved preprocessing number of view 0.
        dtype: stored number format.
        version: of this format.
    """

    modality: str
    encoder: str
    encoder_arguments: dict[str, Any]
    encoder_parameters: int
    weights: str
    layers: int
    tokens: int
    dim: int
    final_norm: bool
    compute: str
    preprocess: dict[str, Any]
    dtype: str
    version: int = FORMAT_VERSION

    def canonical(self) -> str:
        """The spec as JSON with sorted keys; equal specs give equal text."""
        return _canonical(asdict(self))

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def matches(self, other: "FeatureSpec") -> bool:
        """Equal, where an empty `weights` on this side stands for any."""
        return self == other or (not self.weights and replace(other, weights="") == self)

    def differing(self, other: "FeatureSpec | JointSpec") -> dict[str, tuple[Any, Any]]:
        """This spec's and the other's value of each field, dotted, in which they differ."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        return {
            key: (mine.get(key), theirs.get(key))
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        }

    def differences(self, other: "FeatureSpec | JointSpec") -> list[str]:
        """One line per field in which the spec that is there differs from this, the wanted one."""
        return [
            f"{key}: {theirs!r} there, {mine!r} wanted"
            for key, (mine, theirs) in self.differing(other).items()
        ]

    @classmethod
    def from_json(cls, text: str) -> "FeatureSpec":
        """Read `canonical()` back; ValueError or TypeError when it is something else."""
        return _feature_spec(json.loads(text))


@dataclass(frozen=True)
class JointSpec:
    """The specs of several sources' features, by source name; what a FeatureSpec says of one.

    Attributes:
        layers: number of layers that all their encoders have.
        dim: width of each source's tokens.
        tokens: the largest number of tokens of a layer.
        encoder_parameters: of all encoders together.
    """

    sources: dict[str, FeatureSpec]

    @property
    def layers(self) -> int:
        return min(spec.layers for spec in self.sources.values())

    @property
    def dim(self) -> dict[str, int]:
        return {name: spec.dim for name, spec in self.sources.items()}

    @property
    def tokens(self) -> int:
        return max(spec.tokens for spec in self.sources.values())

    @property
    def encoder_parameters(self) -> int:
        return sum(spec.encoder_parameters for spec in self.sources.values())

    def canonical(self) -> str:
        """As FeatureSpec's."""
        return _canonical(asdict(self))

    @property
    def fingerprint(self) -> str:
        """As FeatureSpec's."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def differences(self, other: "FeatureSpec | JointSpec") -> list[str]:
        """One line per field in which the spec that is there differs from this, the wanted one."""
        there = other.sources if isinstance(other, JointSpec) else {}
        lines = [f"source {name}: only there" for name in there.keys() - self.sources.keys()]
        for name, spec in self.sources.items():
            if name not in there:
                lines.append(f"source {name}: not there")
                continue
            lines += [f"source {name}: {line}" for line in spec.differences(there[name])]
        return lines


def read_spec(text: str) -> FeatureSpec | JointSpec:
    """What either `canonical()` gave; ValueError or TypeError when it is something else."""
    tree = json.loads(text)
    if "sources" not in tree:
        return _feature_spec(tree)
    return JointSpec({name: _feature_spec(spec) for name, spec in dict(tree["sources"]).items()})


@dataclass(frozen=True)
class ColumnSpec:
    """What a column of a feature set keeps of the encoder's output.

    Attributes:
        tokens: cls, mean (over patch tokens) or all.
        token_count: tokens a layer keeps: 1, or all that the encoder has.
        layers: encoder layers kept, from 0, ascending.
        augmentation: what made views 1..K, seed included; None for a column of view 0.
    """

    tokens: str
    token_count: int
    layers: tuple[int, ...]
    augmentation: dict[str, Any] | None = None

    def canonical(self) -> str:
        """The spec as JSON with sorted keys; equal specs give equal text."""
        return _canonical(asdict(self))

    @property
    def name(self) -> str:
        """Folder name, e.g. `cls-0-11` or `cls-0-11-views-1a2b3c4d`."""
        first, last = self.layers[0], self.layers[-1]
        name = f"{self.tokens}-{first}-{last}"
        if self.layers != tuple(range(first, last + 1)):
            name += f"-of-{_short(list(self.layers))}"
        return name if self.augmentation is None else f"{name}-views-{_short(self.augmentation)}"

    @classmethod
    def from_json(cls, text: str) -> "ColumnSpec":
        """Read `canonical()` back; ValueError or TypeError when it is something else."""
        tree = json.loads(text)
        kinds = {"tokens": str, "token_count": int, "layers": list}
        if wrong := wrong_field(tree, kinds, {"augmentation": (dict, type(None))}):
            raise ValueError(wrong)
        layers = tuple(tree["layers"])
        if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
            raise ValueError(f"layers cannot be {list(layers)}")
        return cls(**{**tree, "layers": layers})


def _feature_spec(tree: Any) -> FeatureSpec:
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(FeatureSpec).items()}
    if wrong := wrong_field(tree, kinds):
        raise ValueError(wrong)
    return FeatureSpec(**tree)


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def _short(tree: Any) -> str:
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()[:8]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
