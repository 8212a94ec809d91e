"""A run's trained weights as a folder of their own, without its data, metrics and predictions."""

from dataclasses import asdict
from pathlib import Path

from epalm.errors import EpalmError
from epalm.model.load import load_lm_config, load_tokenizer
from epalm.model.pretrained import CONFIG, AugmentedConfig, write_pretrained
from epalm.model.text import TextCodec
from epalm.train.checkpoint import read_weights
from epalm.train.inputs import check_lm
from epalm.train.run import Run


def export(run: Run, checkpoint: Path, folder: Path) -> None:
    """Write what `AugmentedLM.from_pretrained` reads; the LM's weights are not loaded for it.

    Raises:
        EpalmError: the folder holds something else; checkpoint, features.json or LM is missing, or
            the LM is not the one that the run was trained with.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise EpalmError(f"{folder}: not empty and not an exported model; choose another folder")
    recipe, spec = run.recipe, run.recorded_features()
    if spec is None:
        raise EpalmError(f"{run.folder}: holds no features.json; run `evaluate` on it first")
    weights = read_weights(checkpoint)
    lm_config = load_lm_config(recipe.lm.weights)
    tokenizer = load_tokenizer(recipe.lm.weights, recipe.text, lm_config.vocab_size)
    codec = TextCodec(tokenizer, recipe.text)
    check_lm(run, codec)
    config = AugmentedConfig.of_recipe(recipe, asdict(spec), spec.fingerprint)
    write_pretrained(folder, config, lm_config, weights, codec)
