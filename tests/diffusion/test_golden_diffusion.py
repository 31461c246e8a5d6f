"""Schedules, conversions, losses, sampler steps, trajectories and gradients against the reference numbers."""

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
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule, alpha, sigma
from tests import golden_arrays
from tests.models.test_transformer import TINY

PUBLISHED = dict(prediction_type="eps", loss_target="eps", loss_norm="l1")


@pytest.fixture(scope="module")
def golden():
    return golden_arrays.load("diffusion")


def test_schedules(golden):
    t = golden["schedule/t"]
    cosine = np.asarray(CosineSchedule().log_snr(t))
    late = t > 0.99
    np.testing.assert_allclose(cosine[~late], golden["schedule/cosine_logsnr"][~late], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cosine[late], golden["schedule/cosine_logsnr"][late], atol=2e-3)
    for name in ("linear_a", "linear_b"):
        start, end, steps = golden[f"schedule/{name}_start_stop_steps"]
        log_snr = LinearSchedule(float(start), float(end), int(steps)).log_snr(t)
        np.testing.assert_allclose(log_snr, golden[f"schedule/{name}_logsnr"], rtol=1e-5, atol=1e-4)
    reference = jnp.asarray(golden["schedule/cosine_logsnr"])
    np.testing.assert_allclose(alpha(reference) * 0.7, golden["forward/x0_0.7_mean"], rtol=1e-5)
    np.testing.assert_allclose(sigma(reference), golden["forward/x0_0.7_std"], rtol=1e-5)


def conversion_inputs(golden):
    log_snr = jnp.asarray(golden["conv/logsnr"])[:, None, None]
    return (jnp.asarray(golden[f"conv/{name}"]) for name in ("x0", "eps", "z")), log_snr


def test_conversions(golden):
    (x_0, eps, x_t), log_snr = conversion_inputs(golden)
    output = jnp.asarray(golden["conv/some_output"])

    def close(a, name):
        return np.testing.assert_allclose(a, golden[f"conv/{name}"], rtol=1e-5, atol=1e-5)

    close(process.diffuse(x_0, eps, log_snr), "z")
    close(process.eps_from_x_0(x_t, output, log_snr), "eps_from_x0")
    close(process.x_0_from_eps(x_t, output, log_snr), "x0_from_eps")
    close(process.x_0_from_v(x_t, output, log_snr), "x0_from_v")


@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_predictions_and_losses(golden, prediction_type):
    (x_0, eps, x_t), log_snr = conversion_inputs(golden)
    name = "some_output_double" if prediction_type == "x0_and_eps" else "some_output"
    output = jnp.asarray(golden[f"conv/{name}"])
    predicted = process.to_x_0_and_eps(output, x_t, log_snr, prediction_type)
    for value, key in zip(predicted, ("x0", "eps"), strict=True):
        np.testing.assert_allclose(value, golden[f"conv/{prediction_type}/{key}"], rtol=1e-5, atol=2e-5)
    for target in ("x0", "eps", "max_x0_eps", "x0_and_eps"):
        for norm in ("l1", "l2"):
            loss = elementwise_loss(output, x_0, eps, x_t, log_snr, prediction_type, target, norm)
            expected = golden[f"loss/{prediction_type}/{target}/{norm}"]
            np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=2e-5)


def test_sampler_steps(golden):
    x_0, x_t = jnp.asarray(golden["step/pred_x0"]), jnp.asarray(golden["step/z_t"])
    for i in golden["step/i"]:
        lt, ls = (jnp.asarray(golden[f"step/{i}/logsnr_{x}"])[:, None, None] for x in "ts")
        noise = jnp.asarray(golden[f"step/{i}/noise"])
        if i == 0:  # the loop returns x_0 itself, as the reference does
            for name in ("ddpm_small", "ddpm_large", "ddim"):
                np.testing.assert_array_equal(golden[f"step/0/{name}"], x_0)
            continue
        for variance in ("small", "large", "medium:0.5", "medium:0.2"):
            step = samplers.ddpm_step(x_t, x_0, lt, ls, noise, variance)
            np.testing.assert_allclose(step, golden[f"step/{i}/ddpm_{variance}"], rtol=1e-5, atol=1e-6)
            mean, log_variance = samplers.ddpm_posterior(x_t, x_0, lt, ls, variance)
            np.testing.assert_allclose(mean, golden[f"step/{i}/{variance}/mean"], rtol=1e-5, atol=1e-6)
            expected = golden[f"step/{i}/{variance}/logvar"]
            np.testing.assert_allclose(log_variance[:, 0, 0], expected, rtol=1e-5, atol=1e-6)
        eps = jnp.asarray(golden["step/pred_eps"])  # the stored step is given x_0 and eps, each on its own
        ddim = alpha(ls) * x_0 + sigma(ls) * eps
        np.testing.assert_allclose(ddim, golden[f"step/{i}/ddim"], rtol=1e-5, atol=1e-6)
        consistent = process.diffuse(x_0, eps, lt)
        step = samplers.ddim_step(consistent, x_0, lt, ls)
        np.testing.assert_allclose(step, ddim, rtol=2e-4, atol=2e-4)


def trajectory(golden, **settings):
    """Model, parameters, batch, first noise and noise function of a stored 8-step run."""
    model = Diffusion(TINY, sampler=Sampler(num_steps=8, **settings), **PUBLISHED)
    params = golden_arrays.tree(golden_arrays.load("network_context"))
    batch = {
        "note_tokens": golden["traj/tokens"],
        "context_mel": golden["traj/context_logmel"],
        "context_mask": golden["traj/context_mask"] > 0,
    }
    noise = jnp.stack([jnp.asarray(golden[f"traj/noise_{max(i, 1)}"]) for i in range(8)])
    return model, params, batch, jnp.asarray(golden["traj/initial_noise"]), lambda i: noise[i]


