"""Samplers: functions of a denoiser that walk x_t along a grid of times, from noise (t = 1) to data (t = 0).

`denoise_fn(x_t, log_snr_t, conditioning_t) -> x_0` is all they know of the network. With lambda = log_snr / 2 and x_0
held constant from t to s, the probability-flow ODE is solved by `ddim_step` and the reverse SDE by `ddpm_step`; the
samplers of second order put a better x_0 into the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from music_synth.diffusion.process import eps_from_x_0
from music_synth.diffusion.schedule import Schedule, alpha, sigma, time_of
from music_synth.errors import UserError, check_range

Array = jax.Array
GRIDS = ("t", "leading", "log_snr", "karras")


@dataclass(frozen=True)
class Sampler:
    """How to sample.

    name: "ddim", "euler", "heun" and "dpmpp_2m" solve the ODE, so the noise alone decides the sample; "ddpm" adds noise
    at every step. Heun calls the network twice a step, the others once.
    """

    name: str = "ddim"
    num_steps: int = 20  # points of the grid; what the network says at the last one is the sample
    guidance_scale: float = 1.0  # 1 = none; the published models train for 5 and play at 2
    variance: str = "large"  # of "ddpm": "large", "small" or "medium:f" with f in [0, 1]
    temperature: float = 1.0  # what latents of notes and residual are multiplied by: 0 plays the mean, 1 as trained
    texture: float = 1.0  # what the residual is multiplied by besides: with 0 renditions differ in their notes alone
    clip_x_0: bool = True  # to [-1, 1], the range of scaled mels
    # Uniform in "t", in "log_snr", or "karras": uniform in (sigma / alpha)^(1 / rho). "leading" is the diffusers
    # port's: uniform in the steps of a discrete schedule, of which it takes 0 and leaves out the last.
    grid: str = "t"
    rho: float = 7.0
    min_log_snr: float = -9.0  # where the grids "log_snr" and "karras" begin, or the schedule's own limit
    max_log_snr: float = 9.0  # ... and end, likewise

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"Sampler.name = {self.name!r}: choose from {sorted(SAMPLERS)}")
        if self.grid not in GRIDS:
            raise ValueError(f"Sampler.grid = {self.grid!r}: choose from {GRIDS}")
        check_range(self, 1, 100_000, "num_steps")
        for name in ("temperature", "texture", "guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Sampler.{name} = {getattr(self, name)}: must be 0 or more, and finite")
        if not 1 <= self.rho < math.inf:
            raise ValueError(f"Sampler.rho = {self.rho}: must be at least 1, and finite")
        if not -math.inf < self.min_log_snr < self.max_log_snr < math.inf:
            limits = f"min_log_snr = {self.min_log_snr}, max_log_snr = {self.max_log_snr}"
            raise ValueError(f"Sampler.{limits}: the first must be the smaller, and both finite")
        variance_fraction(self.variance)


# --- the grid ----------------------------------------------------------------------------------------------------


def grid_times(sampler: Sampler, schedule: Schedule) -> Array:
    """Makes times [num_steps + 1] that fall to 0; the network is asked at all but the last.

    Uniform in t: 1, ..., 1 / num_steps, 0. Leading, 100 of 1000 steps: 0.99, ..., 0.01, 0, 0. The others lie between
    the sampler's limits of the log-SNR, as far as the schedule reaches them (Karras et al. 2022, eq. 5, where sigma is
    our sigma / alpha).
    """
    n = sampler.num_steps
    if sampler.grid == "leading":
        total = getattr(schedule, "num_steps", 1000)
        if n > total:
            raise UserError(f'Sampler.num_steps = {n}: with the grid "leading" at most {total}, the schedule\'s own')
        return jnp.append(jnp.arange(n - 1, -1, -1) * (total // n) / total, 0.0).astype(jnp.float32)
    if sampler.grid == "t":
        return (jnp.arange(n, -1, -1) / n).astype(jnp.float32)
    first = jnp.maximum(sampler.min_log_snr, schedule.log_snr(jnp.float32(1.0)))
    last = jnp.minimum(sampler.max_log_snr, schedule.log_snr(jnp.float32(0.0)))
    if sampler.grid == "log_snr":
        log_snr = jnp.linspace(first, last, n)
    else:
        roots = jnp.linspace(jnp.exp(-0.5 * first / sampler.rho), jnp.exp(-0.5 * last / sampler.rho), n)
        log_snr = -2.0 * sampler.rho * jnp.log(roots)
    return jnp.append(time_of(schedule, log_snr), 0.0)


# --- single steps ------------------------------------------------------------------------------------------------


def variance_fraction(variance: str) -> float:
    """Reads "small" as 0, "large" as 1, "medium:f" as f: how far toward the large variance, in log variance."""
    try:
        fraction = {"small": 0.0, "large": 1.0}.get(variance)
        fraction = float(variance.removeprefix("medium:")) if fraction is None else fraction
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"Sampler.variance = {variance!r}: choose 'small', 'large' or 'medium:f', f in [0, 1]")
    return fraction


def ddpm_posterior(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array, variance: str):
    """Computes mean and log variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7; letters of Kingma et al. 2021).

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


def ddpm_step(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array, noise: Array, variance: str) -> Array:
    """Takes an ancestral step t -> s (Ho et al. 2020, algorithm 2)."""
    mean, log_variance = ddpm_posterior(x_t, x_0, log_snr_t, log_snr_s, variance)
    return mean + jnp.exp(0.5 * log_variance) * noise


