"""Discriminators of spectrograms at several resolutions, small enough to train on a CPU.

The field's judges for generators that write spectra (Jang et al. 2021, UnivNet; Siuzdak 2023, Vocos; Lee et al. 2023,
BigVGAN-v2): 2-D convolutions over log-magnitude spectrograms of windows of several sizes. Here each convolution has a
stride in frequency of its own width and sees three frames, so that it is a product of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.vocoder.melgan import leaky, normalized
from music_synth.vocoder.stft import magnitude, stft

Array = jax.Array
FLOOR = 1e-3  # magnitude that counts as silence in the logarithm


class FoldedConv(nn.Module):
    """Weight-normalized: [B, T, F, C] to [B, T, F / fold, D]; an output sees three frames and `fold` bins."""

    features: int
    fold: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, steps, bins, channels = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (0, -bins % self.fold), (0, 0)))
        x = x.reshape(batch, steps + 2, -1, self.fold * channels)
        v = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1)), (3, self.fold * channels, self.features))
        scale = self.param("scale", lambda _, size: jnp.linalg.norm(v.reshape(-1, size), axis=0), self.features)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = normalized(v, scale)
        y = sum(x[:, i : i + steps].reshape(-1, x.shape[-1]) @ kernel[i] for i in range(3))
        return (y + bias[None]).reshape(batch, steps, -1, self.features)


class SpectrogramDiscriminator(nn.Module):
    """Judges one resolution, audio [B, S]: feature maps [B, T, F, D], the last of them the scores, D = 1."""

    channels: int
    window: int

    @nn.compact
    def __call__(self, audio: Array) -> list[Array]:
        size = magnitude(stft(audio, self.window, self.window // 4), 1e-5)
        x = jnp.log(size + FLOOR)[..., :-1, None]  # [B, T, F, 1]: without the bin at 8 kHz, F is a power of two
        maps: list[Array] = []
        for i, (factor, fold) in enumerate(((1, 8), (2, 4), (2, 2))):
            maps.append(leaky(FoldedConv(factor * self.channels, fold, name=f"layer_{i}")(maps[-1] if maps else x)))
        return [*maps, FoldedConv(1, 1, name="score")(maps[-1])]


class SpectrogramDiscriminatorNetwork(nn.Module):
    config: SpectrogramDiscriminators

    @nn.compact
    def __call__(self, audio: Array) -> list[list[Array]]:
        sizes = self.config.channels, self.config.windows
        return [SpectrogramDiscriminator(sizes[0], window, name=f"window_{window}")(audio) for window in sizes[1]]


@dataclass(frozen=True)
class SpectrogramDiscriminators:
    """The same network over windows of several sizes, each with weights of its own; hops are a quarter of them."""

    channels: int = 16  # after the first convolution; then twice as many
    windows: tuple[int, ...] = (2048, 1024, 512)  # samples

    @property
    def module(self) -> SpectrogramDiscriminatorNetwork:
        return SpectrogramDiscriminatorNetwork(self)
