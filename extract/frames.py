"""Video files to frames: which ones, and how they are decoded.

A frame's number counts frames, not seconds, as in the official code (convention 21): a variable
frame rate needs no special care, and slow stretches get fewer frames. Departures from that code:
view 0 takes the middle frame of each interval, where the official code is random at test time too;
and a random choice reaches the last frame of each interval (bug 22).

decord decodes the usual files, H.264, VP8 and VP9 in MP4, MOV, Matroska and WebM, and reads them
forward: where key frames are no clean starts, or an MP4 with B-frames has no edit list, its seeks
land at other frames, without an error. So read, its frames were PyAV's, pixel for pixel, in every
such file we compared. PyAV decodes what decord cannot, and all other files: decord (0.6) miscounts
frames, without an error too, in many AVI, MPEG-PS and MPEG-TS files, with MPEG-2, MPEG-4 and HEVC,
and where an edit list cuts frames away.

Files turned upright by their metadata are turned by both; decord fails at those that change between
portrait and landscape, which leaves them to PyAV. Damaged slices inside a frame that the codec
conceals are visible to PyAV only, so decord's frames may hold them.
"""

import io
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

DECODER = "decord, forward only, for H.264, VP8 and VP9 in MP4 and Matroska; PyAV for all else"
FRAME_RULE = "middle of each of equal intervals; last frame repeated in shorter videos"

