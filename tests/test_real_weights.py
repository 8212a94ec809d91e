"""The demo's pretrained models, as their packages carry them."""

import io
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from epalm.address import resolve
from epalm.config import LMConfig, Recipe, TextConfig, load_recipe
from epalm.extract.encoder import build, describe
from epalm.model.load import load_lm, load_tokenizer

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe(DEMO, ("encoder.image_size=224",))


def test_dinov2_equals_its_onnx_graph(demo: Recipe, easy_vqa: Path) -> None:
    """The last layer's normed tokens, against ONNX Runtime on the file the weights come from."""
    graph = onnx.load(resolve(demo.encoder.weights))
    last = next(n for n in graph.graph.node if "backbone.layernorm.bias" in n.input)
    graph.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    buffer = io.BytesIO()
    onnx.save(graph, buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])

    encoder = build(demo, CPU)
    images = [(easy_vqa / "test" / "images" / f"{i}.png").read_bytes() for i in range(3)]
    batch = torch.stack([encoder.preprocess(content, None) for content in images])
    ours = encoder.encode(batch, [11])[:, 0, 0]
    expected = session.run([last.output[0]], {"input_image": batch.numpy()})[0]
    expected = torch.from_numpy(expected)[:, 0]
    # the graph resamples the position grid without antialiasing, timm with it
    similarity = torch.nn.functional.cosine_similarity(ours, expected)
    assert similarity.min() > 0.999, similarity
    assert (ours - expected).abs().max() < 0.1 * expected.abs().max()


def test_dinov2_features_tell_images_apart(demo: Recipe) -> None:
    encoder = build(demo, CPU)
    batch = []
    for colour in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, "png")
        batch.append(encoder.preprocess(buffer.getvalue(), None))
    features = encoder.encode(torch.stack(batch), range(12))
    assert features.shape == (2, 12, 1, 384)
    spec = describe(demo)
    assert (spec.layers, spec.dim) == (12, 384)
    assert spec.encoder_parameters == sum(p.numel() for p in encoder.model.parameters())
    assert (features[0] - features[1]).abs().amax(dim=(1, 2)).min() > 0.1


def test_smollm2_speaks() -> None:
    config = load_recipe(DEMO).lm
    lm = load_lm(LMConfig(weights=config.weights, dtype="float32"), CPU)
    tokenizer = load_tokenizer(config.weights, TextConfig(), lm.config.vocab_size)
    assert (lm.config.num_hidden_layers, tokenizer.eos_token) == (30, "<|im_end|>")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = lm.generate(**prompt, max_new_tokens=1, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris"
