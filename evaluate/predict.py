"""One raw image through encoder and LM."""

from pathlib import Path

import torch

from epalm.device import choose_device
from epalm.errors import EpalmError
from epalm.evaluate.generation import generate_texts
from epalm.extract.encoder import build, describe
from epalm.train.checkpoint import load_weights
from epalm.train.parts import build_model
from epalm.train.run import Run


def predict(run: Run, checkpoint: Path, image: Path, prompt: str) -> str:
    """The run's answer to a prompt about an image file.

    Raises:
        EpalmError: an image that cannot be read, or weights that are missing.
    """
    recipe = run.recipe
    device = choose_device(recipe.device)
    spec = describe(recipe)
    run.bind_features(spec)
    encoder = build(recipe, device)
    try:
        pixels = encoder.preprocess(image.read_bytes())
    except Exception as error:  # whatever a broken file does to its decoder
        raise EpalmError(f"--image {image}: cannot be decoded ({error})") from None
    layers = encoder.encode(pixels[None])[:, -recipe.variant.encoder_layers :, 0]
    layers = layers.to(getattr(torch, spec.dtype))  # as the store would have kept them
    model, codec = build_model(recipe, spec.layers, spec.dim, device)
    load_weights(checkpoint, model)
    return generate_texts(model, codec, [prompt], layers, [0], recipe.decode)[0]
