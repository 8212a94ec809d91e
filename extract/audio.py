"""Audio files to waveforms, and waveforms to the log-mel spectrogram that AST is shown.

`preprocess: model` does what Hugging Face's ASTFeatureExtractor does, after the mean over channels
and resampling to the model's rate. `preprocess: reference` does what the official code does: the
first channel, at whatever rate the file has (convention 22, bug 29). The fbank is torchaudio's.
"""

import io
import math
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torchaudio.compliance import kaldi
from torchaudio.functional import resample
from torchaudio.transforms import FrequencyMasking, TimeMasking

from epalm.config import Recipe

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974

FBANK = {
    "window_type": "hanning",
    "frame_length": 25.0,  # ms
    "frame_shift": 10.0,  # ms
    "low_freq": 20.0,  # Hz
    "high_freq": 0.0,  # 0: half the sampling rate
    "preemphasis_coefficient": 0.97,
    "remove_dc_offset": True,
    "use_energy": False,
    "dither": 0.0,
}
"""torchaudio's names; alike in both modes."""

_MARGIN = 0.1  # seconds read beyond the last frame, many times the reach of the resampling filter
_LOUDEST = 2.0**31  # some float files hold 32-bit integers; the square of more leaves float32
_LARGEST_FILTER = 2**26  # weights; torchaudio's filter has about found * wanted / gcd² of them
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's, of a FLAC file that was written to a pipe
_BLOCK = 2**16  # frames
_UNKNOWN_SIZE = 0x7FFFF000  # programs that write to a pipe leave such numbers, up to 2**32 - 1


def read_audio(
    content: bytes, rate: int | None, seconds: float | None = None
) -> tuple[torch.Tensor, int]:
    """The waveform, float32 of (channels, samples), full scale 1, and its rate in Hz.

    Args:
        content: a file that libsndfile reads: wav, flac, ogg, mp3, aiff and others.
        rate: Hz to resample to; None leaves the file's own, as the official code (convention 22).
        seconds: read no more than so much from the start; None: all. What is not read is not
            checked either.

    Raises:
        ValueError: unreadable, cut off (an mp3 that is cut off is only a shorter one), empty,
            samples that are no finite numbers, or a rate that cannot be resampled.
    """
    try:
        with _Forward(io.BytesIO(content)) as file:
            found, wanted, form = file.samplerate, file.frames, file.format
            if seconds is not None:
                wanted = min(wanted, math.ceil(seconds * found))
            if file.frames < _UNKNOWN_FRAMES:
                samples = file.read(wanted, dtype="float32", always_2d=True)
            else:
                samples = _read_to_the_end(file, wanted)
                wanted = len(samples)
    except soundfile.LibsndfileError as error:
        # its own text holds the address of our buffer, which would differ from run to run
        raise ValueError(f"no audio that libsndfile can read: {error.error_string}") from None
    # an mp3 without a length is often a little shorter than libsndfile guesses
    if (len(samples) < wanted and form != "MP3") or _is_cut_off(content):
        raise ValueError("the audio file is cut off: its header promises more than it holds")
    if len(samples) == 0:
        raise ValueError("the audio file holds no samples")
    waveform = torch.from_numpy(samples).T.contiguous()
    if not (waveform.abs() <= _LOUDEST).all():  # so written, it is true of NaN too
        raise ValueError("the audio file has samples that are no number or far beyond full scale")
    if rate is None or rate == found:
        return waveform, found
    if found * rate // math.gcd(found, rate) ** 2 > _LARGEST_FILTER:
        raise ValueError(f"{found} Hz cannot be resampled to {rate} Hz: their ratio is too odd")
    return resample(waveform, found, rate), rate


class _Forward(soundfile.SoundFile):
    """A file that is read from its start: soundfile seeks to where it is after every read, and
    behind the end of a FLAC file of unknown length that fails."""

    def seekable(self) -> bool:
        return False


def _read_to_the_end(file: soundfile.SoundFile, most: int) -> NDArray[np.float32]:
    """The samples of a file that does not know how many there are: (at most `most`, channels)."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while len(block := file.read(min(most, _BLOCK), dtype="float32", always_2d=True)):
        blocks.append(block)
        most -= len(block)
    return np.concatenate(blocks)


class SpectrogramMasking:
    """Views 1..K of audio: one band of mel bins and one stretch of frames set to 0.

    Nothing else is augmented (convention 22). Their widths are drawn evenly from 0 up to, and
    without, the recipe's `frequency_mask` and `time_mask`, or the spectrogram's size if that is
    smaller; 0 switches one off.
    """

    def __init__(self, recipe: Recipe, frames: int, mels: int):
        views = recipe.encoder.views
        self.masks = (
            FrequencyMasking(min(views.frequency_mask, mels)),
            TimeMasking(min(views.time_mask, frames)),
        )

    def __call__(self, spectrogram: torch.Tensor, seed: int) -> torch.Tensor:
        """(frames, mels) to the same shape; the seed decides, and nothing else does."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            masked = spectrogram.T[None]
            for mask in self.masks:
                masked = mask(masked)
        return masked[0].T


