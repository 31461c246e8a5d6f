"""Noise schedules: log signal-to-noise ratio as a function of time t in [0, 1] (docs/spec.md 3.15.1-2).

Variance preserving: x_t = alpha x_0 + sigma eps, alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.errors import check_range

Array = jax.Array
MAX_LOG_SNR = 20.0  # float32's reach


class Schedule(Protocol):
    def log_snr(self, t: Array) -> Array:
        """Returns the log signal-to-noise ratio at t, any shape; it falls with t."""
        ...


@dataclass(frozen=True)
class CosineSchedule:
    """alpha = cos(pi t / 2) with its ends cut at log-SNR +-20 (Nichol and Dhariwal 2021, continuous form)."""

    def log_snr(self, t: Array) -> Array:
        b = np.arctan(np.exp(-0.5 * MAX_LOG_SNR))
        a = np.arctan(np.exp(0.5 * MAX_LOG_SNR)) - b
        return -2.0 * jnp.log(jnp.tan(a * t + b))


@dataclass(frozen=True)
class LinearSchedule:
    """Betas linear from `beta_start` to `beta_end` over `num_steps` (Ho et al. 2020), interpolated in t."""

    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_steps: int = 1000

    def __post_init__(self):
        check_range(self, 2, 100_000, "num_steps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"{self}: needs 0 < beta_start <= beta_end < 1")

    def log_snr(self, t: Array) -> Array:
        keep = np.cumprod(1.0 - np.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=np.float64))
        table = np.clip(np.log(keep) - np.log1p(-keep), -MAX_LOG_SNR, MAX_LOG_SNR).astype(np.float32)
        grid = np.linspace(0.0, 1.0, self.num_steps, dtype=np.float32)
        return jnp.interp(t, jnp.asarray(grid), jnp.asarray(table))


@dataclass(frozen=True)
class SquaredCosineSchedule:
    """The discrete schedule that the diffusers port plays the published weights with ("squaredcos_cap_v2").

    alpha^2 = cos^2(pi / 2 (t + 0.008) / 1.008) gives `num_steps` betas of at most 0.999 (Nichol and Dhariwal 2021,
    eq. 17). Step k is at t = k / num_steps, from 0 on; between steps the log-SNR is interpolated, after the last it
    stays as it is.
    """

    num_steps: int = 1000

    def __post_init__(self):
        check_range(self, 2, 100_000, "num_steps")

    def log_snr(self, t: Array) -> Array:
        ends = np.arange(self.num_steps + 1) / self.num_steps
        squares = np.cos((ends + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - squares[1:] / squares[:-1], 0.999).astype(np.float32)
        # Rounded to float32 where the port rounds, which at the first steps moves sigma^2 by up to 5e-4 of itself.
        keep = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32).astype(np.float64)
        table = (np.log(keep) - np.log1p(-keep)).astype(np.float32)
        steps = np.arange(self.num_steps, dtype=np.float32)
        step = t * self.num_steps
        nearest = jnp.round(step)  # in float32 a step's time can be off a little, and the last steps are steep
        step = jnp.where(jnp.abs(step - nearest) < 1e-3, nearest, step)
        return jnp.interp(step, jnp.asarray(steps), jnp.asarray(table))


@dataclass(frozen=True)
class LogNormalSchedule:
    """ln(sigma / alpha) normal when t is uniform, for data of unit variance (Karras et al. 2022, table 1, "EDM").

    With "v" as prediction and as the loss's target, training is theirs for sigma_data = 1: x_t is their c_in times
    their noisy data, and v the negative of what their network learns.
    """

    mean: float = -0.5  # of ln(sigma / alpha)
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"{self}: std must be positive")

    def log_snr(self, t: Array) -> Array:
        log_sigma = self.mean + self.std * jax.scipy.special.ndtri(jnp.asarray(t, jnp.float32))
        return jnp.clip(-2.0 * log_sigma, -MAX_LOG_SNR, MAX_LOG_SNR)


def time_of(schedule: Schedule, log_snr: Array) -> Array:
    """Finds by bisection the t in [0, 1] at which a schedule has `log_snr`, any shape; beyond its range its end."""

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        is_before = schedule.log_snr(middle) > log_snr
        return jnp.where(is_before, middle, low), jnp.where(is_before, high, middle)

    start = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
    low, high = jax.lax.fori_loop(0, 26, halve, start)  # as far as float32 tells times near 1 apart
    return 0.5 * (low + high)


def alpha(log_snr: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(log_snr))


def sigma(log_snr: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(-log_snr))
