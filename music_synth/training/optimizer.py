"""Optimizers and learning-rate schedules, all from optax parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

Schedule = Callable[[jax.Array | int], jax.Array]  # step, from 0 -> learning rate


class Optimizer(NamedTuple):
    """A gradient transformation and the learning rate it follows, which the loop logs."""

    transform: optax.GradientTransformation
    learning_rate: Schedule


# --- schedules ---------------------------------------------------------------------------------------------------


def constant_rate(learning_rate: float) -> Schedule:
    """Keeps the same rate at every step: what the published runs really did (docs/spec.md 3.16.3)."""
    rate = _positive("constant_rate.learning_rate", learning_rate)
    return lambda step: jnp.full(jnp.shape(step), rate, jnp.float32)


def warmup_constant(learning_rate: float, warmup_steps: int) -> Schedule:
    """Rises linearly over `warmup_steps` updates, then stays: what the published configuration asked for."""
    return _after_warmup("warmup_constant", learning_rate, warmup_steps, lambda step: jnp.ones_like(step))


def warmup_cosine(learning_rate: float, warmup_steps: int, num_steps: int) -> Schedule:
    """Rises linearly, then falls by half a cosine to 0 at step `num_steps`."""
    if num_steps < 1:
        raise ValueError(f"warmup_cosine.num_steps = {num_steps}: must be at least 1")

    def decay(step):
        progress = jnp.clip((step - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return _after_warmup("warmup_cosine", learning_rate, warmup_steps, decay)


def _after_warmup(name: str, learning_rate: float, warmup_steps: int, decay: Callable) -> Schedule:
    rate = _positive(f"{name}.learning_rate", learning_rate)
    if warmup_steps < 0:
        raise ValueError(f"{name}.warmup_steps = {warmup_steps}: must be 0 or more")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        # The first update is number 1 of the warm-up, so that it moves, and number warmup_steps has the full rate.
        warmup = jnp.minimum((step + 1.0) / max(warmup_steps, 1), 1.0)
        return rate * warmup * decay(step)

    return schedule


# --- optimizers --------------------------------------------------------------------------------------------------


def adafactor(
    learning_rate: Schedule | float,
    decay_exponent: float = 0.8,  # second moments decay with 1 - (step + 1)^-decay_exponent
    min_dim_to_factor: int = 128,  # a matrix is factored only when both its largest dimensions reach this
    clip_norm: float | None = None,  # of all gradients together, before anything else
) -> Optimizer:
    """Builds Adafactor as published (Shazeer and Stern 2018; docs/spec.md 3.16.4).

    No momentum, no weight decay; each update is divided by max(1, its RMS) and scaled by max(1e-3, RMS(parameter)).
    """
    schedule = _as_schedule("adafactor", learning_rate)
    transform = optax.adafactor(
        learning_rate=schedule,
        decay_rate=decay_exponent,
        min_dim_size_to_factor=min_dim_to_factor,
        multiply_by_parameter_scale=True,
        clipping_threshold=1.0,
        momentum=None,
        weight_decay_rate=None,
        eps=1e-30,
    )
    return Optimizer(_clipped("adafactor", clip_norm, transform), schedule)


def adamw(
    learning_rate: Schedule | float,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.01,  # times the learning rate, on kernels only
    clip_norm: float | None = 1.0,  # of all gradients together
) -> Optimizer:
    """Builds AdamW (Loshchilov and Hutter 2019); norms, embeddings and position tables do not decay."""
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"adamw.{name} = {beta}: must be in [0, 1)")
    if weight_decay < 0:
        raise ValueError(f"adamw.weight_decay = {weight_decay}: must be 0 or more")
    schedule = _as_schedule("adamw", learning_rate)
    transform = _promoting(optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decays))
    return Optimizer(_clipped("adamw", clip_norm, transform), schedule)


def muon(
    learning_rate: Schedule | float,
    matrix_scale: float = 2.0,  # rate of the layers' matrices over that of the other parameters
    momentum: float = 0.95,
    b2: float = 0.98,  # of the Adam for the other parameters
    weight_decay: float = 0.01,  # times the learning rate, on the layers' matrices only
    clip_norm: float | None = 1.0,  # of all gradients together
) -> Optimizer:
    """Builds Muon (Jordan et al. 2024) for the matrices inside layers, Adam for everything else.

    Momentum orthogonalized by five Newton-Schulz steps, scaled to the RMS of an Adam update (Liu et al. 2025), so
    that Adam's learning rates serve. Small networks need about a third fewer steps than with AdamW.
    """
    for name, value in (("momentum", momentum), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"muon.{name} = {value}: must be in [0, 1)")
    schedule, scale = _as_schedule("muon", learning_rate), _positive("muon.matrix_scale", matrix_scale)
    transform = optax.contrib.muon(
        lambda step: scale * schedule(step),
        beta=momentum,
        weight_decay=weight_decay,
        adam_b2=b2,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=layer_matrices,
        consistent_rms=0.2,
    )
    return Optimizer(_clipped("muon", clip_norm, _promoting(transform)), schedule)


def layer_matrices(params: Any) -> Any:
    """Names the input and output axes of the kernels inside layers (stacked or not), in a tree with None elsewhere."""

    def axes(path, leaf):
        inside = path[-1].key == "kernel" and any(str(part.key).startswith("layers") for part in path)
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if inside else None

    return jax.tree_util.tree_map_with_path(axes, params)


def decays(params: Any) -> Any:
    """Marks the kernels in a tree of bool, the only parameters that weight decay pulls to zero."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key == "kernel", params)


def _as_schedule(name: str, learning_rate: Schedule | float) -> Schedule:
    if callable(learning_rate):
        return learning_rate
    return constant_rate(_positive(f"{name}.learning_rate", learning_rate))


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}: must be a positive number")
    return float(value)


def _promoting(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets optax's Adam mix integers and floats where the caller has JAX refuse it."""

    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(grads, state, params)

    return optax.GradientTransformation(transform.init, update)


def _clipped(name: str, clip_norm: float | None, transform: optax.GradientTransformation):
    if clip_norm is None:
        return transform
    _positive(f"{name}.clip_norm", clip_norm)
    return optax.chain(optax.clip_by_global_norm(clip_norm), transform)
