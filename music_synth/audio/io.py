"""Audio files in and out (WAV, FLAC), mono, at any sample rate."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from music_synth.audio.mel import SAMPLE_RATE
from music_synth.errors import UserError
from music_synth.files import replacing

WRITABLE = {".wav": "WAV", ".flac": "FLAC"}
MIN_RATE, MAX_RATE, MAX_SECONDS = 1000, 768_000, 24 * 3600  # that a file may say of itself: Hz, Hz, s
BLOCK = 1 << 18  # samples of each channel that are read at a time
MAX_PEAK = 0.99  # to which louder renderings are turned down
MAX_WAV_SAMPLES = (2**32 - 64) // 2  # its header counts bytes in 32 bits


def resample(audio: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """Resamples float32 [S] by soxr, band-limited, without delay: S * target / source samples, rounded."""
    import soxr

    if source_rate == target_rate:
        return audio
    return soxr.resample(audio, source_rate, target_rate, quality="HQ")


def read_audio(source: str | os.PathLike[str] | bytes) -> np.ndarray:
    """Reads WAV or FLAC (or what else libsndfile reads), a path or its bytes, as mono float32 [S] at 16 kHz.

    Channels are averaged; samples lie in [-1, 1] if the file's do.

    Raises:
      UserError: the file is missing, is not audio, holds no samples, or holds NaN or infinity.
    """
    import soundfile

    name = "the audio" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise UserError(f"no audio file at {name}")
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with soundfile.SoundFile(opened) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE or file.frames > MAX_SECONDS * file.samplerate:
                raise UserError(
                    f"{name} says that it has {file.frames} samples at {file.samplerate} Hz: rates are {MIN_RATE} to"
                    f" {MAX_RATE:,} Hz, and it may last {MAX_SECONDS // 3600} hours"
                )
            parts = list(_resampled(file.blocks(BLOCK, dtype="float32", always_2d=True), file.samplerate))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"cannot read {name} as audio ({error}); give a WAV or FLAC file") from error
    if not parts:
        raise UserError(f"{name} holds no audio samples")
    audio = np.concatenate(parts)
    if not np.isfinite(audio).all():
        raise UserError(f"{name} holds samples that are NaN or infinite; export it again")
    return audio


def _resampled(blocks: Iterable[np.ndarray], rate: float) -> Iterator[np.ndarray]:
    """Averages the channels of blocks [s, channels] and yields them at 16 kHz: together, bit for bit, as `resample`."""
    import soxr

    stream = None
    if rate != SAMPLE_RATE:
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    size = 0
    for block in blocks:
        mono = np.ascontiguousarray(block.mean(axis=1))
        size += len(mono)
        yield mono if stream is None else stream.resample_chunk(mono)
    if stream is not None and size:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def turned_down(audio: np.ndarray) -> np.ndarray:
    """Turns audio [S] down so far that its peak is at most `MAX_PEAK`; what is no louder stays as it is."""
    peak = np.abs(audio).max(initial=0.0)
    return audio if peak <= MAX_PEAK else audio * np.float32(MAX_PEAK / peak)


def audio_to_int16(audio: np.ndarray) -> np.ndarray:
    """Rounds floats in [-1, 1] to int16, clipped: round(32768 * sample)."""
    return np.clip(np.round(audio * 32768.0), -32768, 32767).astype(np.int16)


def audio_from_int16(samples: np.ndarray) -> np.ndarray:
    """Returns the float32 in [-1, 1] that `audio_to_int16` rounded, of any integers (tfds hands out 64-bit ones)."""
    return samples.astype(np.float32) / np.float32(32768)


@contextlib.contextmanager
def audio_writer(path: str | os.PathLike) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends mono floats [S] in [-1, 1] to a 16-bit WAV or FLAC of 16 kHz, by `path`'s suffix.

    The file takes its name when the block ends and it is on the disk; if the block raises, what was there stays.
    Samples outside [-1, 1] are clipped, with a warning at the end that says how many.

    Raises:
      UserError: unknown suffix, missing or unwritable folder, a full disk, NaN or infinity, no samples at the end.
    """
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise UserError(f"cannot write {path}: the name must end in {' or '.join(WRITABLE)}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    num_samples = num_clipped = 0

    def write(audio: np.ndarray) -> None:
        nonlocal num_samples, num_clipped
        audio = np.asarray(audio)
        if audio.ndim != 1:
            raise ValueError(f"audio files take mono audio [S], not shape {audio.shape}")
        if not np.isfinite(audio).all():
            raise UserError(f"nothing written to {path}: the audio holds NaN or infinity")
        num_samples += len(audio)
        num_clipped += int((np.abs(audio) > 1.0).sum())
        if path.suffix.lower() == ".wav" and num_samples > MAX_WAV_SAMPLES:
            raise UserError(f"{path}: a WAV file ends at 4 GB; write a .flac")
        try:
            file.write(audio.clip(-1.0, 1.0))
        except (soundfile.LibsndfileError, AssertionError) as error:  # fewer samples were written than given
            with part.open("ab") as same:
                same.write(bytes(1 << 16))  # says why, as an OSError, where libsndfile says "System error"
            raise OSError(str(error)) from error

    try:
        with replacing(path) as part:
            part.touch()  # says what is wrong, as above
            kind = WRITABLE[path.suffix.lower()]
            with soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, "PCM_16", format=kind) as file:
                yield write
            if not num_samples:
                raise UserError(f"nothing to write to {path}: the audio is empty")
            if part.is_file() and soundfile.info(part).frames != num_samples:
                raise OSError("not all of it could be written")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot write {path} ({getattr(error, 'strerror', None) or error})") from error
    if num_clipped:
        message = f"{path.name}: {num_clipped} of {num_samples} samples exceed 1 and are clipped"
        warnings.warn(message, stacklevel=2)


def write_audio(path: str | os.PathLike, audio: np.ndarray) -> None:
    """Writes floats [S] in [-1, 1] as 16-bit WAV or FLAC, by the suffix of `path`; see `audio_writer`."""
    with audio_writer(path) as write:
        write(audio)
