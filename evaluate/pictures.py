"""Small pictures of media for a page: an image, frames of a video, a sound's spectrogram.

A picture never ends an evaluation: where there is none, it says why. Images and sounds are decoded
here; videos by a process of their own, which is killed when its decoder hangs.
"""

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from epalm.data.media import Media
from epalm.extract.audio import read_audio
from epalm.extract.frames import read_frames
from epalm.extract.workers import DecodePool, Task, describe_error

SIDE = 320  # pixels of the longer side
SMALL = 128  # images up to this side are shown with their own pixels
FRAMES = 4
SECONDS = 20.0  # of a sound that are shown
TIMEOUT = 30.0  # seconds for a video


class Picture(NamedTuple):
    """What a page shows of a media.

    Attributes:
        uri: a `data:` address; empty: nothing can be shown.
        note: what it is, where it is not the image itself; or why there is none.
        pixelated: it is shown larger than it is, without smoothing.
    """

    uri: str
    note: str = ""
    pixelated: bool = False


def pictures(wanted: Mapping[str, tuple[Media, str]]) -> dict[str, Picture]:
    """A picture of each media.

    Args:
        wanted: by any key, the media and its modality.
    """
    videos = {k: media for k, (media, kind) in wanted.items() if kind == "video" and media.exists()}
    found = _videos(videos) if videos else {}
    draw = {"image": _image, "audio": _sound}
    for key, (media, kind) in wanted.items():
        if not media.exists():
            found[key] = Picture("", "the file is not here")
        elif kind in draw:
            try:
                found[key] = draw[kind](media.read())
            except Exception as error:  # whatever a broken file does to its decoder
                found[key] = _failure(describe_error(error))
    return {key: found[key] for key in wanted}


def _failure(error: tuple[str, str]) -> Picture:
    return Picture("", f"cannot be decoded: {error[1]}")


def _image(content: bytes) -> Picture:
    with Image.open(io.BytesIO(content)) as file:
        file.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG need not be decoded in full
        image = ImageOps.exif_transpose(file).convert("RGB")
    return _picture(image, pixelated=max(image.size) <= SMALL)


def _sound(content: bytes) -> Picture:
    """Log-mel energies of the first seconds; time goes right, pitch up."""
    from matplotlib import colormaps
    from torchaudio.compliance import kaldi

    waveform, rate = read_audio(content, 16000, SECONDS + 1)
    seconds = waveform.shape[1] / rate
    mono = waveform.mean(0, keepdim=True)[:, : round(SECONDS * rate)]
    energies = kaldi.fbank(mono, sample_frequency=rate, num_mel_bins=64).numpy()
    if not len(energies):
        raise ValueError(f"too short to show: {seconds:.3f} s")
    low, high = np.percentile(energies, [5, 99.5])
    scaled = np.clip((energies - low) / max(high - low, 1e-6), 0, 1)
    colours = colormaps["cividis"](np.flipud(scaled.T), bytes=True)[..., :3]
    image = Image.fromarray(np.ascontiguousarray(colours)).resize((SIDE, SIDE // 2))
    length = f"{seconds:.1f} s" if seconds <= SECONDS else f"the first {SECONDS:g} s"
    return _picture(image, f"spectrogram of {length}")


class _Frames:
    """See `Preprocess`: a few frames, each in the corner of a square; -1 where there is nothing."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (FRAMES, 3, SIDE // 2, SIDE // 2)

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        frames = read_frames(content, FRAMES, seed)
        square = torch.full(self.shape, -1.0)
        for number, frame in enumerate(frames):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image.thumbnail((SIDE // 2, SIDE // 2))
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
            square[number, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        return square


def _videos(videos: Mapping[str, Media]) -> dict[str, Picture]:
    found: dict[str, Picture] = {}
    with DecodePool(_Frames(), 1, TIMEOUT, 1) as pool:
        for key, media in videos.items():
            try:
                batch = pool.submit([Task.of_media(media)])
                error = batch.outcomes[0].result().error
            except Exception as problem:  # the file went away, or no process can be started
                error = describe_error(problem)
            found[key] = _failure(error) if error else _mosaic(batch.inputs[0].numpy())
    return found


def _mosaic(frames: NDArray[np.float32]) -> Picture:
    """Frames in two rows, in reading order."""
    inside = frames[0, 0] >= 0
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    pixels = frames[:, :, :height, :width].astype(np.uint8).transpose(0, 2, 3, 1)
    rows = [np.concatenate(list(pixels[i : i + 2]), axis=1) for i in range(0, FRAMES, 2)]
    return _picture(Image.fromarray(np.concatenate(rows)), f"{FRAMES} frames, in reading order")


def _picture(image: Image.Image, note: str = "", pixelated: bool = False) -> Picture:
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    kind = "png" if pixelated else "jpeg"
    image.save(stream, kind, quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", note, pixelated)