def ddim_step(x_t: Array, x_0: Array, log_snr_t: Array, log_snr_s: Array) -> Array:
    """Takes a deterministic step t -> s (Song et al. 2021, eq. 12 with sigma = 0): alpha_s x_0 + sigma_s eps."""
    return alpha(log_snr_s) * x_0 + sigma(log_snr_s) * eps_from_x_0(x_t, x_0, log_snr_t)


# --- samplers ----------------------------------------------------------------------------------------------------
#
# Each walks x from the first point of a grid to the last and returns it there:
#   denoise(x, j) -> x_0    at grid point j
#   log_snr [J, ...]        of the grid points, each broadcastable against x
#   noise(j)                standard normal, for the step from point j to j + 1


def ddim(denoise: Callable, x: Array, log_snr: Array, noise: Callable, sampler: Sampler) -> Array:
    """First order, deterministic (Song et al. 2021)."""

    def step(x, j):
        return ddim_step(x, denoise(x, j), log_snr[j], log_snr[j + 1]), None

    return _scan(step, x, log_snr)


def ddpm(denoise: Callable, x: Array, log_snr: Array, noise: Callable, sampler: Sampler) -> Array:
    """First order, with fresh noise at every step (Ho et al. 2020)."""

    def step(x, j):
        return ddpm_step(x, denoise(x, j), log_snr[j], log_snr[j + 1], noise(j), sampler.variance), None

    return _scan(step, x, log_snr)


def euler(denoise: Callable, x: Array, log_snr: Array, noise: Callable, sampler: Sampler) -> Array:
    """First order, deterministic, in the angle: with tan(angle) = sigma / alpha the ODE is dx / d angle = v.

    (Salimans and Ho 2022, appendix D; Lu and Song 2024.) Exact for Gaussian data that are as the noise is, whose v is 0
    on average: no spread is lost in few steps, where eight of DDIM leave 0.83 of it.
    """
    angle = jnp.arctan(jnp.exp(-0.5 * log_snr))

    def step(x, j):
        v = (alpha(log_snr[j]) * x - denoise(x, j)) / sigma(log_snr[j])
        return x + (angle[j + 1] - angle[j]) * v, None

    return _scan(step, x, log_snr)


def heun(denoise: Callable, x: Array, log_snr: Array, noise: Callable, sampler: Sampler) -> Array:
    """Second order, two calls a step: Euler to s, then the step again with x_0 changing linearly on the way.

    Karras et al. 2022, algorithm 1, on the ODE in lambda whose linear part is solved exactly (Lu et al. 2022, prop.
    4.1): in their sigma, a first step from log-SNR -20 multiplies the denoiser's error by thousands. With h the step in
    lambda, the change of x_0 weighs 1 - (1 - e^-h) / h, about h / 2 as in Heun's rule.
    """

    def step(x, j):
        x_0, h = denoise(x, j), 0.5 * (log_snr[j + 1] - log_snr[j])
        euler = ddim_step(x, x_0, log_snr[j], log_snr[j + 1])
        change = denoise(euler, j + 1) - x_0
        weight = 1.0 + jnp.expm1(-h) / jnp.maximum(h, 1e-6)
        return euler + alpha(log_snr[j + 1]) * weight * change, None

    return _scan(step, x, log_snr)


def dpmpp_2m(denoise: Callable, x: Array, log_snr: Array, noise: Callable, sampler: Sampler) -> Array:
    """DPM-Solver++(2M): second order, one call a step, deterministic (Lu et al. 2022, algorithm 2)."""

    def step(carry, j):
        x, before = carry
        x_0 = denoise(x, j)
        return (ddim_step(x, _halfway(x_0, before, log_snr, j), log_snr[j], log_snr[j + 1]), x_0), None

    return _scan(step, (x, jnp.zeros_like(x)), log_snr)[0]


def _halfway(x_0: Array, before: Array, log_snr: Array, j: Array) -> Array:
    """Extrapolates x_0 half a step, on the line through point j and the one before it (Lu et al. 2022, alg. 2)."""
    h, h_before = log_snr[j + 1] - log_snr[j], log_snr[j] - log_snr[jnp.maximum(j - 1, 0)]
    ahead = jnp.where(h_before > 0, 0.5 * h / jnp.where(h_before > 0, h_before, 1.0), 0.0)  # no past: first order
    return x_0 + ahead * (x_0 - before)


def _scan(step: Callable, carry, log_snr: Array):
    return jax.lax.scan(step, carry, jnp.arange(len(log_snr) - 1))[0]


SAMPLERS: dict[str, Callable] = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}


def sample(
    denoise_fn: Callable[[Array, Array, Array], Array],
    x_1: Array,
    times: Array,
    conditioning: Array,
    noise_fn: Callable[[Array], Array],
    schedule: Schedule,
    sampler: Sampler,
) -> Array:
    """Walks noise x_1 [B, T, M] to a sample x_0 [B, T, M]: what the denoiser says at the grid's last point but one.

    Args:
        denoise_fn: (x_t, log_snr_t, conditioning_t) -> x_0, guidance and clipping included.
        x_1: standard normal noise.
        times: the grid, falling, [num_steps + 1]; `grid_times` makes it from the sampler.
        conditioning: what the network needs of each time but the last, leading axis [num_steps].
        noise_fn: i -> standard normal noise like x_1, for the step after which i calls of the network are left.
    """
    last = len(times) - 2
    log_snr = schedule.log_snr(times[:-1])

    def denoise(x, j):
        return denoise_fn(x, log_snr[j], jax.tree.map(lambda a: a[j], conditioning))

    x = SAMPLERS[sampler.name](denoise, x_1, log_snr, lambda j: noise_fn(last - j), sampler)
    return denoise(x, last)
