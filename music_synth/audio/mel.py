"""The one definition of the log-mel spectrogram, for JAX (jittable, differentiable) and for NumPy.

16 kHz audio is cut into frames of 640 samples every 320 (50 frames a second), weighted by a periodic Hann
window, extended with zeros to an FFT of 1024 points; magnitudes (not powers) pass through 128 triangular
HTK-mel filters and the natural logarithm. Frames are not centered: frame k covers samples 320k .. 320k+639,
so only the last frame of an excerpt depends on samples beyond it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import Any

import numpy as np

from music_synth.midi.segments import FRAME_RATE as FRAME_RATE
from music_synth.midi.segments import HOP_LENGTH, SAMPLE_RATE

FRAME_LENGTH = 640  # samples under the window
FFT_SIZE = 1024  # samples; FRAME_LENGTH and zeros
NUM_MELS = 128
MIN_HZ, MAX_HZ = 0.0, 8000.0  # outer edges of the first and the last filter
MIN_MEL, MAX_MEL = 1e-5, 1e8  # the magnitude is clipped to this range before the logarithm
MIN_LOG_MEL = math.log(MIN_MEL)  # silence; -1 in model range
DB_PER_NEPER = 20 / math.log(10)  # 8.6859: natural-log magnitude to dB
MAX_LOG_MEL = 4.0  # +1 in model range; loud tones exceed it (up to about 6)


def num_mel_frames(num_samples: int) -> int:
    """Frames that `log_mel` makes of `num_samples` samples: ceil(n / 320); a piece may have one more (`segments`)."""
    return -(-num_samples // HOP_LENGTH)


@functools.cache
def hann_window(length: int = FRAME_LENGTH) -> np.ndarray:
    """Computes a periodic Hann window, float32 [length]."""
    n = np.arange(length)
    return (0.5 - 0.5 * np.cos(2 * np.pi * n / length)).astype(np.float32)


def htk_mel(hertz: Any) -> Any:
    """Places frequencies on the HTK mel scale, m = 1127 ln(1 + f/700)."""
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


def mel_bin(hertz: float) -> float:
    """Places a frequency among the mel bins: bin k peaks at the f for which mel_bin(f) = k."""
    return float(htk_mel(hertz) / htk_mel(SAMPLE_RATE / 2)) * (NUM_MELS + 1) - 1


@functools.cache
def mel_matrix(
    num_mels: int = NUM_MELS, fft_size: int = FFT_SIZE, min_hz: float = MIN_HZ, max_hz: float = MAX_HZ
) -> np.ndarray:
    """Computes the filter bank, float32 [fft_size / 2 + 1, num_mels], of 16 kHz audio: mel = magnitude @ mel_matrix().

    HTK mel scale; triangles whose slopes are linear in mel, not in Hz, with height 1
    (no area normalization); the DC bin has weight 0. Models of others use other sizes than ours.
    """
    bins = htk_mel(np.linspace(0.0, SAMPLE_RATE / 2, fft_size // 2 + 1))[:, None]  # [513, 1]
    edges = np.linspace(htk_mel(min_hz), htk_mel(max_hz), num_mels + 2)  # [130]
    lower, center, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - lower) / (center - lower)  # [513, 128]
    falling = (upper - bins) / (upper - center)
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights[0] = 0.0
    return weights.astype(np.float32)


def jax_numpy() -> Any:
    """Imports JAX's NumPy when it is first needed: whoever measures with NumPy does not wake it."""
    import jax.numpy

    return jax.numpy


def frame(audio, xp: ModuleType | None = None):
    """Cuts audio [..., S] into overlapping frames [..., ceil(S/320), 640], with zeros after the end."""
    xp = xp or jax_numpy()
    num_frames = num_mel_frames(audio.shape[-1])
    padding = (num_frames + 1) * HOP_LENGTH - audio.shape[-1]
    padded = xp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, padding)])
    hops = padded.reshape(*audio.shape[:-1], num_frames + 1, HOP_LENGTH)  # [..., T+1, 320]
    return xp.concatenate([hops[..., :-1, :], hops[..., 1:, :]], axis=-1)  # [..., T, 640]


def log_mel(audio, xp: ModuleType | None = None):
    """Computes natural-log mel magnitudes.

    Args:
      audio: floats in [-1, 1], 16 kHz, [..., S].
      xp: `numpy` where no accelerator should be woken (the data pipeline); None: `jax.numpy`.

    Returns:
      float32 [..., T, 128], T = ceil(S / 320), at least ln 1e-5 (silence).

    Raises:
      TypeError: audio is not floating point (16-bit integers would come out 90 dB too loud).
    """
    xp = xp or jax_numpy()
    if not xp.issubdtype(audio.dtype, xp.floating):
        raise TypeError(f"log_mel takes floating-point audio in [-1, 1], not {audio.dtype}")
    frames = frame(audio.astype(xp.float32), xp)  # [..., T, 640]
    window = hann_window().reshape((1,) * (frames.ndim - 1) + (FRAME_LENGTH,))
    spectrum = xp.fft.rfft(frames * window, FFT_SIZE)  # [..., T, 513]
    with contextlib.nullcontext() if xp is np else _highest_precision():
        mel = xp.matmul(xp.abs(spectrum), xp.asarray(mel_matrix()))  # [..., T, 128]
    return xp.log(xp.clip(mel, MIN_MEL, MAX_MEL))


def _highest_precision() -> Any:
    """Accelerators would round the inputs of a product to 8 or 10 bits."""
    import jax

    return jax.default_matmul_precision("highest")


def scale_mel(mel, clip: bool = True):
    """Maps log-mel to the model's range: ln 1e-5 to -1, 4.0 to +1. They are clipped, unless `clip` is False."""
    x = (mel - MIN_LOG_MEL) * (2.0 / (MAX_LOG_MEL - MIN_LOG_MEL)) - 1.0
    return x.clip(-1.0, 1.0) if clip else x


def unscale_mel(x):
    """Maps the model's range to log-mel; the inverse of `scale_mel`. Values outside [-1, 1] are not clipped."""
    return (x + 1.0) * ((MAX_LOG_MEL - MIN_LOG_MEL) / 2.0) + MIN_LOG_MEL
