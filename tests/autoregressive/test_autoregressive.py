"""The autoregressive decoder: reference numbers, cached decoding, output distributions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from music_synth.autoregressive.objective import Autoregressive, shift_right
from music_synth.autoregressive.outputs import Deterministic, GaussianMixture
from music_synth.errors import UserError
from music_synth.models.base import masked_mean
from tests import golden_arrays
from tests.diffusion.test_diffusion import make_batch
from tests.models.test_transformer import TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")

NO_CONTEXT = dataclasses.replace(TINY, context_frames=0)


@pytest.fixture(scope="module")
def golden():
    return golden_arrays.load("network_autoregressive")


@pytest.fixture(scope="module")
def published(golden):
    return Autoregressive(NO_CONTEXT, as_published=True), golden_arrays.tree(golden)


def test_teacher_forced_matches_reference(golden, published):
    model, params = published
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert shapes == jax.tree.map(np.shape, params)
    batch = {"note_tokens": golden["inputs/tokens"]}
    target = jnp.asarray(golden["inputs/decoder_target"])
    np.testing.assert_array_equal(shift_right(target, 0.0), golden["inputs/decoder_input"])
    channels = jax.jit(partial(golden_arrays.teacher_forced, model))(params, batch, shift_right(target, 0.0))
    np.testing.assert_allclose(channels, golden["out/teacher_forced"], atol=3e-5)
    per_frame = model.output.loss(channels, target)
    np.testing.assert_allclose(per_frame, golden["loss/deterministic_per_frame"], rtol=1e-5, atol=1e-5)
    mask = golden["inputs/target_mask"] > 0
    total = jnp.sum(per_frame * mask.astype(np.float32))
    np.testing.assert_allclose(total, golden["loss/deterministic_total_masked"], rtol=1e-5)
    batch |= {"mel": target, "mel_mask": mask}
    loss, _ = model.loss(params, batch, jax.random.key(0), False)  # here: the mean over frames
    np.testing.assert_allclose(loss, golden["loss/deterministic_total_masked"] / mask.sum(), rtol=1e-5)


def test_cached_decoding_matches_reference(golden, published):
    model, params = published
    mel = jax.jit(model.sample)(params, {"note_tokens": golden["inputs/tokens"]}, jax.random.key(0))
    np.testing.assert_allclose(mel, golden["out/cached_decode"], atol=2e-3)
    np.testing.assert_allclose(mel, golden["out/uncached_greedy"], atol=2e-3)


def test_faults_are_mended_by_default(published):
    """Padding is not attended to, and decoding starts from silence; as published, a longer padding changes much."""
    _, params = published
    tokens = make_batch()["note_tokens"]
    length = tokens.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (0, 24)))

    def sample(as_published, tokens, max_tokens=length + 24):
        network = dataclasses.replace(NO_CONTEXT, max_tokens=max_tokens)
        model = Autoregressive(network, as_published=as_published)
        return jax.jit(model.sample)(params, {"note_tokens": tokens}, jax.random.key(0))

    np.testing.assert_allclose(sample(False, tokens), sample(False, padded), atol=1e-2)
    longest = sample(True, padded)
    assert float(jnp.abs(sample(True, tokens, length) - longest).max()) > 0.1
    np.testing.assert_allclose(sample(True, tokens), longest, atol=1e-3)  # filled up to max_tokens in either case
    np.testing.assert_array_equal(shift_right(jnp.ones((1, 2, 3)), -1.0)[0, 0], -1.0)


MODELS = {
    "deterministic": Autoregressive(TINY),
    "mixture": Autoregressive(TINY, output=GaussianMixture(3, temperature=0.0)),
    "scanned": Autoregressive(dataclasses.replace(TINY, scan_layers=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_full_decoding(name):
    """Feeding the sampled frames back through one full pass gives the same frames, with context."""
    model = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0))
    batch = make_batch()
    keys = jax.random.split(jax.random.key(1), len(batch["note_tokens"]))
    mel = jax.jit(model.sample)(params, batch, keys)
    scaled = 2 * (mel - np.log(1e-5)) / (4 - np.log(1e-5)) - 1
    channels = jax.jit(partial(golden_arrays.teacher_forced, model))(params, batch, shift_right(scaled, -1.0))

    def draw(frame, key, i):
        return model.output.sample(frame, jax.random.fold_in(key, i))

    again = jax.vmap(jax.vmap(draw, (0, None, 0)), (0, 0, None))(channels, keys, jnp.arange(32))
    np.testing.assert_allclose(scaled, again, atol=2e-4)


def test_context_matters_and_its_mask_hides_it():
    model = MODELS["deterministic"]
    params = jax.jit(model.init)(jax.random.key(0))
    batch = make_batch()
    sample = jax.jit(model.sample)
    plain = sample(params, batch, jax.random.key(0))
    other = sample(params, dict(batch, context_mel=batch["context_mel"][::-1] - 1.0), jax.random.key(0))
    assert float(jnp.abs(plain - other)[1].max()) > 1e-3
    hidden = dict(batch, context_mask=jnp.zeros_like(batch["context_mask"]))
    a = sample(params, hidden, jax.random.key(0))
    b = sample(params, dict(hidden, context_mel=0 * batch["context_mel"]), jax.random.key(0))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_loss_noise_and_dropout_only_in_training():
    model = Autoregressive(TINY, input_noise=0.1)
    params = jax.jit(model.init)(jax.random.key(0))
    loss = jax.jit(model.loss, static_argnums=3)
    batch = make_batch()
    evaluated = [float(loss(params, batch, jax.random.key(k), False)[0]) for k in (0, 1)]
    trained = [float(loss(params, batch, jax.random.key(k), True)[0]) for k in (0, 1)]
    assert evaluated[0] == evaluated[1] and trained[0] != trained[1]


def moments(mixture, channels):
    """Mean and variance of a mixture, [..., dims] each."""
    log_weights, means, deviations = mixture.split(channels)
    weights = jnp.exp(log_weights)[..., None]
    mean = jnp.sum(weights * means, axis=-2)
    return mean, jnp.sum(weights * (jnp.square(deviations) + jnp.square(means)), axis=-2) - jnp.square(mean)


def test_mixture_matches_reference(golden):
    components, dims = golden["gmm/n_components_dims"]
    mixture = GaussianMixture(int(components))
    outputs, targets = jnp.asarray(golden["gmm/outputs"]), jnp.asarray(golden["gmm/targets"])
    assert mixture.num_channels(int(dims)) == outputs.shape[-1]
    np.testing.assert_allclose(mixture.loss(outputs, targets), golden["gmm/neg_log_prob"], rtol=5e-5, atol=5e-5)
    mean, variance = moments(mixture, outputs)
    np.testing.assert_allclose(mean, golden["gmm/mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, golden["gmm/variance"], rtol=1e-4, atol=1e-5)


def test_mixture_samples_have_its_moments(golden):
    mixture, channels = GaussianMixture(3), jnp.asarray(golden["gmm/outputs"])[0, 0]
    draws = jax.vmap(lambda key: mixture.sample(channels, key))(jax.random.split(jax.random.key(0), 20000))
    mean, variance = moments(mixture, channels)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(draws.var(0), variance, atol=0.06)


def test_mixture_of_one_is_a_gaussian():
    channels = jnp.asarray([0.3, 0.5, -1.0, 0.2, -0.4], jnp.float32)  # logit, 2 means, 2 raw deviations
    deviations = 0.1 + 0.9 / (1 + np.exp(-np.array([0.2, -0.4])))
    expected = -stats.norm.logpdf([0.1, 0.4], [0.5, -1.0], deviations).sum()
    np.testing.assert_allclose(GaussianMixture(1).loss(channels, jnp.asarray([0.1, 0.4])), expected, rtol=1e-5)


def test_dither(golden):
    frames = jnp.zeros((1, 2000, 8))
    noise = Deterministic(dither=0.5).sample(frames, jax.random.key(0))
    assert abs(float(noise.std()) - 0.5) < 0.02
    expected = golden["loss/deterministic_dither_sample_key0"]
    np.testing.assert_array_equal(Deterministic(0.0).sample(frames, jax.random.key(0)), frames)
    assert expected.shape == (1, 2, 128) and abs(expected.std() - 1) < 0.1  # the reference's own noise is unit too


def test_masked_mean():
    values = jnp.asarray([[1.0, 2.0, 30.0]])
    np.testing.assert_allclose(masked_mean(values, jnp.asarray([[True, True, False]])), 1.5)
    assert float(masked_mean(values, jnp.zeros((1, 3), bool))) == 0.0


def test_settings_are_checked():
    assert Autoregressive(TINY).with_sampling(dither=0.1).output.dither == 0.1
    for bad in (dict(num_steps=3), dict(guidance_scale=2.0), dict(dither=-1.0)):
        with pytest.raises(UserError, match=next(iter(bad))):
            Autoregressive(TINY).with_sampling(**bad)
    with pytest.raises(ValueError, match="input_noise"):
        Autoregressive(TINY, input_noise=-1.0)
    with pytest.raises(ValueError, match="component"):
        GaussianMixture(0)
