"""Convolutional blocks over mel frames, and the decoder made of them.

A frame depends on what sounds near it; what is far away, the note roll and the prior have brought near. So blocks of a
depthwise convolution over frames and an MLP in each frame (ConvNeXt, Liu et al. 2022) take the place of attention.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.models.layers import Dense, NetworkConfig, RMSNorm, modulate, partitioned

Array = jax.Array
KERNEL_FRAMES = 7
DILATIONS = (1, 2, 4)  # of one block after the other, and again
EXPANSION = 3  # width of an MLP over that of its block
TIME_WAVES = 16  # cosines that tell the noise time


def conv_dim(config: NetworkConfig) -> int:
    """Channels of a block: twice the width of the transformers, at which a block costs what a layer of theirs does."""
    return 2 * config.model_dim


class DepthwiseConv(nn.Module):
    """Each channel of [B, T, D] filtered over frames by seven taps of its own, `dilation` frames apart."""

    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = partitioned(nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"), "tap", "embed")
        taps = self.param("taps", init, (KERNEL_FRAMES, x.shape[-1])).astype(x.dtype)
        reach, frames = self.dilation * (KERNEL_FRAMES // 2), x.shape[1]
        padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
        # Seven shifted products: XLA's grouped convolution is many times slower on CPUs.
        shifted = (padded[:, i * self.dilation : i * self.dilation + frames] for i in range(KERNEL_FRAMES))
        return sum(part * tap[None, None] for part, tap in zip(shifted, taps, strict=True))


class ConvBlock(nn.Module):
    """x + scale * MLP(norm(convolution(x))), the norm modulated by the noise time where there is one (FiLM)."""

    config: NetworkConfig
    dilation: int
    scale: float  # of what the block adds, at the start

    @nn.compact
    def __call__(self, x: Array, film: Array | None, deterministic: bool) -> Array:
        """x [B, T, W]; film [B or 1, 2 W]."""
        width, dtype = x.shape[-1], jnp.dtype(self.config.dtype)
        y = RMSNorm(name="norm")(DepthwiseConv(self.dilation, name="conv")(x))
        y = y if film is None else modulate(y, film)
        y = nn.gelu(Dense(EXPANSION * width, ("embed", "mlp"), dtype, name="wi")(y), approximate=True)
        y = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(y, deterministic=deterministic)
        y = Dense(width, ("mlp", "embed"), dtype, name="wo")(y)
        scale = self.param("scale", partitioned(nn.initializers.constant(self.scale), "embed"), (width,))
        return x + y * jnp.broadcast_to(scale.astype(y.dtype), y.shape)


def blocks(config: NetworkConfig, count: int) -> list[ConvBlock]:
    dilations = [DILATIONS[i % len(DILATIONS)] for i in range(count)]
    block = nn.remat(ConvBlock, static_argnums=(3,)) if config.remat else ConvBlock
    return [block(config, dilation, count**-0.5, name=f"layers_{i}") for i, dilation in enumerate(dilations)]


class ConvDecoder(nn.Module):
    """Mel frames in, mel frames out, modulated by the noise time, beside what the prior says of each frame.

    Has the methods of `transformer.MelDecoder`; of the cache it reads the prior alone.
    """

    config: NetworkConfig
    output_dim: int

    def setup(self):
        c = self.config
        width = conv_dim(c)
        self.input_projection = Dense(width, ("mel", "embed"))
        self.prior_projection = Dense(width, ("mel", "embed"))
        self.time_dense_0 = Dense(width, ("embed", "mlp"))
        zeros = nn.initializers.zeros_init()
        self.time_dense_1 = Dense(c.num_decoder_layers * 2 * width, ("mlp", "embed"), init=zeros)
        self.stack = blocks(c, c.num_decoder_layers)
        self.output_norm = RMSNorm()
        self.output_projection = Dense(self.output_dim, ("embed", "mel"), init=zeros)  # of whitened data the best start

    def condition_time(self, t: Array) -> Array:
        """Noise times t [S] in [0, 1] -> the modulation of all blocks [S, blocks, 2 W], in one batched call."""
        waves = jnp.cos(t[:, None] * (np.pi * np.arange(TIME_WAVES, dtype=np.float32))[None])
        film = self.time_dense_1(nn.swish(self.time_dense_0(waves)))
        return film.reshape(len(t), self.config.num_decoder_layers, -1)

    def __call__(self, x: Array, film: Array, cache, deterministic: bool) -> Array:
        """x [B, T, M] -> [B, T, output_dim] float32; film [B or 1, blocks, 2 W] from `condition_time`."""
        x = self.input_projection(x) + self.prior_projection(cache.prior.conditioning())
        x = x.astype(self.config.dtype)
        for i, block in enumerate(self.stack):
            x = block(x, film[:, i], deterministic)
        return self.output_projection(self.output_norm(x).astype(jnp.float32))
