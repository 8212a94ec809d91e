"""Recipes: every knob there is, typed, documented and validated when loaded.

A recipe is one YAML file. It may extend another (`extends: other.yaml`, relative to itself), and
the command line may override any field (`--set train.lr=1e-3`). Unknown keys are errors that name
the nearest real key, and so are keys that stand twice. The resolved recipe is written into every
run folder.
"""

from epalm.config.data import DataConfig, FewShotConfig, Limits
from epalm.config.differences import differences
from epalm.config.encoder import EncoderConfig, ViewsConfig
from epalm.config.evaluate import DecodeConfig, EvalConfig
from epalm.config.lm import LMConfig, TextConfig
from epalm.config.load import dump_recipe, load_recipe, override_recipe, parse_recipe
from epalm.config.recipe import MAIN, Recipe, Source
from epalm.config.section import Name, Section
from epalm.config.store import StoreConfig
from epalm.config.train import TrainConfig
from epalm.config.variant import AdapterConfig, VariantConfig

__all__ = [
    "MAIN",
    "AdapterConfig",
    "DataConfig",
    "DecodeConfig",
    "EncoderConfig",
    "EvalConfig",
    "FewShotConfig",
    "LMConfig",
    "Limits",
    "Name",
    "Recipe",
    "Section",
    "Source",
    "StoreConfig",
    "TextConfig",
    "TrainConfig",
    "VariantConfig",
    "ViewsConfig",
    "differences",
    "dump_recipe",
    "load_recipe",
    "override_recipe",
    "parse_recipe",
]
