"""Layers of the inverse-STFT generator over frames: ConvNeXt blocks (Liu et al. 2022) in one dimension.

Each looks at a window of frames, of which some come later. A layer may be told to see fewer of those than it was
trained with, so that less of the future has to be known: the last one that it sees then stands in for those beyond.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class DepthwiseConv(nn.Module):
    """Convolution over time of each channel alone, [B, T, D] to [B, T, D]; XLA's own is slow on CPUs."""

    width: int
    ahead: int  # of the width, frames that come later
    seen: int  # of those, frames that are looked at; the last one stands in for the others

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.width**-0.5), (self.width, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        kernel = seen_taps(kernel, self.ahead, self.seen)
        padded = jnp.pad(x, ((0, 0), (self.width - 1 - self.ahead, self.seen), (0, 0)))
        taps = (kernel[i][None, None] * padded[:, i : i + x.shape[1]] for i in range(len(kernel)))
        return bias[None, None] + sum(taps)


class ConvNeXtBlock(nn.Module):
    mlp_dim: int
    width: int
    ahead: int
    seen: int
    scale: float  # of what the block adds, at the start

    @nn.compact
    def __call__(self, x: Array, exists: Array) -> Array:
        y = DepthwiseConv(self.width, self.ahead, self.seen, name="conv")(x * exists)
        y = y.reshape(-1, x.shape[-1])  # [B T, D]: XLA's gradient of a matrix product is twice as fast so on CPUs
        y = nn.LayerNorm(name="norm")(y)
        y = nn.gelu(nn.Dense(self.mlp_dim, name="wi")(y))
        y = nn.Dense(x.shape[-1], name="wo")(y).reshape(x.shape)
        return x + y * self.param("scale", nn.initializers.constant(self.scale), (x.shape[-1],))[None, None]


def seen_taps(kernel: Array | np.ndarray, ahead: int, seen: int) -> Array:
    """A kernel [width, ..], `ahead` of it later, as it is where the last of `seen` stands in for those beyond."""
    last = len(kernel) - 1 - ahead + seen
    return jnp.concatenate([kernel[:last], jnp.sum(kernel[last:], axis=0, keepdims=True)])


def context(x: Array, width: int, ahead: int, seen: int) -> Array:
    """[B, T, D] to [B, T, width D]: each frame with those around it, `ahead` of them later, zeros beyond the ends.

    The last of those that are `seen` stands in for later ones.
    """
    padded = jnp.pad(x, ((0, 0), (width - 1 - ahead, seen), (0, 0)))
    places = (min(i, width - 1 - ahead + seen) for i in range(width))
    return jnp.concatenate([padded[:, i : i + x.shape[1]] for i in places], axis=-1)
