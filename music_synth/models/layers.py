"""Transformer blocks shared by the encoders and both decoders (T5.1.1 style, docs/spec.md 3.13).

Pre-norm residual blocks without biases. Kernels are 2-D, [inputs, outputs], with heads folded into the
outputs, and carry logical axis names that `training/partitioning.py` maps to a device mesh. Activations are in
`config.dtype`; parameters, norms and softmax stay in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import NUM_MELS
from music_synth.errors import check_range
from music_synth.midi.vocabulary import Vocabulary

Array = jax.Array
MASKED_LOGIT = -1e10
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the three networks. Defaults are small; `configs/models/` has the sizes that recipes train."""

    vocab_size: int = 1536  # rows of the token embedding: the vocabulary rounded up to a multiple of 128
    model_dim: int = 128  # D
    num_heads: int = 4  # H
    head_dim: int = 32  # K; H * K need not equal D
    mlp_dim: int = 256  # F
    num_encoder_layers: int = 3  # each of the note and the context encoder
    num_decoder_layers: int = 3
    num_mels: int = 128  # M
    max_tokens: int = 2048  # rows of the note encoder's position table
    target_frames: int = 256  # T, 5.12 s
    context_frames: int = 256  # C; 0 = no context encoder
    dropout_rate: float = 0.1
    dtype: str = "float32"  # of activations, one of DTYPES
    attention: str = "auto"  # "einsum", or cuDNN's fused kernel where it can be (`attend`)
    remat: bool = False  # recompute each layer in the backward pass: less memory, a third more work
    scan_layers: bool = False  # one compiled layer for all: compiles faster, parameters stacked on axis 0
    context_positions: str = "terminal_relative"  # or "regular": position ids of the context, 3.14.2
    cross_attention: str = "concat"  # or "sum": one attention over tokens and context together, or one each
    note_roll: bool = False  # let the decoder start from `note_roll.NoteRoll`; False: as published
    roll_harmonics: int = 0  # of each note, that the note roll gives learned magnitudes beside a free spectrum
    roll_table: bool = False  # each pitch of each program, and each drum, has an embedding of its own in the note roll
    vocabulary: Vocabulary = field(default_factory=Vocabulary)  # of the tokens that the note roll reads
    num_prior_layers: int = 0  # of `prior.PriorNetwork` on the note roll; 0: no prior, as published
    note_latents: int = 0  # numbers that a note leaves open (`note_latents`), which need a prior; 0: none
    decoder: str = "transformer"  # or "convolutional", which needs a prior
    max_noise_time: float = 20000.0  # t in [0, 1] is stretched by this before its sinusoids

    def __post_init__(self):
        # Most are far beyond what anybody trains: a file with more is in error, or meant to fill the memory.
        check_range(self, 1, 512, "num_encoder_layers", "num_decoder_layers")
        check_range(self, 1, 2**14, "model_dim", "num_heads", "head_dim", "num_mels")
        check_range(self, 1, 2**17, "vocab_size", "mlp_dim", "max_tokens", "target_frames")
        if max(self.max_tokens, self.target_frames, self.context_frames) * self.model_dim > 2**27:
            raise ValueError(f"{self}: its tables of positions are too large")
        if self.context_frames < 0:
            raise ValueError(f"NetworkConfig.context_frames = {self.context_frames}: 0 (none) or more")
        if self.model_dim % 2 or self.model_dim < 4:
            raise ValueError(f"NetworkConfig.model_dim = {self.model_dim}: sinusoids need an even width >= 4")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"NetworkConfig.dropout_rate = {self.dropout_rate}: must be in [0, 1)")
        for name, choices in (
            ("dtype", DTYPES),
            ("attention", ("auto", "einsum")),
            ("context_positions", ("terminal_relative", "regular")),
            ("cross_attention", ("concat", "sum")),
            ("decoder", ("transformer", "convolutional")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"NetworkConfig.{name} = {getattr(self, name)!r}: choose from {choices}")
        check_range(self, 0, 512, "num_prior_layers", "roll_harmonics", "note_latents")
        if (self.roll_harmonics or self.note_latents) and self.num_mels != NUM_MELS:
            raise ValueError(f"NetworkConfig.num_mels = {self.num_mels}: harmonics and latents are of {NUM_MELS}")
        if self.num_prior_layers and not self.note_roll:
            raise ValueError(f"NetworkConfig.num_prior_layers = {self.num_prior_layers}: needs note_roll = True")
        if self.note_latents and not self.num_prior_layers:
            raise ValueError(f"NetworkConfig.note_latents = {self.note_latents}: needs num_prior_layers of at least 1")
        if self.decoder == "convolutional" and not self.num_prior_layers:
            raise ValueError("NetworkConfig.decoder = 'convolutional': needs num_prior_layers of at least 1")


def partitioned(init, *axes: str | None):
    return nn.with_logical_partitioning(init, axes)


def sinusoid_table(length: int, dim: int) -> np.ndarray:
    """Fixed positions [length, dim]: sines in the first half, cosines in the second (3.13.7)."""
    frequencies = 10000.0 ** (-np.arange(dim // 2) / max(dim // 2 - 1, 1))
    angles = np.arange(length)[:, None] * frequencies  # [length, dim / 2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def permuted_offset_init(rng: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Sinusoids with a random phase in each of the `dim` columns, columns shuffled (3.13.6)."""
    length, dim = shape
    phase_key, order_key = jax.random.split(rng)
    frequencies = np.tile(10000.0 ** (-np.arange(dim // 2) / max(dim // 2 - 1, 1)), 2).astype(np.float32)
    phases = jax.random.uniform(phase_key, (dim,), maxval=2 * np.pi)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None] + phases[None]
    half = jnp.arange(dim)[None] < dim // 2
    table = jnp.where(half, jnp.sin(angles), jnp.cos(angles))
    return jax.random.permutation(order_key, table, axis=1, independent=False).astype(dtype)


class PositionTable(nn.Module):
    """A [length, D] table of fixed sinusoids kept as a parameter: no gradient, but it travels in checkpoints."""

    length: int
    dim: int

    @nn.compact
    def __call__(self) -> Array:  # [length, D]
        init = partitioned(permuted_offset_init, "length", "embed")
        return jax.lax.stop_gradient(self.param("embedding", init, (self.length, self.dim)))


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + 1e-6) * scale, computed in float32 (Zhang and Sennrich 2019)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "embed"), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class Dense(nn.Module):
    """x @ kernel, no bias. `axes` are the logical names of the kernel's two axes."""

    features: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    init: Any = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", partitioned(self.init, *self.axes), (x.shape[-1], self.features))
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])  # of matrices: XLA's gradient is faster on CPUs
        return (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)


def length_dropout(rate: float) -> nn.Dropout:
    """Dropout whose mask is shared along the length axis of [B, length, features]."""
    return nn.Dropout(rate, broadcast_dims=(-2,))


def has_fused_attention(device: Any) -> bool:
    """Whether cuDNN's attention runs on a device: NVIDIA's, of compute capability 8.0 (Ampere) or more."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:  # ROCm's are "gpu" too
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= (8, 0)


def attend(query: Array, keys: Array, values: Array, mask: Array | None, implementation: str) -> Array:
    """Softmax attention without a scale: from [B, Q, H, K] to [B, L, H, K] each, [B, Q, H, K].

    `mask` as for `Attention`. With "auto", bfloat16 on an NVIDIA GPU (`has_fused_attention`) goes through cuDNN's fused
    kernel, which never writes the weights to memory. All else is two einsums: on CPUs jax.nn.dot_product_attention is
    the same two.
    """
    num_queries, head_dim = query.shape[1], query.shape[3]
    fits = query.dtype == jnp.bfloat16 and num_queries > 1 and head_dim % 8 == 0 and head_dim <= 128
    if implementation == "auto" and fits and has_fused_attention(jax.devices()[0]):
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], num_queries, keys.shape[1]))
        return jax.nn.dot_product_attention(query, keys, values, mask=mask, scale=1.0, implementation="cudnn")
    logits = jnp.einsum("bqhk,blhk->bhql", query, keys).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)  # [B, H, Q, L]
    return jnp.einsum("bhql,blhk->bqhk", weights, values)


class Attention(nn.Module):
    """Multi-head attention without a run-time 1/sqrt(K): the query initializer holds it (3.13.2).

    Keys and values come from `keys_values`, apart from the attending itself, so that they can be computed once
    a segment (cross-attention) or appended to a cache (autoregressive decoding).
    """

    config: NetworkConfig

    def setup(self):
        c = self.config
        width, dtype = c.num_heads * c.head_dim, jnp.dtype(c.dtype)
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        query = nn.initializers.variance_scaling(1.0 / c.head_dim, "fan_in", "normal")
        self.query = Dense(width, ("embed", "joined_kv"), dtype, query)
        self.key = Dense(width, ("embed", "joined_kv"), dtype, normal)
        self.value = Dense(width, ("embed", "joined_kv"), dtype, normal)
        self.out = Dense(c.model_dim, ("joined_kv", "embed"), dtype, normal)
        self.weight_dropout = length_dropout(c.dropout_rate)  # one mask for all queries

    def _split(self, x: Array) -> Array:  # [B, L, H*K] -> [B, L, H, K]
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """[B, L, D] -> keys and values, each [B, L, H, K]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def __call__(self, x: Array, keys_values, mask: Array | None, deterministic: bool) -> Array:
        """Attends from x [B, Q, D] to keys and values [B, L, H, K].

        `mask` is True where a key may be seen, broadcastable to [B, H, Q, L]; a row without any key averages all.
        """
        keys, values = keys_values
        if not deterministic:  # the weight of a key is the same for all queries, so it can as well go to its value
            rows, length, heads, _ = values.shape
            kept = self.weight_dropout(jnp.ones((rows, heads, 1, length), values.dtype), deterministic=False)
            values = values * jnp.broadcast_to(jnp.moveaxis(kept, -1, 1), values.shape)
        y = attend(self._split(self.query(x)), keys, values, mask, self.config.attention)
        return self.out(y.reshape(*y.shape[:-2], -1))  # [B, Q, D]


class GatedMLP(nn.Module):
    """gelu(x W0) * (x W1), then Wo (GEGLU, Shazeer 2020; tanh approximation of gelu)."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        gate = nn.gelu(Dense(c.mlp_dim, ("embed", "mlp"), dtype, name="wi_0")(x), approximate=True)
        hidden = gate * Dense(c.mlp_dim, ("embed", "mlp"), dtype, name="wi_1")(x)  # [B, L, F]
        hidden = length_dropout(c.dropout_rate)(hidden, deterministic=deterministic)
        return Dense(c.model_dim, ("mlp", "embed"), dtype, name="wo")(hidden)


class FiLMLayer(nn.Module):
    """Feature-wise modulation (Perez et al. 2018): one dense map of the time vector to scale and shift."""

    config: NetworkConfig

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.DenseGeneral_0 = Dense(2 * self.config.model_dim, ("mlp", "embed"), dtype)

    def __call__(self, time_vector: Array) -> Array:  # [..., 4D] -> [..., 2D]: scale, then shift
        return self.DenseGeneral_0(time_vector)


def modulate(x: Array, film: Array) -> Array:
    """x (1 + scale) + shift; x [B, T, D], film [B or 1, 2D]."""
    scale, shift = jnp.split(film[:, None, :], 2, axis=-1)
    return x * (jnp.broadcast_to(scale, x.shape) + 1) + jnp.broadcast_to(shift, x.shape)


class EncoderLayer(nn.Module):
    """Self-attention and MLP over a padded sequence."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, deterministic: bool) -> tuple[Array, None]:
        """x [B, L, D]; mask [B, 1, 1, L], True = a real position. Returns (x, None), as a scan wants it."""
        dropout = length_dropout(self.config.dropout_rate)
        attention = Attention(self.config, name="attention")
        y = RMSNorm(name="pre_attention_layer_norm")(x)
        y = attention(y, attention.keys_values(y), mask, deterministic)
        x = x + dropout(y, deterministic=deterministic)
        y = GatedMLP(self.config, name="mlp")(RMSNorm(name="pre_mlp_layer_norm")(x), deterministic)
        return x + dropout(y, deterministic=deterministic), None


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to precomputed keys and values, MLP; FiLM where there is a noise time."""

    config: NetworkConfig
    autoregressive: bool
    attend_to_padding: bool = False

    def setup(self):
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm()
        self.self_attention = Attention(c)
        self.pre_cross_attention_layer_norm = RMSNorm()
        self.cross_attentions = [Attention(c, name=name) for name in self._cross_names()]
        self.pre_mlp_layer_norm = RMSNorm()
        self.mlp = GatedMLP(c)
        self.dropout = length_dropout(c.dropout_rate)
        if not self.autoregressive:
            self.FiLMLayer_0, self.FiLMLayer_1 = FiLMLayer(c), FiLMLayer(c)

    def _cross_names(self) -> list[str]:
        count = 2 if self.config.cross_attention == "sum" and self.config.context_frames else 1
        if self.autoregressive:
            return ["encoder_decoder_attention", "context_decoder_attention"][:count]
        return [f"MultiHeadDotProductAttention_{i}" for i in range(count)]

    def precompute(self, carry: None, sources: tuple[Array, ...]):
        """Cross-attention keys and values of each encoded source [B, L, D]; (None, ys), as a scan wants it."""
        return carry, tuple(a.keys_values(s) for a, s in zip(self.cross_attentions, sources, strict=True))

    def film(self, carry: None, time_vector: Array):
        """Time vector [..., 4D] -> modulation of the layer's two norms [..., 2, 2D]."""
        return carry, jnp.stack([self.FiLMLayer_0(time_vector), self.FiLMLayer_1(time_vector)], axis=-2)

    def _cross_attend(self, x: Array, cross, masks: tuple[Array, ...], deterministic: bool) -> Array:
        """Sum over sources; rows without a single visible key get zero, which is what "unconditional" means.

        Rows of x beyond those of the sources are unconditional by construction and cost nothing (guidance).
        """
        rows = masks[0].shape[0]
        normed, total = self.pre_cross_attention_layer_norm(x[:rows]), jnp.zeros_like(x[:rows])
        for attention, keys_values, mask in zip(self.cross_attentions, cross, masks, strict=True):
            y = attention(normed, keys_values, mask[:, None, None, :], deterministic)
            if not self.attend_to_padding:
                y = y * jnp.any(mask, axis=-1)[:, None, None].astype(y.dtype)
            total = total + y
        return jnp.concatenate([total, jnp.zeros_like(x[rows:])]) if len(x) > rows else total

    def _after_self_attention(self, x, y, film, cross, masks, deterministic):
        x = x + self.dropout(y, deterministic=deterministic)
        y = self._cross_attend(x, cross, masks, deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.pre_mlp_layer_norm(x)
        y = y if film is None else modulate(y, film[:, 1])
        return x + self.dropout(self.mlp(y, deterministic), deterministic=deterministic)

    def __call__(self, x: Array, film: Array | None, cross, masks, mask: Array | None, deterministic: bool):
        """x [B, T, D] -> (x, None). film [B or 1, 2, 2D]; mask [1, 1, T, T] or None for full self-attention."""
        y = self.pre_self_attention_layer_norm(x)
        y = y if film is None else modulate(y, film[:, 0])
        y = self.self_attention(y, self.self_attention.keys_values(y), mask, deterministic)
        return self._after_self_attention(x, y, film, cross, masks, deterministic), None

    def step(self, x: Array, cross, cache: tuple[Array, Array], masks, index: Array):
        """One frame x [B, 1, D] at position `index`, with cached keys and values [B, T, H, K] each.

        Returns (x, cache with this frame's keys and values written at `index`).
        """
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.keys_values(y)  # [B, 1, H, K] each
        keys, values = (jax.lax.dynamic_update_slice_in_dim(c, n, index, 1) for c, n in zip(cache, new, strict=True))
        cache = keys, values
        seen = (jnp.arange(cache[0].shape[1]) <= index)[None, None, None, :]
        y = self.self_attention(y, cache, seen, True)
        return self._after_self_attention(x, y, None, cross, masks, True), cache
