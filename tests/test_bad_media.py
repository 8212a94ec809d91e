"""Odd and broken media: each decodes as a plain file of the same content does, or stands in the
ledger with a reason; nothing hangs, no process dies, and other media's rows stay as they are.

Each modality is extracted once with all its media and once with the good ones alone, by the real
pipeline and its worker processes.
"""

import ctypes
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import av
import numpy as np
import psutil
import pytest
import soundfile
import torch
from PIL import Image
from torchaudio.functional import resample
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

from epalm.config import Recipe, parse_recipe
from epalm.data import load_dataset
from epalm.data.media import Media
from epalm.extract import loop
from epalm.extract.encoder import Encoder
from epalm.extract.lookup import open_features
from epalm.extract.workers import DecodePool, Outcome, Task, _serve, prepare_workers

HERE = Path(__file__).parent
TIMEOUT = 5.0  # seconds a decoder may take in an extraction; one image is made to take them
NOISE = 1e-4  # of features of magnitude 2, in float32: batches of other sizes, the last sample bit


class Odd(NamedTuple):
    """A media file that decodes.

    Attributes:
        build: gives its bytes.
        like: the good file whose features it has.
        tolerance: largest difference of a feature.
    """

    build: Callable[[], bytes]
    like: str
    tolerance: float = NOISE


class Bad(NamedTuple):
    """A media file that stands in the ledger: its bytes, and words of the reason (a pattern)."""

    build: Callable[[], bytes]
    reason: str


@dataclass(frozen=True)
class Table:
    """The media of one modality by file name. Ending and content are not always of one mind."""

    good: dict[str, Callable[[], bytes]]
    odd: dict[str, Odd]
    bad: dict[str, Bad]
    filler: Callable[[int], bytes]  # makes more good media, all different


# --- images --------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
# squares of 8 by 8 pixels, on which formats with a palette are exact and JPEG nearly is
SQUARES = np.kron(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
PHOTO = Image.fromarray(SQUARES)
GRAY = PHOTO.convert("L")


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image = PHOTO, **options: Any) -> bytes:
    return saved(image, "JPEG", quality=98, subsampling=0, **options)


