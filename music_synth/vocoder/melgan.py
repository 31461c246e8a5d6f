"""MelGAN (Kumar et al. 2019): a generator from log-mel to waveform, and discriminators of waveforms at several scales.

Convolutions are sums of matrix products over shifted inputs: XLA's own are several times slower on CPUs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.audio.mel import HOP_LENGTH, NUM_MELS, scale_mel
from music_synth.errors import check_range

Array = jax.Array


def leaky(x: Array) -> Array:
    return nn.leaky_relu(x, 0.2)


def normalized(v: Array, scale: Array) -> Array:
    """scale * v / ||v||, the norm over all that feeds an output: [taps, C, D], [D] (Salimans and Kingma 2016)."""
    return v * (scale / (jnp.linalg.norm(v.reshape(-1, v.shape[-1]), axis=0) + 1e-9))[None, None]


class Conv(nn.Module):
    """Weight-normalized convolution with zeros at both ends: [B, T, C] to [B, T, D].

    `stride` folds that many steps into the channels before it convolves: [B, T, C] to [B, T / stride, D]. With
    `upsample` it is transposed: each step gives 2 * upsample steps, which overlap those of its neighbors by half:
    [B, T, C] to [B, T * upsample, D].
    """

    features: int
    width: int = 1
    dilation: int = 1
    stride: int = 1
    upsample: int = 1
    gain: float = 1.0  # of the initial scale

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.stride > 1:
            x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.stride), (0, 0)))
            x = x.reshape(x.shape[0], -1, self.stride * x.shape[2])
        batch, steps, channels = x.shape
        taps, outputs = (1, 2 * self.upsample) if self.upsample > 1 else (self.width, 1)
        shape = (taps, channels, outputs * self.features)
        v = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2), shape)
        scale = self.param("scale", lambda _, s: self.gain * jnp.linalg.norm(v.reshape(-1, s), axis=0), shape[2])
        bias = self.param("bias", nn.initializers.zeros, (self.features,))[None, None]
        kernel = normalized(v, scale)
        reach = self.dilation * (taps // 2)
        padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
        shifted = (padded[:, i * self.dilation : i * self.dilation + steps] for i in range(taps))
        y = functools.reduce(jnp.add, (part.reshape(-1, channels) @ kernel[i] for i, part in enumerate(shifted)))
        if self.upsample > 1:
            half = self.upsample // 2  # of a hop: where the outputs of a step begin before its own place
            y = y.reshape(batch, steps, 2, self.upsample, self.features)
            y = jnp.pad(y[:, :, 0], ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(
                y[:, :, 1], ((0, 0), (1, 0), (0, 0), (0, 0))
            )  # [B, T + 1, upsample, D]
            return y.reshape(batch, -1, self.features)[:, half : half + steps * self.upsample] + bias
        return y.reshape(batch, steps, self.features) + bias


class MelGANNetwork(nn.Module):
    config: MelGANGenerator

    @nn.compact
    def __call__(self, mel: Array, exists: Array) -> Array:
        c = self.config
        exists = exists[..., None].astype(jnp.float32)  # [B, T, 1]; what does not exist is 0 for every convolution
        width = c.channels
        x = Conv(width, 7, name="first")(scale_mel(mel) * exists) * exists
        for i, factor in enumerate(c.strides):
            width //= 2
            x = Conv(width, upsample=factor, name=f"upsample_{i}")(leaky(x))
            exists = jnp.repeat(exists, factor, axis=1)
            x = x * exists
            for j, dilation in enumerate(c.dilations):
                y = Conv(width, 3, dilation, name=f"residual_{i}_{j}_a")(leaky(x)) * exists
                y = Conv(width, name=f"residual_{i}_{j}_b")(leaky(y))
                x = (Conv(width, name=f"shortcut_{i}_{j}")(x) + y) * exists
        return (jnp.tanh(Conv(1, 7, gain=0.1, name="last")(leaky(x))) * exists)[..., 0]


@dataclass(frozen=True)
class MelGANGenerator:
    """Sizes of the network. The published one has 512 channels and strides (8, 8, 2, 2), for a hop of 256."""

    channels: int = 256  # at 50 frames a second; each upsampling halves them
    strides: tuple[int, ...] = (8, 8, 5)
    dilations: tuple[int, ...] = (1, 3, 9)  # of the residual layers after each upsampling

    def __post_init__(self):
        check_range(self, 1, 2**14, "channels")
        if max(len(self.strides), len(self.dilations)) > 16 or not all(0 < d <= 1000 for d in self.dilations):
            raise ValueError(f"{self}: at most 16 strides and dilations, of at most 1,000 samples")
        if math.prod(self.strides) != HOP_LENGTH:
            raise ValueError(f"MelGANGenerator.strides = {self.strides}: their product must be the hop, {HOP_LENGTH}")
        if self.channels % 2 ** len(self.strides):
            raise ValueError(
                f"MelGANGenerator.channels = {self.channels}: must divide by {2 ** len(self.strides)}, as each of"
                f" {len(self.strides)} upsamplings halves it"
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before and after on which a frame of audio depends."""
        reach, rate = 3.0, 1  # frames; steps a frame
        for factor in self.strides:
            reach += 1 / rate
            rate *= factor
            reach += sum(self.dilations) / rate
        return (math.ceil(reach + 3 / rate),) * 2

    @property
    def module(self) -> MelGANNetwork:
        return MelGANNetwork(self)

    source = takes_notes = False

    def as_played(self) -> MelGANGenerator:
        """Itself: it has no use for notes."""
        return self

    lead = 0

    def no_state(self, rows: int) -> tuple:
        """Nothing goes over from one stretch of a long mel to the next."""
        return ()

    def init(self, rng: Array):
        return self.module.init(rng, jnp.zeros((1, 8, NUM_MELS)), jnp.ones((1, 8), bool))["params"]

    def generate(
        self, params, mel: Array, exists: Array, first_frame: Array, source: Array | None = None
    ) -> tuple[Array, None]:
        """Audio [B, 320 T] for a loss; no spectra."""
        audio: Any = self.module.apply({"params": params}, mel, exists)
        return audio, None

    def play(
        self, params, mel: Array, exists: Array, first_frame: Array, source: None, state: tuple
    ) -> tuple[Array, tuple]:
        """Audio [B, 320 n] of log-mel [B, behind + n + ahead, M]; see `ISTFTGenerator.play`."""
        behind, ahead = self.reach
        audio, _ = self.generate(params, mel, exists, first_frame)
        return audio[:, behind * HOP_LENGTH : (mel.shape[1] - ahead) * HOP_LENGTH], state


