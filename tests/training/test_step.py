"""One step: gradients in pieces, the moving average, and where randomness comes from."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.training.optimizer import adamw
from music_synth.training.step import (
    STATISTICS_RATE,
    create_state,
    eval_step,
    loss_and_gradients,
    train_step,
    with_statistics,
)
from tests.training.toy import Toy, ToyFeed

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUIET = Toy(noise=0.0)  # a loss that draws no random numbers
BATCH = ToyFeed(batch_size=8).batch(0, 0)


@functools.cache
def fresh(model, ema_decay):
    return jax.jit(lambda: create_state(model, adamw(1e-2), jax.random.key(0), ema_decay))()


@functools.cache
def compiled_gradients(model, pieces):
    return jax.jit(partial(loss_and_gradients, model, num_microbatches=pieces))


def gradients(model, params, batch, key, pieces):
    return compiled_gradients(model, pieces)(params, batch, key)


@functools.cache
def stepper(model, ema_decay):
    return jax.jit(partial(train_step, model, adamw(1e-2), 1, ema_decay))


@pytest.fixture(scope="module")
def state():
    return fresh(QUIET, ema_decay=0.99)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_microbatches_give_the_whole_batch_s_gradient(state, pieces):
    counts = BATCH["mel_mask"].reshape(-1, pieces, 6).sum((0, 2))
    assert len(set(counts)) > 1, "pieces must weigh differently for this test to mean anything"
    key = jax.random.key(1)
    (whole_loss, _), whole = gradients(QUIET, state.params, BATCH, key, 1)
    (loss, _), grads = gradients(QUIET, state.params, BATCH, key, pieces)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), grads, whole)


def test_a_piece_without_any_frame_weighs_nothing(state):
    batch = dict(BATCH, mel_mask=np.arange(8)[:, None] % 2 * np.ones((1, 6)) > 0)  # even rows: piece 0 of 2
    key = jax.random.key(1)
    (whole_loss, _), _ = gradients(QUIET, state.params, batch, key, 1)
    (loss, _), _ = gradients(QUIET, state.params, batch, key, 2)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)


def test_microbatches_draw_apart(state):
    """Pieces must not share their noise."""

    class Spy(Toy):
        def loss(self, params, batch, rng, train):
            loss, _ = super().loss(params, batch, rng, train)
            return loss, {"draw": jnp.square(jax.random.normal(rng))}

    same = dict(BATCH, mel_mask=np.ones((8, 6), bool))
    (_, metrics), _ = gradients(Spy(), state.params, same, jax.random.key(1), 2)
    draws = [jnp.square(jax.random.normal(jax.random.fold_in(jax.random.key(1), i))) for i in range(2)]
    assert draws[0] != draws[1]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)


def test_ema_is_the_weighted_sum_of_past_parameters(state):
    step = stepper(QUIET, 0.9)
    expected = state.params["context"]["norm"]["scale"]
    now = state
    for k in range(60):
        now, _ = step(now, BATCH)
        decay = min(0.9, (1 + k) / (10 + k))  # short while the run is young
        expected = decay * expected + (1 - decay) * now.params["context"]["norm"]["scale"]
    np.testing.assert_allclose(now.ema_params["context"]["norm"]["scale"], expected, rtol=1e-5)
    assert int(now.step) == 60


def test_what_does_not_train_is_not_changed_by_averaging():
    class Frozen(Toy):
        def loss(self, params, batch, rng, train):
            frozen = params | {"notes": jax.lax.stop_gradient(params["notes"])}
            return super().loss(frozen, batch, rng, train)

    model = Frozen()
    state = fresh(model, 0.9)
    for _ in range(30):
        state, _ = stepper(model, 0.9)(state, BATCH)
    np.testing.assert_array_equal(state.ema_params["notes"]["embedding"], state.params["notes"]["embedding"])
    assert np.any(state.ema_params["context"]["wi"]["kernel"] != state.params["context"]["wi"]["kernel"])


def test_without_ema_there_is_no_copy():
    state = fresh(QUIET, ema_decay=0.0)
    assert state.ema_params is None
    after, _ = stepper(QUIET, 0.0)(state, BATCH)
    assert after.ema_params is None


def test_each_step_draws_anew_and_a_repeated_step_draws_the_same():
    noisy = Toy()
    state = fresh(noisy, ema_decay=0.0)
    step = stepper(noisy, 0.0)
    first, again = step(state, BATCH)[1], step(state, BATCH)[1]
    second = step(step(state, BATCH)[0], BATCH)[1]
    assert first["draw"] == again["draw"] != second["draw"]


def test_metrics_tell_loss_gradient_and_rate(state):
    _, metrics = stepper(QUIET, 0.0)(state, BATCH)
    _, grads = gradients(QUIET, state.params, BATCH, jax.random.key(0), 1)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2, rtol=1e-6)


def test_evaluation_runs_with_dropout_off():
    noisy = Toy(noise=100.0)
    params = noisy.init(jax.random.key(0))
    metrics, counted = jax.jit(partial(eval_step, noisy))(params, BATCH, jax.random.key(1))
    quiet, _ = jax.jit(partial(eval_step, QUIET))(params, BATCH, jax.random.key(1))
    np.testing.assert_array_equal(metrics["loss"], quiet["loss"])
    assert float(counted) == BATCH["mel_mask"].sum()


def test_statistics_become_means_of_what_losses_found():
    """At first of all so far, then over about 1 / STATISTICS_RATE updates; other parameters stay."""
    params = {"a": {"mean": jnp.zeros(2), "kernel": jnp.ones(2)}, "b": jnp.ones(1)}
    for number, found in enumerate((4.0, 2.0, 6.0)):
        statistics = {"a": {"mean": jnp.full(2, found)}}
        params = with_statistics(params, statistics, jnp.int32(number))
    np.testing.assert_allclose(params["a"]["mean"], 4.0, rtol=1e-6)
    np.testing.assert_array_equal(params["a"]["kernel"], 1.0)
    later = with_statistics(params, {"a": {"mean": jnp.full(2, 5.0)}}, jnp.int32(10_000))
    np.testing.assert_allclose(later["a"]["mean"], 4.0 + STATISTICS_RATE, rtol=1e-6)
