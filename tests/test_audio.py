"""Audio: files, spectrograms and their views, AST and Whisper, and parity with the official code.

Golden vectors as in test_golden.py: `enc_ast.npz` and `fbank_*.npz` in the folder named by
EPALM_GOLDEN (default: tests/golden).
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from epalm.address import resolve
from epalm.config import Recipe, parse_recipe
from epalm.errors import EpalmError, NotHereError
from epalm.extract.ast_weights import original_config, to_hf
from epalm.extract.audio import FbankPreprocess, SpectrogramMasking, audio_numbers, read_audio
from epalm.extract.encoder import build, describe

FOLDER = Path(os.environ.get("EPALM_GOLDEN") or Path(__file__).parent / "golden")
CPU = torch.device("cpu")
FBANKS = sorted(FOLDER.glob("fbank_*.npz"))
TABLE_16 = ((0, 0), (96, 24), (192, 48), (256, 64))  # time mask, frequency mask

# equal bit by bit with one thread; leaving the mean in would change 3e-5
# processors and numbers of threads round differently, of which the logarithm of near silence makes
# up to 2e-4; normalisation divides by 9
LOG_ENERGIES, NORMALISED = {"atol": 1e-3, "rtol": 0}, {"atol": 1e-4, "rtol": 0}


def make_recipe(weights: Path | str = "nowhere", **encoder: Any) -> Recipe:
    tree = {
        "name": "audio",
        "device": "cpu",
        "data": {"kind": "jsonl", "path": "none.jsonl"},
        "encoder": {"kind": "ast", "weights": str(weights)} | encoder,
        "lm": {"weights": "none"},
        "train": {"steps": 1},
    }
    return parse_recipe(tree, "test")


def fbank_preprocess(frames: int = 100, mels: int = 128, **encoder: Any) -> FbankPreprocess:
    recipe = make_recipe(**encoder)
    return FbankPreprocess(audio_numbers(recipe, frames, mels), recipe)


def audio_file(samples: Any, rate: int, subtype: str = "FLOAT", form: str = "WAV") -> bytes:
    """A file's bytes from samples (n,) or (n, channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(samples), rate, subtype=subtype, format=form)
    return buffer.getvalue()


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-23),  # what float32 keeps of it
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("AIFF", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("OGG", "VORBIS", 0.05),  # lossy
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats_give_the_same_samples(form: str, subtype: str, step: float) -> None:
    samples = np.stack([tone(16000), tone(16000, hertz=660)], axis=1)
    waveform, rate = read_audio(audio_file(samples, 16000, subtype, form), None)
    assert (waveform.dtype, rate) == (torch.float32, 16000)
    assert waveform.shape[0] == 2
    middle = slice(2000, 6000)  # a lossy format is unsure at the ends
    error = np.abs(waveform.numpy().T[middle] - samples[middle]).max()
    assert error <= 1.01 * step


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_the_sound(rate: int) -> None:
    waveform, found = read_audio(audio_file(tone(rate), rate), 16000)
    assert found == 16000
    assert waveform.shape == (1, 8000)
    # the filter's ripple below the cut-off, and not its edges
    middle = slice(200, -200)
    np.testing.assert_allclose(waveform[0, middle], tone(16000)[middle], atol=5e-4)
    kept, found = read_audio(audio_file(tone(rate), rate), None)
    assert (kept.shape[1], found) == (rate // 2, rate)


def cut_off(form: str) -> bytes:
    content = audio_file(tone(16000), 16000, "VORBIS" if form == "OGG" else "PCM_16", form)
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no audio that libsndfile can read: Format not recognised"),
        (b"Not found. Please log in.\n" * 20, "no audio that libsndfile can read"),
        (audio_file(np.zeros((0, 1)), 16000), "holds no samples"),
        (audio_file([0.1, np.nan] * 800, 16000), "no number"),
        (audio_file([0.1, -np.inf] * 800, 16000), "no number"),
        (audio_file([0.1, 1e20] * 800, 16000), "far beyond full scale"),
        (cut_off("WAV"), "cut off"),
        (cut_off("AIFF"), "cut off"),
        (cut_off("FLAC"), "no audio that libsndfile can read"),
        (cut_off("OGG"), "no audio that libsndfile can read"),
        (audio_file(tone(44101), 44101), "44101 Hz cannot be resampled to 16000 Hz"),
        (audio_file(tone(16000, 0.02), 16000), "too short: 20.0 ms, less than one frame of 25 ms"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_files_are_refused_with_the_reason(content: bytes, reason: str) -> None:
    preprocess = fbank_preprocess()
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=reason) as error:
            preprocess(content, None)
        messages.add(str(error.value))
    assert len(messages) == 1, "the ledger's reason must not change from run to run"


def test_headers_that_do_not_know_the_size_are_read() -> None:
    """What a program that writes to a pipe leaves behind."""
    content = audio_file(tone(16000), 16000, "PCM_16")
    streamed = (
        content[:4] + b"\xff\xff\xff\xff" + content[8:40] + b"\xff\xff\xff\xff" + content[44:]
    )
    assert torch.equal(read_audio(streamed, None)[0], read_audio(content, None)[0])


def test_flac_of_unknown_length_is_read() -> None:
    """What an encoder that writes to a pipe leaves behind: 0 samples in the header."""
    content = audio_file(np.tile(tone(16000, 5), (2, 1)).T, 16000, "PCM_16", "FLAC")
    at = content.index(b"fLaC") + 8 + 13  # low half of this byte, and four more
    streamed = content[:at] + bytes([content[at] & 0xF0]) + bytes(4) + content[at + 5 :]
    for seconds in (None, 0.5, 60.0):
        expected = read_audio(content, None, seconds)[0]
        assert torch.equal(read_audio(streamed, None, seconds)[0], expected)
    with pytest.raises(ValueError, match="no audio that libsndfile can read|holds no samples"):
        read_audio(streamed[:100], None)


# --- spectrograms --------------------------------------------------------------------------------


def test_the_folder_holds_vectors() -> None:
    assert len(FBANKS) >= 2 and (FOLDER / "enc_ast.npz").is_file(), FOLDER


@pytest.mark.parametrize("path", FBANKS, ids=lambda path: path.stem)
def test_reference_fbank(path: Path) -> None:
    with np.load(path) as arrays:
        golden = dict(arrays)
    content = audio_file(golden["waveform"].T, int(golden["sample_rate"]))
    for name, expected in golden.items():
        if name.startswith("norm_target"):
            preprocess = fbank_preprocess(len(expected), preprocess="reference")
            found = preprocess(content, None)
            torch.testing.assert_close(found, torch.from_numpy(expected), **NORMALISED)
    waveform = torch.from_numpy(golden["waveform"])
    found = fbank_preprocess(preprocess="reference").fbank(waveform, int(golden["sample_rate"]))
    torch.testing.assert_close(found, torch.from_numpy(golden["fbank"]), **LOG_ENERGIES)


@pytest.fixture(scope="module")
def real_sounds() -> list[Path]:
    """Eight-bit and ADPCM recordings at 11025 Hz, and an ogg and an mp3 of one of them."""
    folder = resolve("wheel:pygame==2.6.1") / "pygame" / "examples" / "data"
    return sorted(p for p in folder.iterdir() if p.suffix in (".wav", ".ogg", ".mp3"))


@pytest.mark.parametrize("frames", [512, 1024])  # some sounds are longer, none is
def test_model_mode_is_hugging_faces_extractor(real_sounds: list[Path], frames: int) -> None:
    assert len(real_sounds) >= 7
    extractor = ASTFeatureExtractor(max_length=frames)
    preprocess = fbank_preprocess(frames)
    for path in real_sounds:
        samples, rate = soundfile.read(path, dtype="float32")
        mono = resample(torch.from_numpy(samples), rate, 16000).numpy()
        expected = extractor(mono, sampling_rate=16000, return_tensors="pt")["input_values"][0]
        found = preprocess(path.read_bytes(), None)
        assert (found.shape, found.dtype) == ((frames, 128), torch.float32)
        # equal bit by bit where measured, those that are read in part, too
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=path.name)


def test_own_normalisation_is_used() -> None:
    recipe = make_recipe()
    content = audio_file(tone(16000), 16000)
    plain = FbankPreprocess(audio_numbers(recipe, 60, 128, mean=0.0, std=0.5), recipe)
    other = FbankPreprocess(audio_numbers(recipe, 60, 128, mean=-6.0, std=3.0), recipe)
    torch.testing.assert_close((plain(content, None) + 6) / 6, other(content, None))


def test_a_long_sound_is_read_in_part() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000 * 30).astype(np.float32)
    content = audio_file(noise, 48000)
    assert read_audio(content, 16000, seconds=2)[0].shape == (1, 32000)
    preprocess = fbank_preprocess(100)
    partly = preprocess(content, None)
    preprocess.seconds = None
    torch.testing.assert_close(partly, preprocess(content, None), atol=1e-4, rtol=0)
    assert fbank_preprocess(100, preprocess="reference").seconds is None


