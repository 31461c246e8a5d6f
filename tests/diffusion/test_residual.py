"""Diffusion of what a prior leaves open: unit variances, temperature, and what seeds do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import scale_mel
from music_synth.diffusion import process
from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.objective import Diffusion, elementwise_loss
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, LogNormalSchedule
from music_synth.errors import UserError
from tests.diffusion.test_diffusion import make_batch
from tests.models.test_prior import MODEL, NETWORK

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def sample():
    def of(params, seed, **settings):
        model = MODEL.with_sampling(**settings)
        return np.asarray(jax.jit(model.sample)(params, make_batch(), jax.random.key(seed)))

    return of


def test_noise_is_as_likely_as_the_schedule_says():
    log_snr = np.asarray(LogNormalSchedule(-0.5, 1.2).log_snr(jnp.linspace(0.0005, 0.9995, 1000)))
    log_sigma = -0.5 * log_snr
    assert np.all(np.diff(log_sigma) > 0)
    np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [-0.5, 1.2], rtol=0.01)


@pytest.mark.parametrize("log_snr", [-8.0, 0.0, 8.0])
def test_what_the_network_reads_and_learns_has_unit_variance(log_snr):
    """For data of unit variance, at any noise (Karras et al. 2022, section 5); and zero is the best linear answer."""
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 200, 500))
    x_t, v = process.diffuse(x_0, eps, log_snr), process.v_of(x_0, eps, log_snr)
    np.testing.assert_allclose([jnp.var(x_t), jnp.var(v)], 1.0, atol=0.02)
    assert abs(float(jnp.mean(x_t * v))) < 0.02


def test_the_error_of_v_is_that_of_x_0_weighted():
    x_0, eps, said = jax.random.normal(jax.random.key(1), (3, 2, 4, 5))
    log_snr = jnp.full((2, 1, 1), 1.3)
    x_t = process.diffuse(x_0, eps, log_snr)
    error = elementwise_loss(said, x_0, eps, x_t, log_snr, "v", "v", "l2")
    np.testing.assert_allclose(error, (said - process.v_of(x_0, eps, log_snr)) ** 2, rtol=1e-5)
    of_x_0 = elementwise_loss(said, x_0, eps, x_t, log_snr, "v", "x0", "l2")
    np.testing.assert_allclose(of_x_0, error * jax.nn.sigmoid(-log_snr), rtol=1e-4)
    other = process.to_x_0(said, x_t, log_snr, "v")
    np.testing.assert_allclose(elementwise_loss(other, x_0, eps, x_t, log_snr, "x0", "v", "l2"), error, rtol=1e-3)


def test_steps_keep_the_variance_of_gaussian_data():
    """Zero is the best v for white Gaussian data: Euler's steps in the angle are then exact, however few."""
    settings = Sampler("euler", 4, grid="karras", rho=3.0, min_log_snr=-4.2, max_log_snr=7.0, clip_x_0=False)
    schedule, noise = LogNormalSchedule(), jax.random.normal(jax.random.key(0), (1, 100, 1000))
    times = samplers.grid_times(settings, schedule)

    def denoise_fn(x, log_snr, _):
        return process.to_x_0(jnp.zeros_like(x), x, log_snr, "v")

    x = samplers.sample(denoise_fn, noise, times, jnp.zeros(4), None, schedule, settings)
    assert 0.98 < float(jnp.var(x)) < 1.02


def test_temperature_0_is_the_mean_and_the_rest_scales_with_it(params, sample):
    prior = MODEL._encode(params, make_batch(), None).prior
    mean = sample(params, 0, temperature=0.0)
    np.testing.assert_array_equal(mean, sample(params, 1, temperature=0.0))
    np.testing.assert_allclose(scale_mel(mean, clip=False), jnp.clip(prior.mean, -1.0, 1.0), atol=1e-5)
    half, whole = sample(params, 0, temperature=0.5), sample(params, 0, temperature=1.0)
    inside = np.all([np.abs(scale_mel(mel, clip=False)) < 0.999 for mel in (mean, half, whole)], axis=0)
    assert inside.mean() > 0.2
    np.testing.assert_allclose((whole - mean)[inside], 2 * (half - mean)[inside], atol=2e-3)


def test_seeds_tell_renditions_apart(params, sample):
    first, again, other = (sample(params, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.1


def test_what_a_residual_cannot_be_sampled_with_is_refused():
    with pytest.raises(UserError, match="guidance_scale"):
        MODEL.with_sampling(guidance_scale=2.0)
    with pytest.raises(UserError, match="clip_x_0"):
        MODEL.with_sampling(clip_x_0=True)
    with pytest.raises(UserError, match="temperature = -1"):
        MODEL.with_sampling(temperature=-1.0)
    published = Diffusion(dataclasses.replace(NETWORK, num_prior_layers=0, decoder="transformer"), CosineSchedule())
    with pytest.raises(UserError, match="num_prior_layers"):
        published.with_sampling(temperature=0.5)
