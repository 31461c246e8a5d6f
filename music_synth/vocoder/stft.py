"""Short-time Fourier transforms of audio in JAX, differentiable, with a hop that divides the window."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import FFT_SIZE, FRAME_LENGTH, HOP_LENGTH, frame, hann_window, mel_matrix
from music_synth.vocoder.pre_echo import without_pre_echo

Array = jax.Array
PULL_AHEAD = 3  # frames that `pull_to_mel` moves besides that which it fixes next


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


def project_to_mel(audio: Array, mel: Array, exists: Array, limits: Array | None = None) -> Array:
    """Brings audio nearer to the wanted mel spectrum: one step of alternating projections.

    As Griffin and Lim (1984) alternate between a magnitude and the spectra that exist, but what is given is the mel,
    not a magnitude: each bin is scaled by the ratio of wanted to present mel of its filters.

    Args:
      audio: [B, 320 T].
      mel: mel magnitude (not its logarithm) of frames as of `audio.mel` [B, T, 128].
      exists: float32 [B, T], 0 where the piece is not: zeros come out there.
      limits: of pre-echoes (`pre_echo`), [B, T, 320]; None: none.
    """
    window = hann_window()
    frames = project_frames(frame(audio), mel) * exists[..., None]
    inside = jnp.repeat(exists, HOP_LENGTH, axis=1)
    total = overlap_add(frames, HOP_LENGTH)
    weight = overlap_add(np.square(window)[None, None] * exists[..., None], HOP_LENGTH)
    # The first and the last hop of a piece lie under one window: there the sum fades, instead of growing as 1/window.
    audio = (total / jnp.maximum(weight, 0.5))[..., :-HOP_LENGTH] * inside
    return audio if limits is None else without_pre_echo(audio, limits)


def project_frames(frames: Array, mel: Array) -> Array:
    """Scales the spectra of frames [..., 640] towards a mel magnitude [..., 128]; frames under the window squared."""
    window = hann_window()
    spectrum = jnp.fft.rfft(windowed(frames, window), FFT_SIZE)  # [..., 513]
    with jax.default_matmul_precision("highest"):
        present = magnitude(spectrum, 1e-7) @ mel_matrix()
        # At most 10: where next to nothing is, the next step can lift it further.
        gain = jnp.clip(mel / jnp.maximum(present, 1e-6), 0.0, 10.0) @ spread_matrix().T
    return windowed(jnp.fft.irfft(scaled(spectrum, gain), FFT_SIZE)[..., :FRAME_LENGTH], window)


class Pull(NamedTuple):
    """What `pull_to_mel` keeps from hop to hop: frames of audio under the window squared."""

    frames: Array  # [B, PULL_AHEAD + 1, 640]: the last that is fixed, and those that still move
    change: Array  # [B, PULL_AHEAD, 640]: of those, by the last step


def no_pull(rows: int) -> Pull:
    """Gives the state before a piece; it begins PULL_AHEAD hops before frame 0, which is then moved as often as any."""
    frames = jnp.zeros((rows, PULL_AHEAD + 1, FRAME_LENGTH))
    return Pull(frames, frames[:, 1:])


def pull_to_mel(
    audio: Array, mel: Array, exists: Array, limits: Array, pull: Pull, num_steps: int, momentum: float
) -> tuple[Array, Pull]:
    """Brings audio nearer to the wanted mel as `project_to_mel`, but hop by hop, so that it looks less ahead.

    Real-time iterative spectrogram inversion with look-ahead (Zhu, Beauregard and Wyse 2007), given the mel: for every
    hop, the frame that is fixed next and PULL_AHEAD later ones are projected `num_steps` times. So a frame is projected
    num_steps (PULL_AHEAD + 1) times, but looks PULL_AHEAD + 1 hops ahead. What is fixed and what moves are joined under
    windows: joined at a hop's edge, they would click (0.4 dB of log-mel error).

    Args:
      audio: first estimate of hops 0 .. n + PULL_AHEAD, [B, 320 (n + PULL_AHEAD + 1)].
      mel: mel magnitude of frames 0 .. n + PULL_AHEAD - 1, [B, n + PULL_AHEAD, 128].
      exists: float32 [B, n + PULL_AHEAD + 2], of frames -1 .. n + PULL_AHEAD: 0 where the piece is not.
      limits: of pre-echoes in hops 0 .. n + PULL_AHEAD (`pre_echo`), [B, n + PULL_AHEAD + 1, 320].
      pull: what came out for the hops before.

    Returns:
      Hops 0 .. n - 1, [B, 320 n], and the state for those that follow.
    """
    rise, fall = np.square(hann_window()).reshape(2, 1, 1, HOP_LENGTH)
    num_hops = mel.shape[1] - PULL_AHEAD

    def by_hop(x: Array, start: int, count: int) -> Array:
        """[B, N, ...] to [n, B, count, ...]: of each hop, `count` elements from `start` on."""
        parts = [jnp.moveaxis(x[:, start + i : start + i + num_hops], 1, 0) for i in range(count)]
        return jnp.stack(parts, axis=2)

    def one(pull: Pull, inputs: tuple[Array, ...]) -> tuple[Pull, Array]:
        # Two hops; mel; exists of frames from the last fixed one on, one more than move; limits of the hops they share.
        new, wanted, here, limited = inputs
        here = here[..., None]
        weight = jnp.maximum(fall * here[:, :-1] + rise * here[:, 1:], 0.5)
        edge = rise * new[:, 1:] * here[:, -1:]
        entering = jnp.concatenate([rise * new[:, :1], fall * new[:, 1:]], axis=-1) * here[:, -2:-1]
        fixed = pull.frames[:, :1]

        def hops(frames: Array) -> Array:
            later = jnp.concatenate([frames[:, 1:, :HOP_LENGTH], edge], axis=1)
            return without_pre_echo((frames[..., HOP_LENGTH:] + later) / weight * here[:, 1:], limited)

        def project(_, moving: tuple[Array, Array]) -> tuple[Array, Array]:
            frames, change = moving
            x = hops(jnp.concatenate([fixed, frames + momentum * change], axis=1))
            made = project_frames(jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1), wanted) * here[:, 1:-1]
            return made, made - frames

        frames = jnp.concatenate([pull.frames[:, 1:], entering], axis=1)
        change = jnp.concatenate([pull.change, jnp.zeros_like(entering)], axis=1)
        frames, change = jax.lax.fori_loop(0, num_steps, project, (frames, change))
        return Pull(frames, change[:, 1:]), hops(jnp.concatenate([fixed, frames], axis=1))[:, 0]

    x = audio.reshape(len(audio), -1, HOP_LENGTH)
    moving = (
        by_hop(x, PULL_AHEAD, 2),
        by_hop(mel, 0, PULL_AHEAD + 1),
        by_hop(exists, 0, PULL_AHEAD + 3),
        by_hop(limits, 0, PULL_AHEAD + 2),
    )
    pull, made = jax.lax.scan(one, pull, moving)
    return jnp.moveaxis(made, 0, 1).reshape(len(audio), -1), pull