def test_stereo() -> None:
    """The mean of both channels; in the official code, the first alone."""
    left, right = tone(16000), tone(16000, hertz=1500)
    stereo = audio_file(np.stack([left, right], 1), 16000)
    mean, first = audio_file((left + right) / 2, 16000), audio_file(left, 16000)
    model, reference = fbank_preprocess(), fbank_preprocess(preprocess="reference")
    torch.testing.assert_close(model(stereo, None), model(mean, None))
    # where the tone is not, there is only rounding, and its log
    loud = reference(first, None) > 0
    torch.testing.assert_close(reference(stereo, None)[loud], reference(first, None)[loud])
    assert (model(stereo, None) - model(first, None)).abs().max() > 0.1


@pytest.mark.parametrize("rate", [8000, 44101, 96000])
def test_the_reference_leaves_the_rate_as_it_is(rate: int) -> None:
    content = audio_file(tone(rate), rate)
    found = fbank_preprocess(preprocess="reference")(content, None)
    # mel bins end at half the rate, so the tone stands lower the higher the rate
    bins = [int(found[:40].mean(0).argmax())]
    bins.append(int(fbank_preprocess()(audio_file(tone(16000), 16000), None)[:40].mean(0).argmax()))
    assert (bins[0] > bins[1]) == (rate < 16000)


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE_16, ids=str)
def test_masks_of_table_16(row: tuple[int, int]) -> None:
    time, frequency = row
    recipe = make_recipe(views={"count": 1, "time_mask": time, "frequency_mask": frequency})
    masking = SpectrogramMasking(recipe, 1024, 128)
    widths = []
    for seed in range(60):
        masked = masking(torch.ones(1024, 128), seed) == 0
        for lines in (masked.all(1), masked.all(0)):
            where = lines.nonzero()
            assert len(where) == 0 or where[-1] - where[0] == len(where) - 1, "one stretch"
        frames, mels = masked.all(1), masked.all(0)
        assert torch.equal(masked, frames[:, None] | mels[None]), "nothing else is masked"
        widths.append((int(frames.sum()), int(mels.sum())))
    longest, widest = (max(w) for w in zip(*widths, strict=True))
    assert 0.8 * time <= longest <= time
    assert 0.8 * frequency <= widest <= frequency