class FbankPreprocess:
    """See `Preprocess`. The input is (frames, mels), normalised log-mel energies.

    Padding and masks are zeros before normalisation, in both modes: 0.467 after AudioSet's. That is
    no mean (bug 29), but it is what AST itself was trained with, as its own padding and SpecAugment
    do the same.

    A sound shorter than one 25 ms frame is refused: padded, it would be all padding. Of a long one,
    `model` reads only what the frames need; `reference` reads all, for the mean over all samples.

    Args:
        numbers: from `audio_numbers`.
    """

    def __init__(self, numbers: dict[str, Any], recipe: Recipe):
        self.numbers = numbers
        self.shape: tuple[int, ...] = (numbers["frames"], numbers["mels"])
        self.masking = SpectrogramMasking(recipe, *self.shape)
        fbank = numbers["fbank"]
        needed = (self.shape[0] - 1) * fbank["frame_shift"] + fbank["frame_length"]
        self.seconds = None if numbers["subtract_mean"] else needed / 1000 + _MARGIN

    def __call__(self, content: bytes, seed: int | None) -> torch.Tensor:
        found = self.fbank(*read_audio(content, self.numbers["rate"], self.seconds))
        spectrogram = torch.zeros(self.shape)
        spectrogram[: len(found)] = found
        if seed is not None:
            spectrogram = self.masking(spectrogram, seed)
        return (spectrogram - self.numbers["mean"]) / (2 * self.numbers["std"])

    def fbank(self, waveform: torch.Tensor, rate: int) -> torch.Tensor:
        """(channels, samples) to (at most `frames`, mels), neither padded nor normalised.

        Raises:
            ValueError: shorter than one frame.
        """
        numbers = self.numbers
        if numbers["subtract_mean"]:
            waveform = waveform - waveform.mean()
        mono = waveform[:1] if numbers["channels"] == "first" else waveform.mean(0, keepdim=True)
        # torchaudio rounds the window and the shift down to whole samples, too
        window, shift = (
            int(rate * numbers["fbank"][key] / 1000) for key in ("frame_length", "frame_shift")
        )
        if mono.shape[1] < window:
            raise ValueError(
                f"the sound is too short: {1000 * mono.shape[1] / rate:.1f} ms, less than one "
                f"frame of {numbers['fbank']['frame_length']:g} ms"
            )
        mono = mono[:, : (self.shape[0] - 1) * shift + window]
        return kaldi.fbank(
            mono, sample_frequency=rate, num_mel_bins=self.shape[1], **numbers["fbank"]
        )


def audio_numbers(
    recipe: Recipe,
    frames: int,
    mels: int,
    rate: int = 16000,
    mean: float = AUDIOSET_MEAN,
    std: float = AUDIOSET_STD,
) -> dict[str, Any]:
    """Every number of the preprocessing, for the spec and for `FbankPreprocess`.

    Args:
        frames: spectrogram frames that the model takes; shorter sounds are padded, longer cut.
        mels: mel bins.
        rate, mean, std: the model's own; `preprocess: reference` takes the official code's
            instead. Normalised is (x - mean) / (2 * std).
    """
    reference = recipe.encoder.preprocess == "reference"
    return {
        "frames": frames,
        "mels": mels,
        "rate": None if reference else rate,
        "channels": "first" if reference else "mean",
        "subtract_mean": reference,
        "fbank": dict(FBANK),
        "padding": "zeros before normalisation",
        "mean": AUDIOSET_MEAN if reference else mean,
        "std": AUDIOSET_STD if reference else std,
    }


def _is_cut_off(content: bytes) -> bool:
    """A wav or aiff file has fewer bytes than its header says; libsndfile takes what is there."""
    if content[:4] not in (b"RIFF", b"FORM"):
        return False
    promised = int.from_bytes(content[4:8], "little" if content[:4] == b"RIFF" else "big")
    # one byte less: some programs leave out the last padding byte
    return promised < _UNKNOWN_SIZE and len(content) + 1 < promised + 8
