"""What must hold of `Diffusion` with any weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import scale_mel, unscale_mel
from music_synth.diffusion import process
from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.objective import Diffusion, drop_conditions
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule, LogNormalSchedule, alpha, sigma, time_of
from music_synth.errors import UserError
from tests.models.test_transformer import TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = Diffusion(dataclasses.replace(TINY, dropout_rate=0.2), sampler=Sampler(num_steps=4))


def make_batch(rows=3, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(32)[None] < np.array([32, 20, 7])[:rows, None]
    return {
        "note_tokens": jnp.asarray(rng.integers(1, 1391, (rows, 16)), jnp.int32),
        "context_mel": jnp.asarray(rng.uniform(-11, 4, (rows, 32, 128)), jnp.float32),
        "context_mask": jnp.asarray(np.arange(rows)[:, None] * np.ones((1, 32)) > 0),
        "mel": jnp.asarray(rng.uniform(-11, 4, (rows, 32, 128)), jnp.float32),
        "mel_mask": jnp.asarray(mask),
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def loss():
    return jax.jit(MODEL.loss, static_argnums=3)


def test_evaluation_has_no_dropout(params, loss):
    """The published code leaves dropout and condition dropout on in evaluation.

    Here the evaluation loss is that of a model which has neither.
    """
    batch, key = make_batch(), jax.random.key(1)
    network = dataclasses.replace(MODEL.network, dropout_rate=0.0)
    undropped = jax.jit(dataclasses.replace(MODEL, condition_dropout=0.0, network=network).loss, static_argnums=3)
    evaluated = loss(params, batch, key, False)[0]
    np.testing.assert_allclose(evaluated, undropped(params, batch, key, True)[0], rtol=1e-5)
    assert float(jnp.abs(loss(params, batch, key, True)[0] - evaluated)) > 1e-4


def test_loss_ignores_masked_frames(params, loss):
    batch = make_batch()
    garbage = dict(batch, mel=jnp.where(batch["mel_mask"][..., None], batch["mel"], -3.0))
    # Masked target frames still enter x_t, which other frames see; so mask rows as a whole to compare.
    nothing = dict(batch, mel_mask=jnp.zeros_like(batch["mel_mask"]))
    assert float(loss(params, nothing, jax.random.key(0), False)[0]) == 0.0
    rows = dict(batch, mel_mask=batch["mel_mask"] & (jnp.arange(3) < 2)[:, None])
    other = dict(rows, mel=garbage["mel"].at[2].set(1.0))
    other["mel"] = other["mel"].at[:2].set(batch["mel"][:2])
    np.testing.assert_allclose(
        loss(params, rows, jax.random.key(0), False)[0], loss(params, other, jax.random.key(0), False)[0], rtol=1e-6
    )


def test_condition_dropout_takes_notes_and_context_together(params):
    batch = make_batch()
    dropped = drop_conditions(batch, jnp.asarray([True, False, True]))
    assert not np.any(dropped["note_tokens"][1]) and not np.any(dropped["context_mask"][1])
    for name in ("note_tokens", "context_mask"):
        np.testing.assert_array_equal(dropped[name][::2], batch[name][::2])


def test_sampling_is_deterministic_and_in_range(params):
    sample = jax.jit(MODEL.sample)
    batch = make_batch()
    a, b, c = (sample(params, batch, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (3, 32, 128) and a.dtype == jnp.float32 and float(jnp.abs(a - c).max()) > 1e-3
    assert float(jnp.abs(scale_mel(a, clip=False)).max()) <= 1 + 1e-5
    assert not np.allclose(a, sample(params, dict(batch, note_tokens=batch["note_tokens"][::-1]), jax.random.key(0)))


def test_context_mask_false_hides_the_context(params):
    sample = jax.jit(MODEL.sample)
    batch = dict(make_batch(), context_mask=jnp.zeros((3, 32), bool))
    other = dict(batch, context_mel=batch["context_mel"] + 1.0)
    np.testing.assert_allclose(
        sample(params, batch, jax.random.key(0)), sample(params, other, jax.random.key(0)), atol=1e-4
    )


def test_guidance_one_is_no_guidance_and_zero_is_unconditional(params):
    batch, key = make_batch(), jax.random.key(3)
    film = MODEL._apply(params, jnp.asarray([0.4]), method="condition_time")
    x_t = jax.random.normal(key, (3, 32, 128))
    log_snr = MODEL.schedule.log_snr(jnp.float32(0.4))

    def denoise(scale, batch):
        model = MODEL.with_sampling(guidance_scale=scale, clip_x_0=False)
        return model.denoiser(params, model._encode(params, batch, None))(x_t, log_snr, film)

    nothing = drop_conditions(batch, jnp.zeros(3, bool))
    np.testing.assert_allclose(denoise(1.0, batch), denoise(1.0 + 1e-6, batch), atol=1e-4)
    np.testing.assert_allclose(denoise(0.0, batch), denoise(1.0, nothing), atol=1e-4)
    both = 3.0 * denoise(1.0, batch) - 2.0 * denoise(0.0, batch)
    np.testing.assert_allclose(denoise(3.0, batch), both, atol=1e-3)


def test_scan_equals_loop(params):
    """The sampler's scan against the algorithm written out."""
    model = MODEL.with_sampling(name="ddpm", num_steps=5, guidance_scale=2.0)
    batch, shape = make_batch(), (3, 32, 128)
    x = jax.random.normal(jax.random.key(5), shape)

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(6), i), shape)

    scanned = jax.jit(model.sample_from, static_argnums=3)(params, batch, x, noise_fn)
    denoise_fn = model.denoiser(params, model._encode(params, batch, None))
    for i in range(4, -1, -1):
        lt, ls = (model.schedule.log_snr(jnp.float32(j / 5)) for j in (i + 1, i))
        x_0 = denoise_fn(x, lt, model._apply(params, jnp.asarray([(i + 1) / 5], jnp.float32), method="condition_time"))
        x = x_0 if i == 0 else samplers.ddpm_step(x, x_0, lt, ls, noise_fn(i), model.sampler.variance)
    np.testing.assert_allclose(scanned, unscale_mel(x), atol=0.02)


