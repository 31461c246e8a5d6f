"""Short-time Fourier transforms of audio in JAX, differentiable, with a hop that divides the window."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import FFT_SIZE, FRAME_LENGTH, HOP_LENGTH, frame, hann_window, mel_matrix

Array = jax.Array


def windowed(frames: Array, window: np.ndarray) -> Array:
    """frames [..., n] times window [n]."""
    return frames * window.reshape((1,) * (frames.ndim - 1) + window.shape)


def frames_of(audio: Array, length: int, hop: int) -> Array:
    """Cuts whole frames of audio [..., S]: [..., S/hop - length/hop + 1, length]; hop divides length and S."""
    hops = audio.reshape(*audio.shape[:-1], -1, hop)
    parts, count = length // hop, hops.shape[-2] - length // hop + 1
    return jnp.concatenate([hops[..., i : i + count, :] for i in range(parts)], axis=-1)


def overlap_add(frames: Array, hop: int) -> Array:
    """Frames [..., T, length] summed where they lie, each `hop` after the one before: [..., hop T + length - hop]."""
    parts = frames.shape[-1] // hop
    leading = [(0, 0)] * (frames.ndim - 2)
    split = frames.reshape(*frames.shape[:-1], parts, hop)
    shifted = (jnp.pad(split[..., i, :], [*leading, (i, parts - 1 - i), (0, 0)]) for i in range(parts))
    hops = functools.reduce(jnp.add, shifted)
    return hops.reshape(*hops.shape[:-2], -1)


def stft(audio: Array, fft_size: int, hop: int) -> Array:
    """Computes spectra under Hann windows of `fft_size` samples, at 0, hop, ... : [..., S] to [..., T, fft_size/2 + 1].

    Reflected at both ends; a last part shorter than a hop is not covered.
    """
    audio = audio[..., : audio.shape[-1] // hop * hop]
    padded = jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(fft_size // 2, fft_size // 2)], mode="reflect")
    return jnp.fft.rfft(windowed(frames_of(padded, fft_size, hop), hann_window(fft_size)))


def magnitude(spectrum: Array, floor: float) -> Array:
    """Computes |spectrum|, whose gradient stays finite where the spectrum is 0."""
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + floor**2)


def scaled(spectrum: Array, factor: Array | np.ndarray) -> Array:
    """Multiplies a complex spectrum by real factors."""
    return jax.lax.complex(spectrum.real * factor, spectrum.imag * factor)


def spread_matrix() -> np.ndarray:
    """Computes [513, 128]: a bin's mean of values of mel filters, weighted as the filters weigh the bin; rows sum to 1.

    The bins at 0 Hz and at the upper edge, which no filter counts, follow the filters next to them.
    """
    weights = mel_matrix().astype(np.float64)
    weights[0, 0] = weights[-1, -1] = 1.0
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def project_to_mel(audio: Array, mel: Array, exists: Array) -> Array:
    """Brings audio nearer to the wanted mel spectrum: one step of alternating projections.

    As Griffin and Lim (1984) alternate between a magnitude and the spectra that exist, but what is given is the mel,
    not a magnitude: each bin is scaled by the ratio of wanted to present mel of its filters.

    Args:
      audio: [B, 320 T].
      mel: mel magnitude (not its logarithm) of frames as of `audio.mel` [B, T, 128].
      exists: float32 [B, T], 0 where the piece is not: zeros come out there.
    """
    window = hann_window()
    spectrum = jnp.fft.rfft(windowed(frame(audio), window), FFT_SIZE)  # [B, T, 513]
    with jax.default_matmul_precision("highest"):
        present = magnitude(spectrum, 1e-7) @ mel_matrix()
        # At most 10: where next to nothing is, the next step can lift it further.
        gain = jnp.clip(mel / jnp.maximum(present, 1e-6), 0.0, 10.0) @ spread_matrix().T
    frames = jnp.fft.irfft(scaled(spectrum, gain), FFT_SIZE)[..., :FRAME_LENGTH]
    inside, exists = jnp.repeat(exists, HOP_LENGTH, axis=1), exists[..., None]
    total = overlap_add(windowed(frames * exists, window), HOP_LENGTH)
    weight = overlap_add(np.square(window)[None, None] * exists, HOP_LENGTH)
    # The first and the last hop of a piece lie under one window: there the sum fades, instead of growing as 1/window.
    return (total / jnp.maximum(weight, 0.5))[..., :-HOP_LENGTH] * inside
