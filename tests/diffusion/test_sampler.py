"""Samplers against distributions whose denoiser, and whose flow, are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule, alpha, sigma

pytestmark = pytest.mark.usefixtures("quick_compilation")

# x_0 is a mixture of two normal distributions.
WEIGHTS, MEANS, WIDTH = np.float32([0.3, 0.7]), np.float32([-0.6, 0.4]), np.float32(0.15)
MIXTURE_MEAN = float(WEIGHTS @ MEANS)
MIXTURE_STD = float(np.sqrt(WEIGHTS @ MEANS**2 - MIXTURE_MEAN**2 + WIDTH**2))
SCHEDULE = CosineSchedule()
STEP_COUNTS = (16, 32, 64)


def denoise_fn(x_t, log_snr, _):
    """E[x_0 | x_t] under the mixture."""
    a, s = alpha(log_snr), sigma(log_snr)
    variance = (a * WIDTH) ** 2 + s**2
    distances = [x_t - a * mean for mean in MEANS]
    logits = [jnp.log(w) - 0.5 * d**2 / variance for w, d in zip(WEIGHTS, distances, strict=True)]
    first, second = (mean + a * WIDTH**2 / variance * d for mean, d in zip(MEANS, distances, strict=True))
    share = jax.nn.sigmoid(logits[0] - logits[1])
    return share * first + (1.0 - share) * second


def flow(x, log_snr_t, log_snr_s):
    """Where the probability-flow ODE takes x from t to s.

    In one dimension it keeps the order of points, so it is the map between quantiles.
    """

    def cdf(x, log_snr):
        a, s = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
        return scipy.stats.norm.cdf(x[..., None], a * MEANS, np.hypot(a * WIDTH, s)) @ WEIGHTS.astype(float)

    quantile, (low, high) = cdf(x, log_snr_t), np.full((2, *x.shape), [[-10.0], [10.0]])
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, log_snr_s) < quantile
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def errors(name, grid):
    """Root mean square distance from the exact flow at the end of a grid, for each of STEP_COUNTS.

    All grids have the same ends: of the one uniform in t a sixteenth is left out at either end, where the log-SNR
    takes the same steps however many there are.
    """
    x = jnp.linspace(-2.0, 2.0, 201)
    found = []
    for num_steps in STEP_COUNTS:
        settings = Sampler(name, num_steps, grid=grid, min_log_snr=-8.0, max_log_snr=6.0)
        log_snr = SCHEDULE.log_snr(samplers.grid_times(settings, SCHEDULE)[:-1])
        if grid == "t":
            log_snr = log_snr[num_steps // 16 : num_steps + 1 - num_steps // 16]

        def denoise(x, j, log_snr=log_snr):
            return denoise_fn(x, log_snr[j], None)

        walk = jax.jit(functools.partial(samplers.SAMPLERS[name], denoise, noise=None, sampler=settings))
        exact = flow(np.asarray(x, np.float64), float(log_snr[0]), float(log_snr[-1]))
        found.append(np.sqrt(np.mean((np.asarray(walk(x=x, log_snr=log_snr)) - exact) ** 2)))
    return np.asarray(found)


@pytest.mark.parametrize("grid", ["t", "log_snr", "karras"])  # "leading" is "t", but for the ends
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order, grid):
    found = errors(name, grid)
    slope = -np.polyfit(np.log(STEP_COUNTS), np.log(found), 1)[0]
    assert abs(slope - order) < 0.3, (found, slope)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_samplers_draw_from_the_mixture(name):
    """Means, spreads and quantiles of many draws; one step lands on the mean whatever the sampler."""
    x_1 = jax.random.normal(jax.random.key(0), (20000,))

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x_1.shape)

    def draw(settings):
        times = samplers.grid_times(settings, SCHEDULE)
        nothing = jnp.zeros(settings.num_steps)

        def walk(x):
            return samplers.sample(denoise_fn, x, times, nothing, noise_fn, SCHEDULE, settings)

        return np.asarray(jax.jit(walk)(x_1))

    x_0 = draw(Sampler(name, 100, variance="small"))
    assert abs(x_0.mean() - MIXTURE_MEAN) < 0.015
    assert abs(x_0.std() - MIXTURE_STD) < 0.015
    rng = np.random.default_rng(0)
    true = rng.choice(MEANS, p=WEIGHTS.astype(float), size=20000) + WIDTH * rng.normal(size=20000)
    at = np.linspace(0.02, 0.98, 25)
    assert np.abs(np.quantile(x_0, at) - np.quantile(true, at)).mean() < 0.02
    np.testing.assert_allclose(draw(Sampler(name, 1)), MIXTURE_MEAN, atol=1e-3)


def test_second_order_is_worth_its_name():
    """At equal calls of the network the second order is nearer to the truth than the first."""
    ddim, dpmpp, heun = (errors(name, "log_snr") for name in ("ddim", "dpmpp_2m", "heun"))
    assert np.all(dpmpp < 0.2 * ddim)
    assert np.all(heun[:-1] < 0.5 * ddim[1:])  # Heun's n steps cost as much as 2n of the others


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()])
def test_grids_lie_where_they_say(schedule):
    limits = dict(num_steps=9, min_log_snr=-12.0, max_log_snr=30.0)  # the schedules end before 30, the linear at -10
    first, last = max(-12.0, float(schedule.log_snr(jnp.float32(1)))), float(schedule.log_snr(jnp.float32(0)))
    np.testing.assert_allclose(samplers.grid_times(Sampler(num_steps=4), schedule), [1, 0.75, 0.5, 0.25, 0])
    for grid in ("log_snr", "karras"):
        settings = Sampler(grid=grid, rho=5.0, **limits)
        times = samplers.grid_times(settings, schedule)
        assert times.shape == (10,) and times[-1] == 0 and np.all(np.diff(times) <= 0)
        log_snr = np.asarray(schedule.log_snr(times[:-1]))
        np.testing.assert_allclose(log_snr[[0, -1]], [first, last], atol=0.02)
        even = log_snr if grid == "log_snr" else np.exp(-0.5 * log_snr / 5.0)
        np.testing.assert_allclose(np.diff(even), (even[-1] - even[0]) / 8, rtol=0.01, atol=2e-3)
        one = samplers.grid_times(Sampler(grid=grid, num_steps=1, min_log_snr=-8.0), schedule)
        np.testing.assert_allclose(schedule.log_snr(one[:1]), -8.0, atol=1e-3)
