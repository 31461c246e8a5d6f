"""The Gaussian process between data x_0 and noise: forward samples and conversions (docs/spec.md 3.15.3).

Every function takes x [B, T, M] (or any shape) and a log_snr that broadcasts against it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from music_synth.diffusion.schedule import alpha, sigma

Array = jax.Array
PREDICTION_TYPES = ("eps", "x0", "v", "x0_and_eps")


def per_example(value: Array, like: Array) -> Array:
    """Shapes a scalar or [B] so that it broadcasts against `like` [B, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def diffuse(x_0: Array, eps: Array, log_snr: Array) -> Array:
    """Computes x_t = alpha x_0 + sigma eps."""
    return alpha(log_snr) * x_0 + sigma(log_snr) * eps


def x_0_from_eps(x_t: Array, eps: Array, log_snr: Array) -> Array:
    """Computes (x_t - sigma eps) / alpha, written so that it stays finite in float32 at log_snr = -20."""
    return jnp.sqrt(1.0 + jnp.exp(-log_snr)) * (x_t - eps * jax.lax.rsqrt(1.0 + jnp.exp(log_snr)))


def eps_from_x_0(x_t: Array, x_0: Array, log_snr: Array) -> Array:
    """Computes (x_t - alpha x_0) / sigma."""
    return jnp.sqrt(1.0 + jnp.exp(log_snr)) * (x_t - x_0 * jax.lax.rsqrt(1.0 + jnp.exp(-log_snr)))


def x_0_from_v(x_t: Array, v: Array, log_snr: Array) -> Array:
    """Computes alpha x_t - sigma v (Salimans and Ho 2022, appendix D)."""
    return alpha(log_snr) * x_t - sigma(log_snr) * v


def v_of(x_0: Array, eps: Array, log_snr: Array) -> Array:
    """Computes v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D)."""
    return alpha(log_snr) * eps - sigma(log_snr) * x_0


def to_x_0(output: Array, x_t: Array, log_snr: Array, prediction_type: str) -> Array:
    """Takes what the network predicts to x_0.

    "x0_and_eps" has twice the channels, x_0 first; the two estimates are mixed by w = sigmoid(-log_snr).
    """
    if prediction_type == "eps":
        return x_0_from_eps(x_t, output, log_snr)
    if prediction_type == "x0":
        return output
    if prediction_type == "v":
        return x_0_from_v(x_t, output, log_snr)
    if prediction_type == "x0_and_eps":
        direct, eps = jnp.split(output, 2, axis=-1)
        weight = jax.nn.sigmoid(-log_snr)
        return weight * direct + (1.0 - weight) * x_0_from_eps(x_t, eps, log_snr)
    raise ValueError(f"prediction_type {prediction_type!r}: choose from {PREDICTION_TYPES}")


def to_x_0_and_eps(output: Array, x_t: Array, log_snr: Array, prediction_type: str) -> tuple[Array, Array]:
    """Takes what the network predicts to (x_0, eps), each exact where the network predicts it itself."""
    x_0 = to_x_0(output, x_t, log_snr, prediction_type)
    return x_0, output if prediction_type == "eps" else eps_from_x_0(x_t, x_0, log_snr)
