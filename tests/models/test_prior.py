"""The prior: whitening, its inverse, what it learns of, and what it carries over from the context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import unscale_mel
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import LogNormalSchedule
from music_synth.models.prior import MIN_VARIANCE, Prior, last_frames, whitening
from music_synth.models.transformer import CrossCache
from tests import golden_arrays
from tests.diffusion.test_diffusion import make_batch
from tests.models.test_transformer import TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORK = dataclasses.replace(TINY, note_roll=True, num_prior_layers=1, decoder="convolutional", dropout_rate=0.0)
MODEL = Diffusion(
    NETWORK,
    LogNormalSchedule(),
    prediction_type="v",
    loss_target="v",
    condition_dropout=0.0,
    sampler=Sampler(num_steps=3, grid="karras", clip_x_0=False),
)


@pytest.fixture(scope="module")
def params():
    """Random everywhere, with a covariance that is one."""
    random = jax.jit(MODEL.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(random)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    random = jax.tree.unflatten(tree, moved)
    root = np.random.default_rng(2).normal(size=(128, 256))
    random["prior"]["covariance"] = jnp.asarray(root @ root.T / 256, jnp.float32)
    return random


def test_whitening_makes_frames_white_and_coloring_is_its_inverse():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(20000, 6)) @ rng.normal(size=(6, 6))
    whiten, color = (np.asarray(a) for a in whitening(jnp.asarray(np.cov(frames.T), jnp.float32)))
    np.testing.assert_allclose(np.cov((frames @ whiten).T), np.eye(6), atol=1e-3)
    np.testing.assert_allclose(whiten @ color, np.eye(6), atol=1e-4)
    np.testing.assert_allclose(whiten, whiten.T, atol=1e-5)


def test_directions_without_variance_stay_finite():
    whiten, _ = whitening(jnp.zeros((4, 4)))
    np.testing.assert_allclose(whiten, np.eye(4) / np.sqrt(MIN_VARIANCE), rtol=1e-5)


def test_the_residual_and_the_mel_are_one_another(params):
    batch = make_batch()
    prior = jax.jit(lambda p, b: MODEL._encode(p, b, None))(params, batch).prior
    x_0 = prior.mean + 0.02 * jax.random.normal(jax.random.key(0), prior.mean.shape)
    inside = jnp.clip(x_0, -0.99, 0.99)
    there = MODEL.to_residual(params, prior, inside)
    np.testing.assert_allclose(MODEL.from_residual(params, prior, there), inside, atol=2e-4)
    np.testing.assert_array_equal(MODEL.from_residual(params, prior, there, 0.0), jnp.clip(prior.mean, -1.0, 1.0))


def test_deviations_say_nothing_to_the_mean(params):
    """The gradient of what only concerns deviations does not reach the layer of the mean."""
    batch = make_batch()

    def likelihood(p):
        return MODEL.prior_loss(MODEL._encode(p, batch, None), batch, False)[1]["prior_likelihood"]

    gradients = jax.jit(jax.grad(likelihood))(params)["prior"]
    assert not np.any(gradients["mean"]["kernel"]) and np.any(gradients["log_deviation"]["kernel"])


def test_the_denoiser_does_not_pull_at_the_prior(params):
    """Its error has no gradient in whatever stands before it; the prior's own loss has one in all of it."""
    batch = make_batch()

    def error(p):
        t, eps = jnp.full(3, 0.5), jnp.zeros((3, 32, 128))
        return jnp.sum(golden_arrays.denoising_error(MODEL, p, batch, t, eps))

    gradients = jax.jit(jax.grad(error))(params)
    before = [gradients[name] for name in ("prior", "note_roll", "encoder")]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["decoder"]))


def test_statistics_are_the_covariance_of_normalized_frames():
    rng = np.random.default_rng(0)
    mel = jnp.asarray(rng.uniform(-11, 4, (2, 32, 128)), jnp.float32)
    mask = jnp.asarray(np.arange(32)[None] < np.array([[32], [5]]))
    prior = Prior(jnp.zeros((2, 32, 128)), jnp.full((2, 32, 128), -1.0), jnp.zeros((2, 32, 128)), jnp.zeros((2, 32, 4)))
    batch = {"mel": mel, "mel_mask": mask}
    cache = CrossCache((), (), prior=prior)
    found = MODEL.prior_loss(cache, batch, True)[1]["statistics"]["prior"]["covariance"]
    frames = np.asarray(MODEL._to_model(mel))[np.asarray(mask)] * np.e
    np.testing.assert_allclose(found, frames.T @ frames / 37, atol=1e-3)
    assert "statistics" not in MODEL.prior_loss(cache, batch, False)[1]


def test_last_frames_end_where_the_mask_does():
    frames = jnp.arange(10.0).reshape(1, 5, 2).repeat(3, axis=0)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    taken, known = last_frames(frames, mask, 3)
    np.testing.assert_array_equal(taken[0], frames[0, 2:])
    np.testing.assert_array_equal(taken[1, 1:], frames[1, :2])
    np.testing.assert_array_equal(known[..., 0], [[1, 1, 1], [0, 1, 1], [0, 0, 0]])


def test_the_last_frame_of_the_context_fades_into_a_segment_without_notes(params):
    """Reverberation lasts over the border; without a context there is silence."""
    batch = make_batch()
    nothing = batch | {"note_tokens": jnp.zeros_like(batch["note_tokens"]), "context_mask": jnp.ones((3, 32), bool)}
    roll = jax.jit(lambda p, b: MODEL._encode(p, b, None))(params, nothing).roll.mean(axis=(0, 2))
    assert roll[0] > 0.1 and np.all(np.diff(roll) < 0) and roll[-1] < 0.9 * roll[0]
    nothing["context_mask"] = jnp.zeros((3, 32), bool)
    assert np.abs(jax.jit(lambda p, b: MODEL._encode(p, b, None))(params, nothing).roll).max() < 1e-5


def test_lasting_noise_has_unit_variance_and_the_persistence_it_is_given():
    noise = jax.random.normal(jax.random.key(0), (400, 32, 8))
    persistence = jnp.where(jnp.arange(32)[None, :, None] % 16 == 0, 0.0, 0.9 * jnp.ones((400, 32, 8)))
    lasting = np.asarray(Prior(noise, noise, persistence, noise).lasting(noise))
    np.testing.assert_allclose(lasting.var(axis=(0, 2)), 1.0, atol=0.1)
    correlation = (lasting[:, 1:] * lasting[:, :-1]).mean(axis=(0, 2))
    np.testing.assert_allclose(correlation, np.where(np.arange(1, 32) % 16, 0.9, 0.0), atol=0.1)


def test_persistence_learns_the_correlation_of_frames():
    """Of all persistences the loss is least at the true one."""
    rng, frames = np.random.default_rng(0), [np.zeros((4, 128))]
    for _ in range(399):
        frames.append(0.8 * frames[-1] + 0.6 * rng.normal(size=(4, 128)))
    x_0 = jnp.asarray(0.1 * np.stack(frames, axis=1), jnp.float32)
    batch = {"mel": unscale_mel(x_0), "mel_mask": jnp.ones((4, 400), bool)}

    def likelihood(persistence):
        prior = Prior(0 * x_0, 0 * x_0 + np.log(0.1), 0 * x_0 + persistence, x_0)
        return float(MODEL.prior_loss(CrossCache((), (), prior=prior), batch, False)[1]["prior_likelihood"])

    assert min((likelihood(p), p) for p in (0.0, 0.5, 0.7, 0.8, 0.9, 0.97))[1] == 0.8
