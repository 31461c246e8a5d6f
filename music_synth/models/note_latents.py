"""What each note leaves open, in a few numbers a note: how loud, how bright and how long it came out.

Much of what notes and context do not tell of a mel belongs to single notes. So each note gets latents, standard normal
and independent, that color its spectra in the note roll (`NoteRoll`); the prior, and noise for what is then left, build
on that. In training they are inferred from the recording, by a network that sees where it differs from the mean of
latents 0 (a conditional variational autoencoder: Kingma and Welling 2014; Sohn et al. 2015). To sample, they are drawn;
0 plays the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.models.layers import Dense, NetworkConfig
from music_synth.models.note_roll import Roll

Array = jax.Array
HEARD_THROUGH = (0, 1, 3, 6)  # envelopes: as long as it sounds, two that decay (2 and 32 frames), one after the offset
BANDS = 32  # that the bins of a mel are taken together to
MIN_WEIGHT = 0.1  # frames' worth of a band that is the note's alone, below which it tells little
MIN_LOG_DEVIATION = -4.0  # of what is inferred


class Posterior(NamedTuple):
    """What a recording tells of the latents of each note, a Gaussian; [B, N, L] each. Standard normal: nothing."""

    mean: Array
    log_deviation: Array

    def information(self) -> Array:
        """[B, N]: nats that it knows beyond the standard normal, its Kullback-Leibler divergence from it."""
        variance = jnp.exp(2.0 * self.log_deviation)
        return 0.5 * jnp.sum(jnp.square(self.mean) + variance - 1.0 - 2.0 * self.log_deviation, axis=-1)

    def sample(self, noise: Array) -> Array:
        return self.mean + jnp.exp(self.log_deviation) * noise


class NotePosterior(nn.Module):
    """Encoded notes [B, N, D], the roll of latents 0 and the error of its mean [B, T, M], mask [B, T] -> `Posterior`.

    The error is that of the mean, not of the roll: what the prior corrects in every recording tells nothing of one.
    """

    config: NetworkConfig

    @nn.compact
    def __call__(self, encoded: Array, is_note: Array, roll: Roll, error: Array, mask: Array) -> Posterior:
        error, weight = heard(*jax.lax.stop_gradient((roll, error)), mask)
        features = jnp.concatenate([encoded.astype(jnp.float32), 8.0 * error, jnp.log1p(weight)], axis=-1)
        x = nn.gelu(Dense(self.config.model_dim, ("embed", "mlp"), name="wi")(features))
        x = nn.gelu(Dense(self.config.model_dim, ("embed", "mlp"), name="wh")(x))
        small = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        out = Dense(2 * self.config.note_latents, ("mlp", "embed"), init=small, name="wo")(x)
        told = is_note & jnp.any(mask, axis=1, keepdims=True)
        mean, raw = jnp.split(jnp.where(told[..., None], out, 0.0), 2, axis=-1)
        return Posterior(mean, jnp.clip(raw, MIN_LOG_DEVIATION, 1.0))


def heard(roll: Roll, error: Array, mask: Array) -> tuple[Array, Array]:
    """The error [B, T, M] as far as each note is what is heard there, and how far that is; both [B, N, E' * BANDS].

    The first is its mean, in the model's range, weighted by the note's share of each bin's magnitude through
    some of its envelopes; the second is those weights' sum, in frames.
    """
    chosen = jnp.asarray(HEARD_THROUGH)
    weights = jnp.where(mask[:, :, None, None], roll.weights[:, :, chosen], 0.0)  # [B, T, E', N]
    inverse = 1.0 / roll.magnitude
    rows, count, bins = len(error), weights.shape[3], error.shape[2]

    def pooled(values: Array) -> Array:  # [B, T, M] -> [B, N, E' * BANDS]
        of_notes = jnp.einsum("bten,btm->benm", weights, values * inverse) * roll.spectra[:, chosen]
        bands = jnp.sum(of_notes.reshape(rows, len(chosen), count, BANDS, bins // BANDS), axis=-1)
        return jnp.moveaxis(bands, 1, 2).reshape(rows, count, -1)

    weight = pooled(jnp.ones_like(error))
    return pooled(error) / (weight + MIN_WEIGHT), weight
