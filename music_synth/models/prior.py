"""The prior: what notes and context tell of a mel, and how much of it they leave open.

Each bin of each frame gets a mean and a deviation. What remains, the residual, is normalized by the deviations and then
whitened by the covariance of a frame's bins, so that it has about unit variance in all directions and is as large as a
bin is uncertain: that is what a generative decoder models (`SpectrogramModel.to_residual`).

From frame to frame it lasts, longest while notes do. So each bin also gets a persistence, its correlation with the
frame before, and noise of that correlation takes the place of white noise (`Prior.lasting`): what a decoder has not
learned then comes out as a Gaussian process that follows the notes, and not as flicker.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.models.convolution import blocks, conv_dim
from music_synth.models.layers import Dense, NetworkConfig, RMSNorm, partitioned

Array = jax.Array
CONTEXT_FRAMES = 32  # that the blocks read before the segment: as far as they reach
MIN_LOG_DEVIATION, MAX_LOG_DEVIATION = -5.0, -0.7  # of the model's range: 0.5 to 33 dB
MAX_PERSISTENCE = 0.97  # over 33 frames, 0.7 s
MIN_VARIANCE = 0.01  # of a direction of the normalized residual


class Prior(NamedTuple):
    """What the notes and the context tell of a segment; [B, T, ...] each."""

    mean: Array  # [B, T, M], in the model's range
    log_deviation: Array  # [B, T, M]
    persistence: Array  # [B, T, M] in [0, 1), correlation with the frame before; 0 in the first frame
    features: Array  # [B, T, W], what else the network found

    def conditioning(self) -> Array:
        """What a decoder reads of it, [B, T, 3 M + W] in numbers of about unit size; no gradient goes back."""
        parts = (2.0 * self.mean + 1.0, self.log_deviation + 3.0, self.persistence, self.features)
        return jax.lax.stop_gradient(jnp.concatenate(parts, axis=-1))

    def normalized(self, x_0: Array) -> Array:
        """x_0 [B, T, M] -> its residual over its deviations; no gradient for the mean."""
        return (x_0 - jax.lax.stop_gradient(self.mean)) * jnp.exp(-self.log_deviation)

    def lasting(self, noise: Array) -> Array:
        """White noise [B, T, M] of unit variance -> a process of first order, of unit variance and this persistence."""
        frames = noise.shape[1]

        def earlier(x: Array, count: int) -> Array:
            return jnp.pad(x, ((0, 0), (count, 0), (0, 0)))[:, :frames]

        x, left = jnp.sqrt(1.0 - jnp.square(self.persistence)) * noise, self.persistence
        for count in (1 << i for i in range((frames - 1).bit_length())):
            # x has what the last `count` frames bring, `left` says what is left of a frame after so many (Hillis and
            # Steele 1986): it compiles in half the time of `jax.lax.associative_scan`.
            x, left = x + left * earlier(x, count), left * earlier(left, count)
        return x


class PriorNetwork(nn.Module):
    """Note roll and context -> `Prior`. Convolutional, over the last frames of the context and those of the segment."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, roll: Array, context: Array | None, context_mask: Any, deterministic: bool) -> Prior:
        """roll [B, T, M]; context [B, C, M] scaled, its mask [B, C] True on leading frames."""
        c, width = self.config, conv_dim(self.config)
        self.param("covariance", partitioned(lambda rng, shape: jnp.eye(shape[0]), "mel", None), (c.num_mels,) * 2)
        x, skipped = Dense(width, ("mel", "embed"), name="roll_projection")(roll), 0
        if context is not None:
            last, known = last_frames(context + 1.0, context_mask, min(CONTEXT_FRAMES, c.context_frames))
            last = jnp.concatenate([jnp.where(known, last, 0.0), known.astype(last.dtype)], axis=-1)
            before = Dense(width, ("mel", "embed"), name="context_projection")(last)
            x, skipped = jnp.concatenate([before, x], axis=1), before.shape[1]
        x = x.astype(c.dtype)
        for block in blocks(c, c.num_prior_layers):
            x = block(x, None, deterministic)
        features = RMSNorm(name="output_norm")(x[:, skipped:]).astype(jnp.float32)
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        correction = Dense(c.num_mels, ("embed", "mel"), init=small, name="mean")(features)
        raw = Dense(c.num_mels, ("embed", "mel"), init=small, name="log_deviation")(features)
        log_deviation = jnp.clip(raw - 2.5, MIN_LOG_DEVIATION, MAX_LOG_DEVIATION)
        raw = Dense(c.num_mels, ("embed", "mel"), init=small, name="persistence")(features)
        persistence = (MAX_PERSISTENCE * nn.sigmoid(raw)).at[:, 0].set(0.0)
        return Prior(roll - 1.0 + correction, log_deviation, persistence, features)  # a roll of 0 is silence, -1


def last_frames(frames: Array, mask: Array, count: int) -> tuple[Array, Array]:
    """The last `count` valid frames [B, count, M], in order, and which of them there are [B, count, 1].

    mask [B, C] is True on leading frames, docs/spec.md 3.14.3.
    """
    valid = jnp.sum(mask, axis=1, dtype=jnp.int32)
    index = valid[:, None] - count + jnp.arange(count)[None]  # [B, count]
    taken = jnp.take_along_axis(frames, jnp.maximum(index, 0)[:, :, None], axis=1)
    return taken, (index >= 0)[:, :, None]


def whitening(covariance: Array) -> tuple[Array, Array]:
    """Covariance [M, M] -> the symmetric roots of its inverse and of itself, which whiten and color frames [..., M].

    Symmetric, so that a direction keeps its place: principal axes may swap when the covariance moves a little, and what
    has learned to denoise along them would have to learn anew. Diffusion is the same along either, as noise is round.
    """
    variances, axes = jnp.linalg.eigh(covariance)
    deviations = jnp.sqrt(jnp.maximum(variances, MIN_VARIANCE))
    return (axes / deviations[None]) @ axes.T, (axes * deviations[None]) @ axes.T