class WaveDiscriminator(nn.Module):
    """Judges a waveform, [B, S]; returns its feature maps [B, t, d], the last of them the scores, [B, t, 1]."""

    channels: int
    num_layers: int

    @nn.compact
    def __call__(self, audio: Array) -> list[Array]:
        maps = [leaky(Conv(self.channels, 15, name="first")(audio[..., None]))]
        width = self.channels
        for i in range(self.num_layers):
            width = min(4 * width, 16 * self.channels)
            maps.append(leaky(Conv(width, 5, stride=4, name=f"layer_{i}")(maps[-1])))
        maps.append(leaky(Conv(width, 5, name="wide")(maps[-1])))
        return [*maps, Conv(1, 3, name="score")(maps[-1])]


class DiscriminatorNetwork(nn.Module):
    config: Discriminators

    @nn.compact
    def __call__(self, audio: Array) -> list[list[Array]]:
        judged = []
        for i in range(self.config.num_scales):
            judged.append(WaveDiscriminator(self.config.channels, self.config.num_layers, name=f"scale_{i}")(audio))
            audio = audio[:, : audio.shape[1] // 2 * 2].reshape(len(audio), -1, 2).mean(-1)  # half the rate
        return judged


@dataclass(frozen=True)
class Discriminators:
    """The same network at several sampling rates, each with weights of its own (Kumar et al. 2019, section 2.2)."""

    num_scales: int = 3  # at 16, 8 and 4 kHz
    channels: int = 8  # after the first convolution; four times as many after each layer, up to 16 times
    num_layers: int = 3  # each divides the rate by 4

    def __post_init__(self):
        check_range(self, 1, 16, "num_scales", "num_layers")
        check_range(self, 1, 2**12, "channels")

    @property
    def module(self) -> DiscriminatorNetwork:
        return DiscriminatorNetwork(self)
