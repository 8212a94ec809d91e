"""One raw media file through encoder and LM."""

from pathlib import Path

import torch

from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.evaluate.generation import generate_texts
from epalm.extract.columns import column_specs, last_layers
from epalm.extract.encoder import build, describe
from epalm.extract.workers import describe_error
from epalm.train.checkpoint import load_weights
from epalm.train.parts import build_model
from epalm.train.run import Run


def predict(run: Run, checkpoint: Path, media: Path, prompt: str) -> str:
    """The run's answer to a prompt about an image, video or audio file.

    Raises:
        EpalmError: a file that cannot be read, or weights that are missing.
    """
    recipe = run.recipe
    device = choose_device(recipe.device)
    spec = describe(recipe)
    run.bind_features(spec)
    encoder = build(recipe, device)
    try:
        inputs = encoder.preprocess(media.read_bytes(), None)
    except Exception as error:  # whatever a broken file does to its decoder
        raise EpalmError(
            f"{media}: cannot be decoded ({': '.join(describe_error(error))})"
        ) from None
    wanted = last_layers(recipe, column_specs(recipe, spec)[0])
    layers = encoder.encode(inputs[None], wanted).squeeze(2)
    layers = layers.to(getattr(torch, spec.dtype))  # as the store would have kept them
    model, codec = build_model(recipe, spec.layers, spec.dim, device)
    load_weights(checkpoint, model)
    return generate_texts(model, codec, [prompt], layers, [0], recipe.decode)[0]
