"""Keeps audio made of a mel silent before an attack, where frames of 40 ms smear it.

Where a sound begins within a frame, that frame and the next two tell by how much of it each holds. What the audio has
just before is then held at the level of the frame before the attack, as audio coders do with pre-echoes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import FRAME_LENGTH, HOP_LENGTH, hann_window, mel_matrix

Array = jax.Array
ATTACK = 1 / 64  # energy of a frame over that of the next three, below which a sound begins: louder ones hide the rest
MARGIN = 2.0  # over the energy before, as real sounds move
RISE = 40  # samples, 2.5 ms, in which the limit goes up; at once, it would click
BLOCK = 40  # samples, 2.5 ms, whose mean square is limited
# Where a sound may begin, in samples from the second hop of the frame; what begins before is told by the frame before.
PLACES = np.arange(-HOP_LENGTH, HOP_LENGTH, 10)
DECAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0, 1000.0)  # of its energy, in nepers a hop
FLOOR = 1e-2  # share of a frame that counts as none


@functools.cache
def shares() -> np.ndarray:
    """Log of the shares that three frames have in a sound, float32 [places * decays, 3]; places vary slowest."""
    t = np.arange(2 * HOP_LENGTH + FRAME_LENGTH)
    since = t - (HOP_LENGTH + PLACES[:, None, None] + 5)
    sounds = (since >= 0) * np.exp(-np.minimum(np.array(DECAYS)[:, None] * np.maximum(since, 0) / HOP_LENGTH, 80.0))
    frames = np.stack([sounds[..., HOP_LENGTH * i :][..., :FRAME_LENGTH] for i in range(3)], axis=-2)
    energy = frames @ np.square(hann_window().astype(np.float64))
    return np.log(energy / energy.sum(axis=-1, keepdims=True) + FLOOR).reshape(-1, 3).astype(np.float32)


def ends() -> np.ndarray:
    """Samples of the frame that come before each of the sounds of `shares`, int32; 0 where another frame tells."""
    return np.repeat(np.where(PLACES < 0, 0, HOP_LENGTH + PLACES), len(DECAYS)).astype(np.int32)


def pre_echo_limits(mel: Array, exists: Array) -> Array:
    """How much energy each sample may have, as a share of what follows: 1 everywhere but before attacks.

    The limits of a hop depend on the two frames before it and on the two after.

    Args:
      mel: natural-log mel [B, T, M].
      exists: bool [B, T]; outside, and at the first frame, nothing is known of what was before.

    Returns:
      [B, T, 320]
    """

    def later(x: Array, frames: int) -> Array:
        around = max(0, -frames), max(0, frames)
        return jnp.pad(x, ((0, 0), around))[:, around[1] :][:, : x.shape[1]]

    energy = (jnp.exp(2 * mel) / mel_matrix().sum(axis=0)[None, None]).sum(axis=-1) * exists.astype(jnp.float32)
    before, frames = later(energy, -1), jnp.stack([later(energy, i) for i in range(3)], axis=-1)
    share = before / jnp.maximum(frames.max(axis=-1), 1e-20)
    begins = later(exists, -1) & (share < ATTACK)
    new = jnp.maximum(frames - before[..., None], 0.0)
    found = jnp.log(new / jnp.maximum(new.sum(axis=-1, keepdims=True), 1e-20) + FLOOR)
    apart = jnp.square(found[..., None, :] - shares()[None, None]).sum(axis=-1)  # [B, T, places * decays]
    end = jnp.asarray(ends())[jnp.argmin(apart, axis=-1)][..., None]
    rise = jnp.clip(1 + (np.arange(2 * HOP_LENGTH)[None, None] - end) / RISE, 0.0, 1.0)  # [B, T, 640]
    least = jnp.where(begins, jnp.clip(MARGIN * share, 1e-12, 1.0), 1.0)[..., None]
    limits = least + (1 - least) * jnp.square(0.5 - 0.5 * jnp.cos(np.pi * rise))
    carried = jnp.pad(limits[:, :-1, HOP_LENGTH:], ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
    return jnp.minimum(limits[..., :HOP_LENGTH], carried)


def without_pre_echo(hops: Array, limits: Array) -> Array:
    """Audio in hops, [B, n, 320] or [B, 320 n], turned down where it has more energy than limits [B, n, 320] let it.

    What follows is the loudest block of a hop and of the next two.
    """
    blocks = hops.reshape(*limits.shape[:-1], -1, BLOCK)
    energy = jnp.square(blocks).mean(axis=-1)
    loudest = jnp.pad(energy.max(axis=-1), ((0, 0), (0, 2)))
    follows = jnp.maximum(jnp.maximum(loudest[:, :-2], loudest[:, 1:-1]), loudest[:, 2:])[..., None, None]
    allowed = limits.reshape(blocks.shape)
    gain = jnp.sqrt(allowed * follows / jnp.maximum(energy, 1e-20)[..., None])
    return (blocks * jnp.where(allowed < 1, jnp.minimum(gain, 1.0), 1.0)).reshape(hops.shape)