SCHEDULES = [CosineSchedule(), LogNormalSchedule(), LinearSchedule()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_of_is_the_inverse_of_a_schedule(schedule):
    t = jnp.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(time_of(schedule, schedule.log_snr(t)), t, atol=2e-6)
    np.testing.assert_allclose(time_of(schedule, jnp.asarray([90.0, -90.0])), [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_and_preserve_variance(schedule):
    log_snr = schedule.log_snr(jnp.linspace(0, 1, 101))
    assert np.all(np.diff(log_snr) < 0) and np.all(np.isfinite(log_snr))
    np.testing.assert_allclose(alpha(log_snr) ** 2 + sigma(log_snr) ** 2, 1.0, rtol=1e-6)


def test_conversions_are_inverses():
    rng = np.random.default_rng(0)
    x_0, eps = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2))
    log_snr = jnp.asarray([-8.0, -1.0, 0.0, 6.0])[:, None]
    x_t = process.diffuse(x_0, eps, log_snr)
    v = alpha(log_snr) * eps - sigma(log_snr) * x_0
    for output, kind in ((eps, "eps"), (x_0, "x0"), (v, "v"), (jnp.concatenate([x_0, eps], -1), "x0_and_eps")):
        back = process.to_x_0_and_eps(output, x_t, log_snr, kind)
        np.testing.assert_allclose(back[0], x_0, atol=2e-3)
        np.testing.assert_allclose(back[1], eps, atol=2e-3)


def test_logical_axes_cover_every_parameter(params):
    axes = MODEL.logical_axes()

    def is_leaf(leaf):
        return isinstance(leaf, tuple)

    ranks = jax.tree.map(len, axes, is_leaf=is_leaf)
    assert ranks == jax.tree.map(jnp.ndim, params)
    known = {"vocab", "embed", "joined_kv", "mlp", "mel", "length", "layers"}
    assert {name for leaf in jax.tree.leaves(axes, is_leaf=is_leaf) for name in leaf} <= known


def test_settings_are_checked():
    assert MODEL.with_sampling(num_steps=9, name="ddpm").sampler == Sampler("ddpm", 9)
    assert MODEL.with_sampling(rho=3).with_sampling(rho=3.5).sampler.rho == 3.5  # a recipe may write 3
    for bad in (dict(steps=3), dict(num_steps=0), dict(name="leapfrog"), dict(variance="huge"), dict(guidance_scale=-1),
                dict(guidance_scale=float("inf")), dict(guidance_scale=float("nan")), dict(grid="cosine"),
                dict(rho=0), dict(min_log_snr=9)):  # fmt: skip
        with pytest.raises(UserError, match=str(next(iter(bad.values()))) if "steps" not in bad else "num_steps"):
            MODEL.with_sampling(**bad)
    for bad in (dict(prediction_type="x"), dict(loss_norm="l3"), dict(condition_dropout=1.0), dict(loss_target="mel")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Diffusion(**bad)
