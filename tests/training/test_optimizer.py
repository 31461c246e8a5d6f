"""Optimizers against the published runs' own numbers, schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_synth.training.optimizer import (
    adafactor,
    adamw,
    constant_rate,
    decays,
    warmup_constant,
    warmup_cosine,
)
from tests import golden_arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def golden():
    return golden_arrays.load("train_step")


def updated(optimizer, params, all_grads):
    """(params, optimizer state) after an update with each of the gradients."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.transform.init(params)
    for grads in all_grads:
        params, state = step(params, state, grads)
    return params, state


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_close(actual, expected, rtol=1e-5):
    """Relative to each tensor's size, so that a value near zero does not set the scale."""
    assert expected
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


def test_adafactor_alone_follows_the_published_updates(golden):
    params = golden_arrays.tree(golden, "adafactor_unit/params_0/")
    grads = [golden_arrays.tree(golden, f"adafactor_unit/grads_{i}/") for i in (0, 1, 0)]
    after, state = updated(adafactor(1e-3), params, grads)
    expected = golden_arrays.tree(golden, "adafactor_unit/params_3/")
    assert_close(flat(after), flat(expected))
    for name, moments in golden_arrays.tree(golden, "adafactor_unit/state_3/").items():
        for kind, value in moments.items():  # v, or v_row and v_col where factored
            assert_close({name: np.asarray(getattr(state[0], kind)[name])}, {name: value})


def test_adafactor_on_the_stored_gradients(golden):
    params = golden_arrays.tree(golden_arrays.load("network_context"))
    grads = golden_arrays.tree(golden, "grads/")
    for updates in (1, 3):
        after, state = updated(adafactor(1e-3), params, [grads] * updates)
        expected = golden_arrays.tree(golden, f"adafactor_same_grads/params_after_{updates}/")
        assert_close(flat(after), flat(expected))
    moments = flat(state[0])
    for name, value in flat(golden_arrays.tree(golden, "adafactor_same_grads/state_after_3/")).items():
        *path, kind = name.split("/")
        assert_close({name: moments["/".join([kind, *path])]}, {name: value})


def test_the_published_learning_rate_has_no_warmup(golden):
    # The configuration asked for 1,000 warm-up steps; the released code ignores them (docs/spec.md 3.16.3).
    rates = [constant_rate(1e-3)(int(step)) for step in golden["learning_rate/steps"]]
    np.testing.assert_allclose(rates, golden["learning_rate/first_steps"], rtol=1e-6)


def test_recipes_warm_up_where_the_published_runs_did_not():
    schedule = warmup_constant(1e-3, 1000)
    np.testing.assert_allclose(schedule(0), 1e-6, rtol=1e-5)
    np.testing.assert_allclose(schedule(499), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(schedule(jnp.array([999, 5000])), [1e-3, 1e-3], rtol=1e-6)


def test_cosine_ends_at_zero_and_halves_in_the_middle():
    schedule = warmup_cosine(2.0, warmup_steps=10, num_steps=110)
    np.testing.assert_allclose(schedule(60), 1.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(jnp.array([110, 1000])), [0.0, 0.0], atol=1e-6)
    steps = jnp.arange(10, 111)
    assert np.all(np.diff(schedule(steps)) < 0)


def test_without_warmup_the_first_step_has_the_full_rate():
    for schedule in (warmup_constant(1.0, 0), warmup_cosine(1.0, 0, 100)):
        np.testing.assert_allclose(schedule(0), 1.0, rtol=1e-6)


def test_weight_decay_spares_norms_embeddings_and_positions():
    params = {
        "mlp": {"wi": {"kernel": jnp.ones((2, 2))}},
        "norm": {"scale": jnp.ones(2)},
        "Embed_0": {"embedding": jnp.ones((2, 2))},
        "positions": {"embedding": jnp.ones((2, 2))},
    }
    assert flat(decays(params)) == {
        "mlp/wi/kernel": True,
        "norm/scale": False,
        "Embed_0/embedding": False,
        "positions/embedding": False,
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = flat(updated(adamw(0.1, weight_decay=0.5), params, [zeros])[0])
    np.testing.assert_allclose(after["mlp/wi/kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    for name in ("norm/scale", "Embed_0/embedding", "positions/embedding"):
        np.testing.assert_array_equal(after[name], 1.0)


def test_gradients_are_clipped_by_their_norm_together():
    # Adam is blind to the size of gradients but for eps: a huge eps makes its update proportional to them.
    grads = {"a": {"kernel": jnp.full((2,), 30.0)}, "b": {"kernel": jnp.full((2,), 40.0)}}  # norm sqrt(2) * 50
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = adamw(1.0, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=1.0)
    after = flat(updated(optimizer, params, [grads])[0])
    norm = np.sqrt(2) * 50
    np.testing.assert_allclose(after["a/kernel"], -30 / norm / 1e6, rtol=1e-5)
    np.testing.assert_allclose(after["b/kernel"], -40 / norm / 1e6, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: constant_rate(-1.0), "constant_rate.learning_rate = -1.0"),
        (lambda: warmup_constant(1e-3, -5), "warmup_steps = -5"),
        (lambda: warmup_cosine(1e-3, 10, 0), "num_steps = 0"),
        (lambda: adamw(0.0), "adamw.learning_rate = 0.0"),
        (lambda: adamw(1e-3, b2=1.0), "adamw.b2 = 1.0"),
        (lambda: adamw(1e-3, weight_decay=-0.1), "weight_decay = -0.1"),
        (lambda: adafactor(1e-3, clip_norm=-1.0), "adafactor.clip_norm = -1.0"),
    ],
)
def test_nonsense_is_named(make, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        make()