_DECORD_CONTAINERS = ("mov", "matroska")  # how FFmpeg's names of the four begin
_DECORD_CODECS = ("h264", "vp8", "vp9")
_ISO_BOXES = {b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide"}


class VideoError(Exception):
    """A video that gives no frames; the message says why."""


def frame_indices(length: int, count: int, seed: int | None) -> list[int]:
    """The frames taken of a video of `length` frames: `count` numbers, ascending (convention 21).

    The video is cut into `count` intervals that differ by one frame at most. A video shorter than
    `count` gives all its frames, and then its last one again.

    Args:
        length: frames of the video.
        count: frames wanted.
        seed: None for the middle of each interval; else for a random frame of each interval.
            Where some intervals would hold a single frame (`length < 2 * count`), it is a random
            subset instead, as in the official code, so that views differ in short videos too.

    Raises:
        VideoError: the video has no frames.
    """
    if length < 1:
        raise VideoError("the video has no frames")
    if length <= count:
        return [*range(length), *[length - 1] * (count - length)]
    borders = [int(b) for b in np.linspace(0, length, count + 1)]
    intervals = list(zip(borders[:-1], borders[1:], strict=True))
    if seed is None:
        return [(first + end - 1) // 2 for first, end in intervals]
    # of Python's generators, only random() is promised to stay the same
    draw = random.Random(seed).random
    if length < 2 * count:
        keys = [draw() for _ in range(length)]
        return sorted(sorted(range(length), key=keys.__getitem__)[:count])
    return [first + int(draw() * (end - first)) for first, end in intervals]


def read_frames(content: bytes, count: int, seed: int | None) -> torch.Tensor:
    """The chosen frames of a video file, upright: uint8 (count, 3, height, width), RGB.

    It may be called in a worker process that is killed when it takes too long: decord can hang at
    broken files, and nothing here guards against that.

    Args:
        content: the file's bytes; any container and codec that FFmpeg reads.
        count: frames wanted.
        seed: see `frame_indices`.

    Raises:
        VideoError: no video, no frames, a truncated file, or a chosen frame that cannot be decoded.
            The message gives the words of each decoder that tried.
    """
    _check_whole(content)
    try:
        found = _look_into(content)
    except Exception as error:  # PyAV raises whatever FFmpeg makes of a broken file, and so below
        raise VideoError(f"PyAV: {_first_line(error)}") from None
    indices = frame_indices(found.length, count, seed)
    decoders = [("decord", _with_decord)] if found.for_decord else []
    said = []
    for name, decode in (*decoders, ("PyAV", _with_pyav)):
        try:
            return torch.from_numpy(decode(content, indices)).permute(0, 3, 1, 2).contiguous()
        except Exception as error:
            said.append(f"{name}: {_first_line(error)}")
    raise VideoError("; ".join(said))


class _Found(NamedTuple):
    """What is in a file.

    Attributes:
        length: frames, whatever the header says.
        for_decord: of a kind that decord counts right, and each packet is one frame that is shown.
    """

    length: int
    for_decord: bool


def _look_into(content: bytes) -> _Found:
    """What a file's packets tell; nothing is decoded."""
    import av

    with av.open(io.BytesIO(content)) as container:
        stream = _video_stream(container)
        packets = [p for p in container.demux(stream) if p.size]
        if any(p.is_corrupt for p in packets):
            raise VideoError("the video stream is incomplete")
        shown = [p for p in packets if not p.is_discard]
        times = {p.pts for p in shown if p.pts is not None and p.pts >= 0}
        known = container.format.name.startswith(_DECORD_CONTAINERS)
        known = known and stream.codec_context.name in _DECORD_CODECS
        return _Found(len(shown), known and len(times) == len(packets))


def _video_stream(container: Any) -> Any:
    """The one that decord chooses, too: no cover picture."""
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("the file has no video stream")
    return stream


def _with_decord(content: bytes, indices: Sequence[int]) -> np.ndarray:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    wanted, found = set(indices), {}
    with _stderr_silenced():  # decord prints the content of files that it cannot open
        reader = decord.VideoReader(
            io.BytesIO(content),
            ctx=decord.cpu(0),
            num_threads=1,
            fault_tol=1e-9,  # a frame that it would replace by its neighbour is an error
        )
        try:
            # skipping seeks when it passes a key frame; taking the frame before that one does not
            before_keys = {key - 1 for key in reader.get_key_indices() if 0 < key <= max(wanted)}
            position = 0
            for number in sorted(wanted | before_keys):
                if number > position:
                    reader.skip_frames(number - position)
                frame = reader.next()
                if number in wanted:
                    found[number] = frame.asnumpy()
                position = number + 1
        finally:
            del reader  # holds the file and its threads
    frames = np.stack([found[i] for i in indices])
    if frames.shape[-1] != 3:
        raise VideoError(f"frames of {frames.shape[-1]} channels")
    return frames


def _with_pyav(content: bytes, indices: Sequence[int]) -> np.ndarray:
    import av

    wanted, found = set(indices), {}
    with av.open(io.BytesIO(content)) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1
        # from the start: seeking by time is not exact in every container
        for number, frame in enumerate(container.decode(stream)):
            if number not in wanted:
                continue
            if frame.is_corrupt:
                raise VideoError(f"frame {number} is damaged")
            turns = round(frame.rotation / 90)  # both count counterclockwise
            found[number] = np.rot90(frame.to_ndarray(format="rgb24"), turns)
            if len(found) == len(wanted):
                break
    if missing := sorted(wanted - found.keys()):
        raise VideoError(f"frame {missing[0]} cannot be decoded")
    return np.stack([found[i] for i in indices])


def _check_whole(content: bytes) -> None:
    """VideoError for an MP4, MOV or AVI file whose end is missing.

    The decoders take what is left of it for the video, or crash. Of a cut Matroska or MPEG file,
    what is left is the video here, too.
    """
    start = 0
    if content[:4] == b"RIFF":
        size = int.from_bytes(content[4:8], "little")
        start = 8 + size if size < 0x7FFFFFFF else 0  # a muxer that could not go back to it
    while start + 8 <= len(content) and content[start + 4 : start + 8] in _ISO_BOXES:
        size = int.from_bytes(content[start : start + 4])
        if size == 1:
            size = int.from_bytes(content[start + 8 : start + 16])
        if size < 8:  # 0: to the end of the file
            return
        start += size
    if start > len(content):
        raise VideoError(f"truncated: {len(content)} bytes are there, of at least {start}")


def _first_line(error: Exception) -> str:
    """What an exception says, without the place in decord's source that its messages begin with."""
    if isinstance(error, IndexError | AssertionError | ImportError):
        return f"{type(error).__name__}: {error}"
    words: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    place, _, rest = words[0].partition(": ")
    return rest if place.startswith("[") and ".cc:" in place else words[0]


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
