"""One step of training: what it carries on, the update, and the metrics of a held-out batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from music_synth.errors import UserError
from music_synth.training.optimizer import Optimizer

Array = jax.Array
Batch = dict[str, Array]
HostBatch = dict[str, np.ndarray]
Metrics = dict[str, Array]
STATISTICS_RATE = 0.02  # of running means in the parameters: over about 50 updates


class Model(Protocol):
    """What can be trained: a decoder, or a generator with its discriminators. Immutable and hashable.

    At most three calls lie between `loss` and the network.
    """

    def __hash__(self) -> int:
        """What is compiled is kept for each model."""

    def init(self, rng: Array) -> Any:
        """Returns fresh parameters."""

    def logical_axes(self) -> Any:
        """Returns a tree like the parameters; each leaf names the dimensions (`partitioning.RULES`)."""

    def at_step(self, step: int) -> Model:
        """Returns the model whose loss is trained on after `step` updates; one for each stage of the training."""

    def check_feed(self, feed: Any) -> None:
        """Raises UserError unless the feed's tokens are those that the network reads."""

    def check_batch(self, batch: HostBatch) -> None:
        """Raises UserError unless a batch suits the network."""

    def loss(self, params: Any, batch: Batch, rng: Array, train: bool) -> tuple[Array, Metrics]:
        """Returns the loss, a mean over the frames that mel_mask counts, and further means; `train`: with dropout.

        In training, metrics["statistics"] may hold what `with_statistics` keeps in the parameters.
        """

    def sample(self, params: Any, batch: Batch, rng: Array) -> Array:
        """Returns what is played for a batch: log-mel [B, T, M], or audio [B, S]."""


class Feed(Protocol):
    """Where batches come from, each with "mel" [B, T, M] and "mel_mask" [B, T]; all processes see the same ones."""

    def train_batches(self, start_step: int = 0) -> Iterator[HostBatch]:
        """Yields batches without end, from batch `start_step` on."""

    def eval_batches(self) -> Iterator[HostBatch]:
        """Yields the validation split once."""


@flax.struct.dataclass
class TrainState:
    """Everything that is saved. `step` updates have been made; batch `step` of the feed comes next."""

    step: Array  # int32 scalar
    params: Any
    opt_state: Any
    ema_params: Any  # None where the run keeps no average
    rng: Array  # uint32 key data, the same for the whole run: each step folds its number in


def create_state(model: Model, optimizer: Optimizer, rng: Array, ema_decay: float, params: Any = None) -> TrainState:
    """Returns a fresh state; jittable. ema_decay in [0, 1); 0: no moving average. params None: random ones."""
    if not 0 <= ema_decay < 1:
        raise UserError(f"train.ema_decay = {ema_decay}: must be in [0, 1)")
    init_key, step_key = jax.random.split(rng)
    params = model.init(init_key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transform.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema_decay else None,
        rng=jax.random.key_data(step_key),
    )


def train_step(
    model: Model, optimizer: Optimizer, num_microbatches: int, ema_decay: float, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Makes one update; jit it with the first four arguments fixed. Metrics are scalars on the device."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (loss, metrics), grads = loss_and_gradients(model, state.params, batch, key, num_microbatches)
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = with_statistics(params, metrics.pop("statistics", {}), state.step)
    metrics = metrics | {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optimizer.learning_rate(state.step),
    }
    ema_params = state.ema_params
    if ema_params is not None:
        # The average of a young run is a short one (as in TensorFlow's ExponentialMovingAverage), so that it never
        # remembers the random start.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        # Written as a difference so that what does not train, such as position tables, stays the same to the bit.
        ema_params = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema_params, params)
    return TrainState(state.step + 1, params, opt_state, ema_params, state.rng), metrics


def with_statistics(params: Any, statistics: Any, step: Array) -> Any:
    """Moves parameters that no gradient reaches toward what a loss found in its batch, and returns all of them.

    `statistics`, a part of the tree of `params`, is metrics["statistics"] of the loss. The parameters become its mean
    over about 1 / STATISTICS_RATE updates, and at first over all so far.
    """
    rate = jnp.maximum(STATISTICS_RATE, 1.0 / (1.0 + step.astype(jnp.float32)))

    def moved(old: Any, new: Any) -> Any:
        if isinstance(new, dict):
            return {**old, **{name: moved(old[name], value) for name, value in new.items()}}
        return old + rate * (new - old)

    return moved(params, statistics)


def loss_and_gradients(
    model: Model, params: Any, batch: Batch, key: Array, num_microbatches: int
) -> tuple[tuple[Array, Metrics], Any]:
    """Returns ((mean loss, metrics), gradients) of a batch, computed in `num_microbatches` pieces to save memory.

    A model's loss is a mean over the frames that mel_mask counts, so a piece weighs as many frames as it counts:
    the result is the whole batch's, up to rounding, wherever the loss draws no random numbers.
    """
    of_piece = partial(jax.value_and_grad(model.loss, has_aux=True), train=True)
    if num_microbatches == 1:
        return of_piece(params, batch, key)
    # Piece i has rows i, i + n, ...: each device cuts the rows it holds, none are moved.
    pieces = jax.tree.map(lambda a: a.reshape(-1, num_microbatches, *a.shape[1:]).swapaxes(0, 1), batch)

    def add_piece(total, numbered_piece):
        i, piece = numbered_piece
        weight = num_counted(piece)
        result = of_piece(params, piece, jax.random.fold_in(key, i))
        return jax.tree.map(lambda t, r: t + weight * r, total, result), weight

    shapes = jax.eval_shape(of_piece, params, jax.tree.map(lambda a: a[0], pieces), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, weights = jax.lax.scan(add_piece, zeros, (jnp.arange(num_microbatches), pieces))
    return jax.tree.map(lambda t: t / jnp.maximum(jnp.sum(weights), 1.0), total)


def eval_step(model: Model, params: Any, batch: Batch, key: Array) -> tuple[Metrics, Array]:
    """Returns the metrics of one held-out batch, dropout off, and the number of frames they are a mean of."""
    loss, metrics = model.loss(params, batch, key, train=False)
    return metrics | {"loss": loss}, num_counted(batch)


def num_params(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def num_counted(batch: Batch) -> Array:
    """Counts the target frames of a batch that mel_mask counts, as a float."""
    return jnp.sum(batch["mel_mask"].astype(jnp.float32))