def raw_png(size: tuple[int, int], rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of any header; each row begins with the number of its filter."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def deep_png() -> bytes:
    """16 bits a channel, the lower eight full of noise, RGB."""
    pixels = SQUARES.astype(">u2") * 256 + RANDOM.integers(0, 256, SQUARES.shape, dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    return raw_png(PHOTO.size, rows, depth=16)


def gray_16(form: str) -> bytes:
    return saved(Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 256 + 99), form)


def palette_png() -> bytes:
    """Half of the colours are transparent; what they are stands in the file all the same."""
    image = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    return saved(image, transparency=bytes([0, 255] * 128))


def turned_by_exif(form: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    return saved(PHOTO.transpose(Image.Transpose.ROTATE_90), form, exif=exif)


def turned_beside_broken_tags() -> bytes:
    """A width that is a text, and GPS tags far behind the end."""
    tags = ((0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\0\6\0\0"), (0x8825, 4, 1, b"\x7f" * 4))
    block = b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + block + bytes(4)
    return jpeg(PHOTO.transpose(Image.Transpose.ROTATE_90), exif=exif)


def with_alpha(image: Image.Image) -> bytes:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(image)


def animated(form: str) -> bytes:
    options = {"lossless": True} if form == "WEBP" else {}
    others = [Image.new("RGB", PHOTO.size, colour) for colour in ("red", "blue")]
    return saved(PHOTO, form, save_all=True, append_images=others, duration=100, **options)


def wide(pixels: int) -> bytes:
    """4 pixels high, all columns alike in threes."""
    colours = np.array([[250, 40, 10], [20, 200, 30], [60, 80, 240]], np.uint8)
    row = np.resize(np.kron(colours, np.ones((8, 1), np.uint8)), (pixels, 3))
    return saved(Image.fromarray(np.stack([row] * 4)))


def zeroed(content: bytes, at: float, count: int) -> bytes:
    """Some bytes lost, as on a bad disk."""
    start = int(len(content) * at)
    return content[:start] + bytes(count) + content[start + count :]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


IMAGES = Table(
    good={
        "photo.png": lambda: saved(PHOTO),
        "gray.png": lambda: saved(GRAY),
        "flat.png": lambda: saved(Image.new("RGB", (64, 64), (200, 90, 30))),
        "strip.png": lambda: wide(2000),
        "black-white.png": lambda: saved(GRAY.convert("1").convert("RGB")),
    },
    odd={
        "cmyk.jpg": Odd(lambda: jpeg(PHOTO.convert("CMYK")), "photo.png", 0.02),
        "quality98.jpg": Odd(jpeg, "photo.png", 0.02),
        "progressive.jpg": Odd(lambda: jpeg(progressive=True), "photo.png", 0.02),
        "broken-exif.jpg": Odd(lambda: jpeg(exif=b"Exif\0\0no tags"), "photo.png", 0.02),
        # JPEG has no checksum: what its decoder makes of lost bytes is taken
        "lost-bytes.jpg": Odd(lambda: zeroed(jpeg(), 0.9, 8), "photo.png", math.inf),
        "rgb-16-bit.png": Odd(deep_png, "photo.png"),
        "gray-16-bit.png": Odd(lambda: gray_16("PNG"), "gray.png"),
        "gray-16-bit.tif": Odd(lambda: gray_16("TIFF"), "gray.png"),
        "one-bit.png": Odd(lambda: saved(GRAY.convert("1")), "black-white.png"),
        "transparent-palette.png": Odd(palette_png, "photo.png"),
        "alpha.png": Odd(lambda: with_alpha(PHOTO), "photo.png"),
        "gray-alpha.png": Odd(lambda: with_alpha(GRAY), "gray.png"),
        "turned.png": Odd(turned_by_exif, "photo.png"),
        "turned.tif": Odd(lambda: turned_by_exif("TIFF"), "photo.png"),
        "turned.jpg": Odd(turned_beside_broken_tags, "photo.png", 0.02),
        "animated.gif": Odd(lambda: animated("GIF"), "photo.png"),
        "animated.webp": Odd(lambda: animated("WEBP"), "photo.png"),
        "animated.png": Odd(lambda: animated("PNG"), "photo.png"),
        "cmyk.tif": Odd(lambda: saved(PHOTO.convert("CMYK"), "TIFF"), "photo.png"),
        "plain.bmp": Odd(lambda: saved(PHOTO, "BMP"), "photo.png"),
        "lossless.webp": Odd(lambda: saved(PHOTO, "WEBP", lossless=True), "photo.png"),
        "png-named.jpg": Odd(lambda: saved(PHOTO, compress_level=1), "photo.png"),
        "more-behind.png": Odd(lambda: saved(PHOTO) + b"something else", "photo.png"),
        "one-pixel.png": Odd(lambda: saved(Image.new("RGB", (1, 1), (200, 90, 30))), "flat.png"),
        "20000-wide.png": Odd(lambda: wide(20000), "strip.png"),
    },
    bad={
        "empty.jpg": Bad(lambda: b"", "cannot identify image file"),
        "text.jpg": Bad(lambda: b"404 Not Found\n" * 20, "cannot identify image file"),
        "truncated.jpg": Bad(lambda: jpeg()[:-100], "truncated"),
        "tiny-part.jpg": Bad(lambda: jpeg()[:300], "Truncated File Read"),
        "truncated.png": Bad(lambda: half(saved(PHOTO)), "truncated"),
        "truncated.gif": Bad(lambda: half(animated("GIF")), "(?i)truncated"),
        "truncated.bmp": Bad(lambda: half(saved(PHOTO, "BMP")), "truncated"),
        "truncated.webp": Bad(lambda: half(animated("WEBP")), "decoder"),
        "lost-bytes.png": Bad(lambda: zeroed(saved(PHOTO), 0.5, 8), "broken data stream"),
        "bomb.png": Bad(lambda: raw_png((30000, 30000), b""), "decompression bomb"),
        "200000-wide.png": Bad(lambda: saved(Image.new("L", (200000, 1))), "too long and narrow"),
        "no-size.png": Bad(lambda: raw_png((0, 0), b""), "cannot identify image file"),
        "float.tif": Bad(lambda: saved(PHOTO.convert("F"), "TIFF"), "floating point"),
        # what `misbehaving` makes of these
        "hang.jpg": Bad(lambda: b"hang", rf"stuck for {TIMEOUT:g} s"),
        "exit.jpg": Bad(lambda: b"exit", r"crashed \(exit code 3\)"),
        "kill.jpg": Bad(lambda: b"kill", r"crashed \(exit code -9\)"),
        "segfault.jpg": Bad(lambda: b"segfault", r"crashed \(exit code -11\)"),
        "memory.jpg": Bad(lambda: b"memory", "MemoryError"),
    },
    filler=lambda n: saved(Image.new("RGB", (9, 9), (n, 5 * n, 255 - n))),
)

# --- video ---------------------------------------------------------------------------------------


def drawn(count: int, height: int = 48, width: int = 64, first: int = 0) -> np.ndarray:
    """Frames (count, height, width, 3) with a gradient that moves."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([3 * x + 9 * i, 5 * y, 2 * x + 2 * y], -1)
              for i in range(first, first + count)]  # fmt: skip
    return np.array(frames).reshape(-1, height, width, 3).clip(0, 255).astype(np.uint8)


def video(frames: np.ndarray, codec: str = "ffv1", pixels: str = "bgr0", form: str = "matroska",
          times: list[int] | None = None, **options: str) -> bytes:  # fmt: skip
    """A video file of these frames; `times` in milliseconds, by default 25 a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        file.start_encoding()  # writes the header, even if nothing follows
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = times[i] if times else 40 * i, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def mp4(frames: np.ndarray, **options: Any) -> bytes:
    """H.264 without loss."""
    return video(frames, "libx264rgb", "bgr24", "mp4", qp="0", **options)


def gray_frames() -> np.ndarray:
    return drawn(8)[..., :1].repeat(3, -1)


def gray_mp4() -> bytes:
    """Without colour planes; its black is 16 and its white 235, as in other videos."""
    limited = (16 + gray_frames() * (219 / 255)).round().astype(np.uint8)
    return video(limited, "libx264", "gray", "mp4", qp="0")


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def animated_gif() -> bytes:
    first, *others = [Image.fromarray(frame) for frame in gray_frames()]
    return saved(first.convert("L"), "GIF", save_all=True, append_images=others, duration=40)


SLOW_AND_FAST = [0, 20, 40, 500, 520, 540, 900, 2000]

VIDEOS = Table(  # four frames are taken
    good={
        "clip.mkv": lambda: video(drawn(8)),
        "odd-size.mkv": lambda: video(drawn(8, 33, 17)),
        "gray.mkv": lambda: video(gray_frames()),
        "last-repeated.mkv": lambda: video(drawn(3)[[0, 1, 2, 2]]),
        "still.mkv": lambda: video(drawn(1)[[0, 0, 0, 0]]),
    },
    odd={
        "even-rate.mp4": Odd(lambda: mp4(drawn(8)), "clip.mkv"),
        "variable-rate.mp4": Odd(lambda: mp4(drawn(8), times=SLOW_AND_FAST), "clip.mkv"),
        "mkv-named.mp4": Odd(lambda: video(drawn(8), times=SLOW_AND_FAST), "clip.mkv"),
        "ten-bit.mp4": Odd(
            lambda: video(drawn(8), "libx264", "yuv444p10le", "mp4", qp="0"), "clip.mkv"
        ),
        "alpha.mkv": Odd(lambda: video(drawn(8), pixels="bgra"), "clip.mkv"),
        "three-frames.mp4": Odd(lambda: mp4(drawn(3)), "last-repeated.mkv"),
        "one-frame.mp4": Odd(lambda: mp4(drawn(1)), "still.mkv"),
        "picture.mp4": Odd(lambda: saved(Image.fromarray(drawn(1)[0])), "still.mkv"),
        "17x33.mp4": Odd(lambda: mp4(drawn(8, 33, 17)), "odd-size.mkv"),
        "gray.mp4": Odd(gray_mp4, "gray.mkv", 0.03),
        "moving.gif": Odd(animated_gif, "gray.mkv"),
    },
    bad={
        "empty.mp4": Bad(lambda: b"", "PyAV: .*Invalid data"),
        "text.mp4": Bad(lambda: b"404 Not Found\n" * 50, "PyAV: .*Invalid data"),
        "audio-only.mp4": Bad(audio_only, "no video stream"),
        "truncated.mp4": Bad(lambda: half(mp4(drawn(8))), "truncated: "),
        "no-frames.mp4": Bad(lambda: mp4(drawn(0)), "no video stream"),
        "no-frames.mkv": Bad(lambda: video(drawn(0)), "PyAV: .*End of file"),
        "index-lost.mp4": Bad(lambda: mp4(drawn(8))[:-400], "truncated: "),
    },
    filler=lambda n: video(drawn(8, first=n)),
)

# --- audio ---------------------------------------------------------------------------------------


def noise(rate: int, top: float, seed: int = 0) -> np.ndarray:
    """Half a second of noise between 60 Hz and `top`."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(rate // 2))
    hertz = np.fft.rfftfreq(rate // 2, 1 / rate)
    spectrum[(hertz < 60) | (hertz > top)] = 0
    samples = np.fft.irfft(spectrum, rate // 2)
    return (0.3 * samples / np.abs(samples).max()).astype(np.float32)


def finer(samples: np.ndarray, times: int) -> np.ndarray:
    """The same sound at so many times the rate, by its Fourier transform."""
    count = times * len(samples)
    spectrum = np.pad(np.fft.rfft(samples), (0, count // 2 - len(samples) // 2))
    return np.fft.irfft(times * spectrum, count).astype(np.float32)


def sound(samples: Any, subtype: str = "PCM_16", form: str = "WAV", rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(samples), rate, subtype=subtype, format=form)
    return buffer.getvalue()


NOISE_16 = noise(16000, 7000)
NOISE_8 = noise(8000, 3500)


def upsampled() -> bytes:
    """What torchaudio makes of 8 kHz; test_audio.py compares that with the true sound."""
    return sound(resample(torch.from_numpy(NOISE_8), 8000, 16000), "FLOAT")


def with_one(value: float) -> bytes:
    samples = NOISE_16.copy()
    samples[4000] = value
    return sound(samples, "FLOAT")


SOUNDS = Table(
    good={
        "plain.wav": lambda: sound(NOISE_16),
        "upsampled.wav": upsampled,
        "silence.flac": lambda: sound(0 * NOISE_16, form="FLAC"),
    },
    odd={
        "8-bit.wav": Odd(lambda: sound(NOISE_16, "PCM_U8"), "plain.wav", 2e-3),
        "24-bit.wav": Odd(lambda: sound(NOISE_16, "PCM_24"), "plain.wav"),
        "float.wav": Odd(lambda: sound(NOISE_16, "FLOAT"), "plain.wav"),
        "mu-law.wav": Odd(lambda: sound(NOISE_16, "ULAW"), "plain.wav", 2e-3),
        "stereo.wav": Odd(lambda: sound(np.stack([NOISE_16] * 2, 1)), "plain.wav"),
        "six-channels.wav": Odd(lambda: sound(np.stack([NOISE_16] * 6, 1)), "plain.wav"),
        "one-sided.wav": Odd(  # the mean of both sides is plain.wav again
            lambda: sound(np.stack([2 * NOISE_16, 0 * NOISE_16], 1)), "plain.wav"
        ),
        "8-khz.wav": Odd(lambda: sound(NOISE_8, "FLOAT", rate=8000), "upsampled.wav"),
        "96-khz.wav": Odd(lambda: sound(finer(NOISE_16, 6), rate=96000), "plain.wav"),
        "plain.flac": Odd(lambda: sound(NOISE_16, form="FLAC"), "plain.wav"),
        "big-endian.aiff": Odd(lambda: sound(NOISE_16, form="AIFF"), "plain.wav"),
        "more-behind.wav": Odd(lambda: sound(NOISE_16) + bytes(33), "plain.wav"),
        "flac-named.mp3": Odd(lambda: sound(NOISE_16, "PCM_24", "FLAC"), "plain.wav"),
        "silence.wav": Odd(lambda: sound(0 * NOISE_16), "silence.flac"),
    },
    bad={
        "empty.wav": Bad(lambda: b"", "Format not recognised"),
        "text.wav": Bad(lambda: b"404 Not Found\n" * 50, "Format not recognised"),
        "no-samples.wav": Bad(lambda: sound(np.zeros(0)), "no samples"),
        "one-sample.wav": Bad(lambda: sound(NOISE_16[:1]), "too short"),
        "truncated.wav": Bad(lambda: half(sound(NOISE_16)), "cut off"),
        "truncated.flac": Bad(lambda: half(sound(NOISE_16, form="FLAC")), "lost sync"),
        "lost-bytes.flac": Bad(lambda: zeroed(sound(NOISE_16, form="FLAC"), 0.5, 40), "lost sync"),
        "nan.wav": Bad(lambda: with_one(math.nan), "no number"),
        "inf.wav": Bad(lambda: with_one(math.inf), "no number"),
        "no-rate.wav": Bad(
            lambda: sound(NOISE_16)[:24] + bytes(4) + sound(NOISE_16)[28:], "SF_INFO"
        ),
    },
    filler=lambda n: sound(noise(16000, 7000, seed=n)),
)

TABLES = {"image": IMAGES, "video": VIDEOS, "audio": SOUNDS}

UNREADABLE = {"missing": "No such file", "folder": "not a file", "loop": "Too many levels"}
"""Files that have no bytes, of every modality."""

# --- extraction ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def misbehaving() -> Iterator[ModuleType]:
    """The helper module; worker processes find it too, as they are given our sys.path."""
    prepare_workers("epalm.extract.image")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield importlib.import_module("misbehaving")


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ast")
    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape = {"max_length": 56, "num_mel_bins": 32}
    torch.manual_seed(4)
    model = ASTModel(ASTConfig(**size, **shape, intermediate_size=48))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    ASTFeatureExtractor(**shape).save_pretrained(folder)
    return folder


@dataclass
class Extracted:
    """What two extractions made of a table's media.

    Attributes:
        everything: features by media, of those that have some.
        good_alone: features of the good media, extracted without the others.
        ledger: reason by media.
    """

    everything: dict[str, np.ndarray]
    good_alone: dict[str, np.ndarray]
    ledger: dict[str, str]


def extracted(recipe: Recipe) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Features and ledger of a recipe's dataset."""
    dataset = load_dataset(recipe)
    report = loop.extract(recipe, dataset)
    table, kept = open_features(recipe, dataset)
    assert set(report.failed) | set(kept.media) == set(dataset.media)
    values = table.fetch(list(kept.media)).numpy()
    entries = report.features.failures()
    ledger = {entry["media"]: entry["reason"] for entry in entries}
    assert len(entries) == len(ledger) and set(ledger) == set(report.failed)
    return dict(zip(kept.media, values, strict=True)), ledger


def write_jsonl(path: Path, media: list[str]) -> Path:
    lines = [
        {"id": name, "media": name, "prompt": "What?", "answers": ["that"], "split": "test"}
        for name in media
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def both_extractions(table: Table, folder: Path, encoder: dict[str, Any]) -> Extracted:
    """Writes the media, and extracts all of them and the good ones alone.

    Good and bad media take turns, so that in batches of four two good ones are left: the encoder
    is given the same batches as when good media stand alone in batches of two, and rows must be
    equal bit by bit. Odd media come after them, in batches of their own.
    """
    good = dict(table.good)
    while len(good) < len(table.bad) or len(good) % 2:
        good[f"filler-{len(good)}"] = partial(table.filler, len(good))
    bad = {name: kind.build for name, kind in table.bad.items()}
    while len(bad) < len(good):
        bad[f"broken-{len(bad)}"] = f"text {len(bad)}".encode
    odd = {name: kind.build for name, kind in table.odd.items()}
    for name, build in (good | bad | odd).items():
        (folder / name).write_bytes(build())
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    pairs = [name for pair in zip(good, bad, strict=True) for name in pair]
    everything = write_jsonl(folder / "all.jsonl", [*pairs, *odd, *UNREADABLE])
    good_alone = write_jsonl(folder / "good.jsonl", list(good))

    def recipe(data: Path, batch: int) -> Recipe:
        tree = {
            "name": data.stem,
            "device": "cpu",
            "data": {"kind": "jsonl", "path": str(data), "bad_media": "skip"},
            "encoder": encoder
            | {"batch_size": batch, "workers": 2, "decode_timeout": TIMEOUT, "dtype": "float32"},
            "store": {"root": str(folder / data.stem), "shard_rows": 8, "dtype": "float32"},
            "lm": {"weights": "none"},
            "variant": {"encoder_layers": 3},
            "train": {"steps": 1},
        }
        return parse_recipe(tree, "test")

    features, ledger = extracted(recipe(everything, 4))
    alone, nothing = extracted(recipe(good_alone, 2))
    assert not nothing
    return Extracted(features, alone, ledger)


@pytest.fixture(scope="module")
def extractions(
    tmp_path_factory: pytest.TempPathFactory,
    vit_folder: Path,
    ast_folder: Path,
    misbehaving: ModuleType,
) -> Callable[[str], Extracted]:
    """By modality; made at the first call."""
    encoders = {
        "image": {"kind": "timm", "weights": str(vit_folder)},
        "video": {"kind": "frame-average", "weights": str(vit_folder), "frames": 4},
        "audio": {"kind": "ast", "weights": str(ast_folder)},
    }
    done: dict[str, Extracted] = {}
    real_build = loop.build

    def build(recipe: Recipe, device: torch.device) -> Encoder:
        encoder = real_build(recipe, device)
        encoder.preprocess = misbehaving.Misbehaving(encoder.preprocess)
        return encoder

    def get(modality: str) -> Extracted:
        if modality not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "build", build)
                folder = tmp_path_factory.mktemp(modality)
                done[modality] = both_extractions(TABLES[modality], folder, encoders[modality])
        return done[modality]

    return get


def kinds(part: str) -> list[Any]:
    """(modality, file name) of all tables."""
    return [
        pytest.param(modality, name, id=f"{modality}-{name}")
        for modality, table in TABLES.items()
        for name in getattr(table, part)
    ]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize(("modality", "name"), kinds("odd"))
def test_odd_media_decode_like_plain_ones(
    extractions: Callable[[str], Extracted], modality: str, name: str
) -> None:
    found = extractions(modality)
    kind = TABLES[modality].odd[name]
    assert name not in found.ledger, found.ledger[name]
    distance = difference(found.everything[name], found.everything[kind.like])
    assert distance <= kind.tolerance


@pytest.mark.parametrize(("modality", "name"), kinds("bad"))
def test_bad_media_stand_in_the_ledger(
    extractions: Callable[[str], Extracted], modality: str, name: str
) -> None:
    found = extractions(modality)
    assert name not in found.everything
    assert re.search(TABLES[modality].bad[name].reason, found.ledger[name]), found.ledger[name]


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("modality", TABLES)
def test_unreadable_media_stand_in_the_ledger(
    extractions: Callable[[str], Extracted], modality: str, name: str
) -> None:
    assert extractions(modality).ledger[name].startswith(f"cannot be read: {UNREADABLE[name]}")


@pytest.mark.parametrize("modality", TABLES)
def test_good_media_are_unaffected(extractions: Callable[[str], Extracted], modality: str) -> None:
    found = extractions(modality)
    assert len(found.good_alone) >= len(TABLES[modality].bad)
    for name, row in found.good_alone.items():
        assert row.tobytes() == found.everything[name].tobytes(), name


@pytest.mark.parametrize("modality", TABLES)
def test_tolerances_are_small(extractions: Callable[[str], Extracted], modality: str) -> None:
    """Features of good media differ by far more than those of odd ones may from theirs."""
    table = TABLES[modality]
    rows = [extractions(modality).everything[name] for name in table.good]
    least = min(difference(a, b) for i, a in enumerate(rows) for b in rows[:i])
    largest = max(k.tolerance for k in table.odd.values() if math.isfinite(k.tolerance))
    assert least > 3 * largest


# --- decoders that misbehave, and what is left when the parent dies ------------------------------


@pytest.fixture
def media(tmp_path: Path) -> Callable[[bytes], Task]:
    """The task for a file with this content."""

    def write(content: bytes) -> Task:
        path = tmp_path / content.decode()
        path.write_bytes(content)
        return Task.of_media(Media(path.name, path))

    return write


@pytest.fixture
def pool(misbehaving: ModuleType) -> Iterator[DecodePool]:
    """Two workers; a decoder is stuck after two seconds."""
    preprocess = misbehaving.Misbehaving(misbehaving.Level())
    with DecodePool(preprocess, workers=2, timeout=2, batch_size=6) as pool:
        yield pool


def decoded(pool: DecodePool, tasks: list[Task]) -> tuple[list[Outcome], torch.Tensor]:
    batch = pool.submit(tasks)
    return [outcome.result(60) for outcome in batch.outcomes], batch.inputs


def worker_pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


@pytest.mark.parametrize(
    ("deed", "error", "replaced"),
    [
        (b"hang", ("TimeoutError", "the decoder was stuck for 2 s"), True),
        (b"exit", ("DecoderCrash", "the decoder crashed (exit code 3)"), True),
        (b"kill", ("DecoderCrash", "the decoder crashed (exit code -9)"), True),
        (b"segfault", ("DecoderCrash", "the decoder crashed (exit code -11)"), True),
        (b"memory", ("MemoryError", "MemoryError, no reason given"), False),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_workers_that_misbehave_are_replaced(
    pool: DecodePool,
    media: Callable[[bytes], Task],
    deed: bytes,
    error: tuple[str, str],
    replaced: bool,
) -> None:
    before = worker_pids()
    names = [b"1", deed, b"2", b"3", deed, b"4"]  # so often that both workers may meet it
    outcomes, inputs = decoded(pool, [media(name) for name in names])
    for name, outcome, found in zip(names, outcomes, inputs, strict=True):
        assert outcome.error == (error if name == deed else None)
        assert name == deed or (found == float(name)).all()
    after = worker_pids()
    assert len(before) == len(after) == 2
    assert (after != before) == replaced
    outcomes, inputs = decoded(pool, [media(b"%d" % n) for n in range(6)])
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert inputs[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert worker_pids() == after


def test_closing_does_not_wait_for_a_stuck_decoder(
    misbehaving: ModuleType, media: Callable[[bytes], Task]
) -> None:
    preprocess = misbehaving.Misbehaving(misbehaving.Level())
    with DecodePool(preprocess, workers=1, timeout=600, batch_size=2) as pool:
        decoded(pool, [media(b"1")])  # it has started
        batch = pool.submit([media(b"hang"), media(b"2")])
        while not batch.outcomes[0].running():
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 30
    assert not worker_pids()
    assert batch.outcomes[0].result(0).error == ("Stopped", "the pool was closed")


PARENT = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from misbehaving import Level, Misbehaving
from epalm.data.media import Media
from epalm.extract.workers import DecodePool, Task, prepare_workers

prepare_workers("epalm.extract.workers")
pool = DecodePool(Misbehaving(Level()), workers=2, timeout=2, batch_size=2)
one, hang = (Task.of_media(Media(path, Path(path))) for path in sys.argv[2:])
for outcome in pool.submit([one, one]).outcomes:
    assert outcome.result().error is None
pool.submit([hang])  # the other worker stays idle
time.sleep(0.3)
print("busy", flush=True)
time.sleep(600)
"""


def is_gone(process: psutil.Process) -> bool:
    """Ended, even where nobody has asked for its exit code yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_workers_end_with_their_parent(media: Callable[[bytes], Task]) -> None:
    """The idle one sees that its connection is closed; the system's alarm ends the stuck one."""
    paths = [HERE, media(b"1").media.path, media(b"hang").media.path]
    command = [sys.executable, "-c", PARENT, *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "busy\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(children) >= 4, "two workers, the process they are forked from, a resource tracker"
    end = time.monotonic() + 40
    while not all(map(is_gone, children)):
        assert time.monotonic() < end, [child for child in children if not is_gone(child)]
        time.sleep(0.1)


LOADING = """
import time
from epalm.extract.workers import prepare_workers

prepare_workers("epalm.extract.image")
try:
    print("loading", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_libraries_are_loaded_is_for_the_parent() -> None:
    """A terminal sends it to all processes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", LOADING]
    with subprocess.Popen(command, start_new_session=True, **pipes) as parent:
        assert parent.stdout and parent.stdout.readline() == "loading\n"
        time.sleep(0.5)  # it loads for seconds
        os.killpg(parent.pid, signal.SIGINT)
        said, wrong = parent.communicate()
    assert (said, wrong, parent.returncode) == ("interrupted\n", "", 0)


def test_a_worker_ends_in_silence_with_what_it_said_unread(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As where its parent is killed: the connection is then reset, and not closed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    memory = context.RawArray(ctypes.c_float, 1)

    def serve() -> None:
        ours.close()  # a forked process has both ends
        _serve(theirs, None, memory, (1,), 2.0)

    worker = context.Process(target=serve, daemon=True)
    worker.start()
    assert ours.poll(20)
    ours.close()  # its "ready" was not received
    theirs.close()
    worker.join(20)
    assert worker.exitcode == 0
    assert "Traceback" not in capfd.readouterr().err