def test_a_view_follows_from_its_seed_alone() -> None:
    content = audio_file(np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    views = {"count": 1, "time_mask": 60, "frequency_mask": 48}
    for mode in ("model", "reference"):
        preprocess = fbank_preprocess(preprocess=mode, views=views)
        plain = preprocess(content, None)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = preprocess(content, 2**62 + 7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(first, preprocess(content, 2**62 + 7))
        assert not torch.equal(first, preprocess(content, 8))
        assert torch.equal(plain, preprocess(content, None))
        changed = first[first != plain]
        assert len(changed) > 100
        # zero before normalisation: the value of padding, not the mean
        assert torch.equal(changed.unique(), plain[-1, :1])
        assert abs(float(changed[0]) - 0.467) < 1e-3


def test_preprocessing_travels_to_worker_processes(whisper_folder: Path) -> None:
    content = audio_file(tone(16000), 16000)
    whisper = build(make_recipe(whisper_folder, kind="whisper", tokens="mean"), CPU).preprocess
    for preprocess in (fbank_preprocess(), fbank_preprocess(preprocess="reference"), whisper):
        copy = pickle.loads(pickle.dumps(preprocess))
        for seed in (None, 5):
            assert torch.equal(copy(content, seed), preprocess(content, seed))


# --- AST -----------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_length": 56,
    "num_mel_bins": 32,
}


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part matters; Hugging Face starts tokens at zero."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AST with its classifier and feature extractor, as on the hub."""
    folder = tmp_path_factory.mktemp("ast")
    model = ASTForAudioClassification(ASTConfig(**TINY)).eval()
    randomise(model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(max_length=56, num_mel_bins=32, mean=-5.0, std=3.0).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(ast_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the AST folder with some JSON fields changed."""

    def change(**files: dict[str, Any]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(ast_folder, folder, dirs_exist_ok=True)
        for name, fields in files.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return change


def test_ast_tokens(ast_folder: Path) -> None:
    torch.manual_seed(0)
    batch = torch.randn(2, 56, 32)
    reference = ASTModel.from_pretrained(ast_folder)
    with torch.inference_mode():
        last = reference(batch).last_hidden_state
    everything = build(make_recipe(ast_folder, tokens="all", layers=[0, 1, 2]), CPU)
    found = everything.encode(batch, [0, 1, 2])
    spec = describe(make_recipe(ast_folder))
    assert found.shape == (2, spec.layers, spec.tokens, spec.dim) == (2, 3, 2 + 2 * 5, 24)
    assert spec.encoder_parameters == sum(p.numel() for p in reference.parameters())
    torch.testing.assert_close(found[:, -1], last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(everything.encode(batch, [0, 2]), found[:, ::2])

    cls = build(make_recipe(ast_folder), CPU)
    torch.testing.assert_close(cls.encode(batch, [0, 1, 2]), found[:, :, :1])
    mean = build(make_recipe(ast_folder, tokens="mean"), CPU).encode(batch, [1])
    torch.testing.assert_close(mean, found[:, 1:2, 2:].mean(2, keepdim=True))

    raw = build(make_recipe(ast_folder, final_norm=False), CPU).encode(batch, [0, 1, 2])
    with torch.inference_mode():
        torch.testing.assert_close(reference.layernorm(raw), found[:, :, :1])
    assert (raw - found[:, :, :1]).abs().max() > 0.1

    half = build(make_recipe(ast_folder, dtype="bfloat16"), CPU).encode(batch, [0, 1, 2])
    assert half.dtype == torch.float32
    # 8 bits of mantissa through three layers; tokens are of magnitude 1
    assert 0 < (half - found[:, :, :1]).abs().max() < 0.1


def test_ast_from_file_to_features(ast_folder: Path) -> None:
    encoder = build(make_recipe(ast_folder), CPU)
    content = audio_file(tone(44100), 44100, "PCM_16")
    spectrogram = encoder.preprocess(content, None)
    assert spectrogram.shape == encoder.preprocess.shape == (56, 32)
    numbers = describe(make_recipe(ast_folder)).preprocess
    assert (numbers["mean"], numbers["std"], numbers["rate"]) == (-5.0, 3.0, 16000)
    torch.testing.assert_close(spectrogram[-1], torch.full((32,), 5 / 6))  # 48 frames of sound
    assert encoder.encode(spectrogram[None], [2]).shape == (1, 1, 1, 24)


def test_ast_spec_names_what_decides_values(ast_folder: Path, changed: Callable[..., Path]) -> None:
    spec = describe(make_recipe(ast_folder))
    json.loads(spec.canonical())
    assert describe(make_recipe(ast_folder), weights_at_hand=False).matches(spec)
    assert len(spec.weights) == 64
    for recipe in (
        make_recipe(ast_folder, preprocess="reference"),
        make_recipe(ast_folder, final_norm=False),
        make_recipe(changed(preprocessor_config={"mean": -4.0})),
        make_recipe(changed(config={"layer_norm_eps": 1e-3})),
    ):
        assert describe(recipe).fingerprint != spec.fingerprint
    quiet = make_recipe(changed(preprocessor_config={"do_normalize": False}))
    plain = build(quiet, CPU).preprocess(audio_file(tone(16000), 16000), None)
    normed = build(make_recipe(ast_folder), CPU).preprocess(audio_file(tone(16000), 16000), None)
    torch.testing.assert_close((plain + 5) / 6, normed)


def test_the_papers_ast_needs_no_weights_to_be_described() -> None:
    hub = describe(make_recipe("hf:MIT/ast-finetuned-audioset-10-10-0.4593"), False)
    assert (hub.layers, hub.tokens, hub.dim) == (12, 1214, 768)  # convention 23
    assert hub.preprocess["frames"] == 1024
    original = describe(make_recipe("audioset_10_10_0.4593.pth", arch="{}"), False)
    assert original.encoder_arguments == hub.encoder_arguments | {"layer_norm_eps": 1e-6}
    with pytest.raises(NotHereError):
        describe(make_recipe("audioset_10_10_0.4593.pth", arch="{}"))


def test_old_bin_files_are_read(changed: Callable[..., Path], ast_folder: Path) -> None:
    from safetensors.torch import load_file

    folder = changed()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    batch = torch.randn(1, 56, 32)
    one, two = (build(make_recipe(f), CPU).encode(batch, [2]) for f in (folder, ast_folder))
    assert torch.equal(one, two)


# --- AST as its authors publish it ---------------------------------------------------------------


def golden_ast() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "enc_ast.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def original_file(golden: dict[str, torch.Tensor], file: Path, prefix: str) -> Path:
    """The golden weights as an original checkpoint, classifiers included."""
    state = {f"{prefix}{k[3:]}": v for k, v in golden.items() if k.startswith("sd/")}
    state |= {"module.mlp_head.1.weight": torch.zeros(5, 48), f"{prefix}head.bias": torch.zeros(5)}
    torch.save(state, file)
    return file


GOLDEN_ARCH = '{"num_attention_heads": 4, "max_length": 56, "num_mel_bins": 64}'


@pytest.mark.parametrize("prefix", ["module.v.", "v.", ""])
def test_parity_with_the_official_ast(tmp_path: Path, prefix: str) -> None:
    golden = golden_ast()
    file = original_file(golden, tmp_path / "audioset.pth", prefix)
    layers = [0, 1, 2]
    # another torch's kernels, on values of magnitude 4
    tolerance = {"atol": 2e-5, "rtol": 0}
    recipe = make_recipe(file, arch=GOLDEN_ARCH, tokens="all", layers=layers)
    spec = describe(recipe)
    assert spec.tokens == 2 + int(golden["grid_freq_time"].prod())
    found = build(recipe, CPU).encode(golden["fbank"], layers)
    torch.testing.assert_close(found, golden["hidden"], **tolerance)
    cls = build(make_recipe(file, arch=GOLDEN_ARCH), CPU).encode(golden["fbank"], layers)
    torch.testing.assert_close(cls[:, :, 0], golden["cls"], **tolerance)

    # the same in a folder with a config.json
    arguments = spec.encoder_arguments
    ASTConfig(**arguments).save_pretrained(tmp_path)
    folder = make_recipe(tmp_path, preprocess="reference")
    assert describe(folder).encoder_arguments == arguments
    assert torch.equal(build(folder, CPU).encode(golden["fbank"], layers), cls)


def random_original(positions: int = 1212, width: int = 64) -> dict[str, torch.Tensor]:
    """An AudioSet-shaped original checkpoint of two layers."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, width),
        "dist_token": draw(1, 1, width),
        "pos_embed": draw(1, positions + 2, width),
        "patch_embed.proj.weight": draw(width, 1, 16, 16),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": draw(width),
        "norm.bias": draw(width),
    }
    for n in range(2):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            state[f"blocks.{n}.{name}.weight"] = draw(rows, columns)
            state[f"blocks.{n}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            state[f"blocks.{n}.{name}.weight"] = 1 + draw(width)
            state[f"blocks.{n}.{name}.bias"] = draw(width)
    return state


def test_an_original_checkpoint_alone_says_its_architecture(tmp_path: Path) -> None:
    file = tmp_path / "audioset_10_10_0.4593.pth"
    state = random_original()
    torch.save({f"module.v.{name}": value for name, value in state.items()}, file)
    spec = describe(make_recipe(file))
    assert (spec.layers, spec.tokens, spec.dim) == (2, 1214, 64)
    assert spec.encoder_arguments["frequency_stride"] == 10
    assert spec.encoder_arguments["layer_norm_eps"] == 1e-6
    encoder = build(make_recipe(file), CPU)
    assert encoder.preprocess.shape == (1024, 128)
    spectrogram = encoder.preprocess(audio_file(tone(16000), 16000), None)
    assert encoder.encode(spectrogram[None], [0, 1]).isfinite().all()
    # q, k and v in this order
    layer = encoder.model.layers[1].attention
    assert torch.equal(layer.k_proj.weight, state["blocks.1.attn.qkv.weight"][64:128])


def test_strides_of_the_authors_other_audioset_models() -> None:
    for positions, stride in ((1212, 10), (850, 12), (657, 14), (512, 16)):
        config = original_config(random_original(positions), Path("x.pth"), {})
        assert (config.frequency_stride, config.time_stride) == (stride, stride)
        ASTModel(config).load_state_dict(to_hf(random_original(positions)))


# --- Whisper -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Whisper that hears one second."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(5)
    config = WhisperConfig(
        d_model=24,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_source_positions=50,
        max_target_positions=8,
        num_mel_bins=20,
        vocab_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.2,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=1, dither=0.1).save_pretrained(folder)
    return folder


def test_whisper(whisper_folder: Path, real_sounds: list[Path]) -> None:
    options = {"kind": "whisper", "layers": [0, 1, 2]}
    encoder = build(make_recipe(whisper_folder, **options, tokens="all"), CPU)
    contents = [path.read_bytes() for path in real_sounds[:3]]
    batch = torch.stack([encoder.preprocess(content, None) for content in contents])
    assert batch.shape[1:] == encoder.preprocess.shape == (100, 20)

    extractor = WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    samples, rate = soundfile.read(real_sounds[0], dtype="float32")
    mono = resample(torch.from_numpy(samples), rate, 16000).numpy()
    expected = extractor(mono, sampling_rate=16000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(batch[0], expected[0].T, atol=1e-5, rtol=0)

    reference = WhisperModel.from_pretrained(whisper_folder).encoder.eval()
    with torch.inference_mode():
        theirs = reference(batch.transpose(1, 2), output_hidden_states=True)
        last = theirs.last_hidden_state
        others = [reference.layer_norm(state) for state in theirs.hidden_states[1:3]]
    found = encoder.encode(batch, [0, 1, 2])
    spec = describe(make_recipe(whisper_folder, **options, tokens="all"))
    assert found.shape == (3, spec.layers, spec.tokens, spec.dim) == (3, 3, 50, 24)
    assert spec.encoder_parameters == sum(p.numel() for p in reference.parameters())
    torch.testing.assert_close(found[:, -1], last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :2], torch.stack(others, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(batch, [1]), found[:, 1:2])
    assert not any(layer._forward_hooks for layer in encoder.model.layers)

    mean = build(make_recipe(whisper_folder, kind="whisper", tokens="mean"), CPU)
    torch.testing.assert_close(mean.encode(batch, [2]), found[:, 2:].mean(2, keepdim=True))
    raw = make_recipe(whisper_folder, **options, tokens="all", final_norm=False)
    with torch.inference_mode():
        normed = reference.layer_norm(build(raw, CPU).encode(batch, [0, 1, 2]))
    torch.testing.assert_close(normed, found, atol=1e-5, rtol=1e-5)


def test_whisper_views(whisper_folder: Path) -> None:
    views = {"count": 1, "time_mask": 40, "frequency_mask": 10}
    recipe = make_recipe(whisper_folder, kind="whisper", tokens="mean", views=views)
    preprocess = build(recipe, CPU).preprocess
    content = audio_file(np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    plain, view = preprocess(content, None), preprocess(content, 3)
    assert torch.equal(view, preprocess(content, 3))
    assert not torch.equal(view, preprocess(content, 4))
    assert (view[view != plain] == 0).all() and (view != plain).sum() > 50
    assert torch.equal(plain, preprocess(content, None)), "the folder's dither is off"


def test_whisper_spec(whisper_folder: Path) -> None:
    recipe = make_recipe(whisper_folder, kind="whisper", tokens="mean")
    spec = describe(recipe)
    json.loads(spec.canonical())
    assert describe(recipe, weights_at_hand=False).matches(spec)


# --- mistakes ------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would be code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def check(message: str, recipe: Recipe) -> None:
    """Building fails so; whatever describing finds, it says the same."""
    with pytest.raises(EpalmError, match=message):
        build(recipe, CPU)


def test_whisper_mistakes(whisper_folder: Path, ast_folder: Path, tmp_path: Path) -> None:
    check("has no class token; set it to mean", make_recipe(whisper_folder, kind="whisper"))
    options = {"kind": "whisper", "tokens": "mean"}
    check("no Whisper", make_recipe(whisper_folder, **options, preprocess="reference"))
    check("'audio-spectrogram-transformer' model", make_recipe(ast_folder, **options))
    shutil.copytree(whisper_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chunk_length": 2}))
    check("takes no .200, 20. frames", make_recipe(tmp_path / "copy", **options))
    file.unlink()
    check("holds no preprocessor_config.json", make_recipe(tmp_path / "copy", **options))


def test_ast_mistakes(
    whisper_folder: Path,
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check("is of a 'whisper' model", make_recipe(whisper_folder))
    for arch in ("vit_small", "[]", '{"heads": 3}', '"max_length"'):
        check("is not a JSON object of ASTConfig's fields", make_recipe(arch=arch))
    wide = make_recipe(changed(), arch='{"hidden_size": "wide"}')
    check("encoder.arch: .'hidden_size': 'wide'. makes no AST", wide)
    flipped = make_recipe(changed(), views={"count": 1, "flip": 0.1})
    with pytest.raises(EpalmError, match="encoder.views.flip: has no meaning for audio"):
        describe(flipped)
    for name in ("num_attention_heads", "patch_size", "frequency_stride", "num_hidden_layers"):
        none = make_recipe(changed(), arch=json.dumps({name: 0}), preprocess="reference")
        check(f"encoder.arch: {name} is 0; it must be 1 or more", none)
    check("hidden_act is 'foo', not one of gelu", make_recipe(arch='{"hidden_act": "foo"}'))
    torch.save(random_original(), tmp_path / "weights.pth")
    check("makes no AST", make_recipe(tmp_path / "weights.pth", arch='{"max_length": "long"}'))
    check("no such file or folder", make_recipe(tmp_path / "nothing"))
    check(r"makes \(64, 32\)", make_recipe(changed(preprocessor_config={"max_length": 64})))

    longer = {"config": {"max_length": 76}, "preprocessor_config": {"max_length": 76}}
    check("1 have another shape.*position_embeddings", make_recipe(changed(**longer)))
    sizes = {"config": {"max_length": 56}, "preprocessor_config": {"max_length": 56}}
    deeper = changed(**sizes | {"config": {"max_length": 56, "num_hidden_layers": 4}})
    check(r"weights are missing.*layers\.3", make_recipe(deeper))

    folder = changed(config={"num_hidden_layers": 3})
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    check("cannot be loaded", make_recipe(folder))
    (folder / "model.safetensors").unlink()
    check("neither model.safetensors", make_recipe(folder))
    monkeypatch.chdir(tmp_path)
    torch.save({"embeddings.cls_token": Evil()}, folder / "pytorch_model.bin")
    check("cannot be loaded", make_recipe(folder))
    assert not (tmp_path / "unpickled").exists()
    (folder / "preprocessor_config.json").unlink()
    check("holds no preprocessor_config.json", make_recipe(folder))
    (folder / "config.json").write_text("{")
    check("config.json cannot be read", make_recipe(folder))
    (folder / "config.json").unlink()
    check("config.json cannot be read .No such file", make_recipe(folder))


def test_original_checkpoint_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    recipe = make_recipe(file)
    file.write_bytes(b"<html>404</html>")
    check("is not a checkpoint of tensors", recipe)
    torch.save({"module.v.cls_token": Evil()}, file)
    check("is not a checkpoint of tensors", recipe)
    assert not (tmp_path / "unpickled").exists()
    torch.save({"conv.weight": torch.zeros(1)}, file)
    check("holds no AST", recipe)
    torch.save(random_original(width=48), file)
    check("1212 positions of width 48.*0 heads; set encoder.arch", recipe)
    torch.save(random_original(positions=144), file)  # the speech commands model's
    check("144 positions.*1024 frames.*set encoder.arch", recipe)
    short = make_recipe(file, arch='{"max_length": 128}')
    assert build(short, CPU).preprocess.shape == (128, 128)
    state = random_original()
    del state["blocks.1.norm2.bias"]
    torch.save(state, file)
    check(r"does not fit.*\n.*layers\.1\.layernorm_after\.bias", recipe)

    config = ASTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, max_length=900)
    config.save_pretrained(tmp_path)
    check(r"(?s)does not fit.*position_embeddings", make_recipe(tmp_path, preprocess="reference"))
