"""Output distributions of the autoregressive decoder: what its channels mean (docs/spec.md 3.18.4-5)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.errors import check_range

Array = jax.Array


@dataclass(frozen=True)
class Deterministic:
    """The channels are the frame; squared error. `dither`: standard deviation of noise added to samples."""

    dither: float = 0.0

    def __post_init__(self):
        if self.dither < 0:
            raise ValueError(f"Deterministic.dither = {self.dither}: must be 0 or more")

    def num_channels(self, dims: int) -> int:
        """Counts the decoder channels needed for frames of `dims` bins."""
        return dims

    def loss(self, channels: Array, target: Array) -> Array:
        """Computes the loss of each frame [...] from channels [..., num_channels] and target [..., dims]."""
        return jnp.mean(jnp.square(channels - target), axis=-1)

    def sample(self, channels: Array, rng: Array) -> Array:
        """Draws a frame [..., dims] from channels [..., num_channels]."""
        return channels + self.dither * jax.random.normal(rng, channels.shape) if self.dither else channels


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of diagonal Gaussians: channels are [mixture logits | means | raw deviations].

    Deviations are 0.1 + 0.9 sigmoid(raw). `temperature` scales them when sampling; 0 plays the component's mean.
    """

    num_components: int = 4
    temperature: float = 1.0

    def __post_init__(self):
        check_range(self, 1, 1024, "num_components")
        if self.temperature < 0:
            raise ValueError(f"{self}: needs a temperature of 0 or more")

    def num_channels(self, dims: int) -> int:
        return self.num_components * (1 + 2 * dims)

    def split(self, channels: Array) -> tuple[Array, Array, Array]:
        """Splits channels into log weights [..., components], means and deviations [..., components, dims]."""
        k = self.num_components
        dims = (channels.shape[-1] // k - 1) // 2
        logits, means, raw = jnp.split(channels, (k, k + k * dims), axis=-1)
        shape = (*channels.shape[:-1], k, dims)
        deviations = 0.1 + 0.9 * jax.nn.sigmoid(raw)
        return jax.nn.log_softmax(logits), means.reshape(shape), deviations.reshape(shape)

    def loss(self, channels: Array, target: Array) -> Array:
        """Computes the negative log likelihood of each frame."""
        log_weights, means, deviations = self.split(channels)
        z = (target[..., None, :] - means) / deviations
        log_density = -0.5 * jnp.square(z) - jnp.log(deviations) - 0.5 * np.log(2 * np.pi)
        return -jax.nn.logsumexp(log_weights + jnp.sum(log_density, axis=-1), axis=-1)

    def sample(self, channels: Array, rng: Array) -> Array:
        component_key, noise_key = jax.random.split(rng)
        log_weights, means, deviations = self.split(channels)
        component = jax.random.categorical(component_key, log_weights)[..., None, None]
        mean, deviation = (jnp.take_along_axis(a, component, axis=-2)[..., 0, :] for a in (means, deviations))
        return mean + self.temperature * deviation * jax.random.normal(noise_key, mean.shape)
