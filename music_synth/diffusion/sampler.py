"""Samplers: functions of a denoiser that walk x_t from noise (t = 1) to data (t = 0).

`denoise_fn(x_t, log_snr_t, conditioning_t) -> x_0` is all they know of the network. Steps are uniform in t:
t = (i + 1) / num_steps to s = i / num_steps for i = num_steps - 1 ... 0; the last step returns x_0 itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from music_synth.diffusion.process import eps_from_x_0
from music_synth.diffusion.schedule import Schedule, alpha, sigma

Array = jax.Array


@dataclass(frozen=True)
class Sampler:
    """How to sample. `variance` belongs to "ddpm": "large", "small" or "medium:f" with f in [0, 1]."""

    name: str = "ddim"
    num_steps: int = 20
    guidance_scale: float = 1.0  # 1 = none; the published models train for 5 and play at 2
    variance: str = "large"
    clip_x_0: bool = True  # to [-1, 1], the range of scaled mels

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"Sampler.name = {self.name!r}: choose from {sorted(SAMPLERS)}")
        if self.num_steps < 1:
            raise ValueError(f"Sampler.num_steps = {self.num_steps}: must be at least 1")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"Sampler.guidance_scale = {self.guidance_scale}: must be 0 or more, and finite")
        variance_fraction(self.variance)


def variance_fraction(variance: str) -> float:
    """ "small" -> 0, "large" -> 1, "medium:f" -> f: how far toward the large variance, in log variance."""
    try:
        fraction = {"small": 0.0, "large": 1.0}.get(variance)
        fraction = float(variance.removeprefix("medium:")) if fraction is None else fraction
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"Sampler.variance = {variance!r}: choose 'small', 'large' or 'medium:f', f in [0, 1]")
    return fraction


def ddpm_posterior(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array, variance: str):
    """Mean and log variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7, in the letters of Kingma et al. 2021).

    r = SNR_t / SNR_s. Large variance: (1 - r) sigma_t^2; small: (1 - r) sigma_s^2, the true posterior.
    """
    r = jnp.exp(log_snr_t - log_snr_s)
    one_minus_r = -jnp.expm1(log_snr_t - log_snr_s)
    alpha_st = jnp.sqrt((1.0 + jnp.exp(-log_snr_t)) / (1.0 + jnp.exp(-log_snr_s)))
    mean = r * alpha_st * x_t + one_minus_r * alpha(log_snr_s) * x_0
    large = jnp.log(one_minus_r) + jax.nn.log_sigmoid(-log_snr_t)
    small = jnp.log(one_minus_r) + jax.nn.log_sigmoid(-log_snr_s)
    fraction = variance_fraction(variance)
    return mean, fraction * large + (1.0 - fraction) * small


def ddpm_step(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array, noise: Array, sampler: Sampler) -> Array:
    """One ancestral step t -> s (Ho et al. 2020, algorithm 2)."""
    mean, log_variance = ddpm_posterior(x_t, x_0, log_snr_t, log_snr_s, sampler.variance)
    return mean + jnp.exp(0.5 * log_variance) * noise


def ddim_step(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array, noise: Array, sampler: Sampler) -> Array:
    """One deterministic step t -> s (Song et al. 2021, eq. 12 with sigma = 0): alpha_s x_0 + sigma_s eps."""
    return alpha(log_snr_s) * x_0 + sigma(log_snr_s) * eps_from_x_0(x_t, x_0, log_snr_t)


SAMPLERS: dict[str, Callable] = {"ddim": ddim_step, "ddpm": ddpm_step}


def step_times(num_steps: int) -> Array:
    """Times t at which the network is asked, in order: 1, ..., 1 / num_steps. [num_steps]."""
    return (jnp.arange(num_steps, 0, -1) / num_steps).astype(jnp.float32)


def sample(
    denoise_fn: Callable[[Array, Array, Array], Array],
    x_1: Array,
    conditioning: Array,
    noise_fn: Callable[[Array], Array],
    schedule: Schedule,
    sampler: Sampler,
) -> Array:
    """Walks noise x_1 [B, T, M] to a sample x_0 [B, T, M] in one scan.

    Args:
        denoise_fn: (x_t, log_snr_t, conditioning_t) -> x_0, guidance and clipping included.
        x_1: standard normal noise.
        conditioning: what the network needs of each time, leading axis [num_steps], in the order of `step_times`.
        noise_fn: i -> standard normal noise like x_1, drawn when stepping to s = i / num_steps; unused by DDIM.
    """
    step_fn = SAMPLERS[sampler.name]
    indices = jnp.arange(sampler.num_steps - 1, -1, -1)
    log_snr_t = schedule.log_snr(step_times(sampler.num_steps))
    log_snr_s = schedule.log_snr((indices / sampler.num_steps).astype(jnp.float32))

    def step(x_t, inputs):
        index, lt, ls, conditioning_t = inputs
        x_0 = denoise_fn(x_t, lt, conditioning_t)
        return step_fn(x_t, x_0, lt, ls, noise_fn(index), sampler), None

    inputs = (indices, log_snr_t, log_snr_s, conditioning)
    before_last, last = (jax.tree.map(part, inputs) for part in (lambda a: a[:-1], lambda a: a[-1]))
    x_t, _ = jax.lax.scan(step, x_1, before_last)
    _, lt, _, conditioning_t = last
    return denoise_fn(x_t, lt, conditioning_t)