RUNS = {
    "ddpm_large_w1": dict(name="ddpm", variance="large", guidance_scale=1.0),
    "ddpm_large_w5": dict(name="ddpm", variance="large", guidance_scale=5.0),
    "ddpm_medium0.5_w2": dict(name="ddpm", variance="medium:0.5", guidance_scale=2.0),
    "ddim_w2": dict(name="ddim", guidance_scale=2.0),
}


@pytest.mark.parametrize("run", RUNS)
def test_trajectories_replay(golden, run):
    """Free-running from the stored noise; two compilations of the reference differ as much as allowed here."""
    model, params, batch, x_1, noise_fn = trajectory(golden, **RUNS[run])
    np.testing.assert_allclose(scale_mel(batch["context_mel"], clip=True), golden["traj/context_scaled"], atol=1e-6)
    mel = jax.jit(model.sample_from, static_argnums=3)(params, batch, x_1, noise_fn)
    scaled = scale_mel(mel, clip=False)
    np.testing.assert_allclose(scaled, golden[f"traj/{run}/z_after_step_i0"], atol=0.05)
    unit = 1.0 if run.endswith("w1") else 3.0  # guidance multiplies rounding
    error = np.abs(np.asarray(mel) - golden[f"traj/{run}/final_logmel"])
    assert np.median(error) < 2e-3 * unit
    np.testing.assert_allclose(mel, golden[f"traj/{run}/predict_batch_logmel"], atol=0.4)


@pytest.mark.parametrize("run", ["ddpm_large_w1", "ddpm_large_w5"])
def test_each_step_of_a_trajectory(golden, run):
    """Restarted at every stored state: the step given stored network outputs, and with the network."""
    model, params, batch, x_1, noise_fn = trajectory(golden, **RUNS[run])
    cache = model._encode(params, batch, None)
    denoise_fn = jax.jit(model.denoiser(params, cache))
    w = model.sampler.guidance_scale
    times = samplers.grid_times(model.sampler, model.schedule)[:-1]
    film = jax.jit(lambda t: model._apply(params, t, method="condition_time"))(times)[:, None]
    state = x_1
    for i in range(7, -1, -1):
        lt, ls = (model.schedule.log_snr(jnp.float32(j / 8)) for j in (i + 1, i))
        following = golden[f"traj/{run}/z_after_step_i{i}"]

        def step(x_0):
            return x_0 if i == 0 else samplers.ddpm_step(state, x_0, lt, ls, noise_fn(i), "large")  # noqa: B023

        key = f"traj/{run}/step{i}"
        if f"{key}/cond_output" in golden:
            output = golden[f"{key}/cond_output"]
            if w != 1:
                output = w * output + (1 - w) * golden[f"{key}/uncond_output"]
            x_0 = jnp.clip(process.to_x_0(jnp.asarray(output), state, lt, "eps"), -1, 1)
            error = np.abs(np.asarray(step(x_0)) - following)
            assert np.quantile(error, 0.999 if i == 7 else 1.0) < (2e-4 if i == 7 else 5e-6), (i, error.max())
        error = np.abs(np.asarray(step(denoise_fn(state, lt, film[7 - i]))) - following)
        assert np.quantile(error, 0.999 if i == 7 else 1.0) < (1e-3 if w == 1 else 5e-3), (i, error.max())
        state = jnp.asarray(following)


@pytest.fixture(scope="module")
def train_step():
    return golden_arrays.load("train_step")


def stored_step(arrays):
    """Batch and noise of the stored training step; the reference sums, so tests sum."""
    batch = {
        "note_tokens": arrays["batch/encoder_input_tokens"],
        "context_mel": arrays["batch/encoder_continuous_inputs"],
        "context_mask": arrays["batch/encoder_continuous_mask"] > 0,
        "mel": arrays["batch/decoder_target_tokens"],
    }
    mask = jnp.asarray(arrays["batch/decoder_target_mask"], jnp.float32)[..., None]
    keep = jnp.asarray(arrays["noise/include_conditioning"] > 0)

    def summed(model, params):
        t, eps = (jnp.asarray(arrays[f"noise/{name}"]) for name in ("time", "eps"))
        error = golden_arrays.denoising_error(model, params, batch, t, eps, keep)
        return jnp.sum(error * mask)

    return batch, summed


def test_noising(train_step):
    x_0 = scale_mel(jnp.asarray(train_step["batch/decoder_target_tokens"]), clip=True)
    np.testing.assert_allclose(x_0, train_step["noise/x0"], atol=1e-6)
    log_snr = CosineSchedule().log_snr(train_step["noise/time"])[:, None, None]
    x_t = process.diffuse(x_0, train_step["noise/eps"], log_snr)
    np.testing.assert_allclose(x_t, train_step["noise/z_t"], atol=1e-5)


def test_loss_and_gradients(train_step):
    params = golden_arrays.tree(golden_arrays.load("network_context"))
    model = Diffusion(TINY, **PUBLISHED)
    _, summed = stored_step(train_step)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: summed(model, p)))(params)
    np.testing.assert_allclose(loss, train_step["loss"], rtol=1e-5)
    expected = golden_arrays.tree(train_step, "grads/")
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= 1e-3 * max(np.abs(b).max(), 1e-12)
    for changes, key in (
        (dict(loss_target="max_x0_eps"), "loss_l1_max"),
        (dict(prediction_type="v", loss_target="x0", loss_norm="l2"), "loss_l2_v"),
    ):
        loss = jax.jit(summed, static_argnums=0)(dataclasses.replace(model, **changes), params)
        np.testing.assert_allclose(loss, train_step[key], rtol=2e-5)
