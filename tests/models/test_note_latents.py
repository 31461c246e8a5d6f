"""What each note leaves open: heard in a recording, learned of it, and drawn anew in each rendition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_synth.audio.mel import scale_mel, unscale_mel
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import pad_tokens
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models import note_latents
from music_synth.models.layers import NetworkConfig
from music_synth.models.note_roll import NUM_ENVELOPES, Roll
from tests.models.test_prior import MODEL as WITHOUT

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRAMES = WITHOUT.network.target_frames
TOKENIZER = Tokenizer(segment_frames=FRAMES, max_tokens=WITHOUT.network.max_tokens)
NETWORK = dataclasses.replace(
    WITHOUT.network, note_latents=2, context_frames=0, vocabulary=TOKENIZER.vocabulary, roll_harmonics=4
)
MODEL = dataclasses.replace(WITHOUT, network=NETWORK)
NOTES = [Note(45, 100, 0, 0.06, 0.3), Note(81, 100, 0, 0.3, 0.6)]


def make_batch(rows, notes=NOTES, length=16):
    (tokens,) = TOKENIZER.encode(notes, FRAMES)
    mel = jnp.full((rows, FRAMES, 128), -6.0)
    return {
        "note_tokens": jnp.asarray(np.tile(pad_tokens(tokens, length), (rows, 1))),
        "mel": mel,
        "mel_mask": jnp.ones(mel.shape[:2], bool),
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def roll_of_two():
    """Two notes, one after the other, each alone in the lower or the upper half of the bins."""
    weights = np.zeros((1, 20, NUM_ENVELOPES, 2), np.float32)
    weights[0, :10, 0, 0] = weights[0, 10:, 0, 1] = 1.0
    spectra = np.zeros((1, NUM_ENVELOPES, 2, 128), np.float32)
    spectra[0, 0, 0, :64] = spectra[0, 0, 1, 64:] = 1.0
    magnitude = np.einsum("bten,benm->btm", weights, spectra) + 1e-5
    return Roll(*map(jnp.asarray, (np.log(magnitude), magnitude, weights, spectra)))


def test_each_note_hears_what_it_alone_is_heard_in():
    roll, mask = roll_of_two(), jnp.ones((1, 20), bool)
    louder = jnp.zeros((1, 20, 128)).at[:, :10, :64].set(0.1).at[:, 10:, 64:].set(-0.2)
    shape = 2, len(note_latents.HEARD_THROUGH), note_latents.BANDS
    error, weight = (np.asarray(a).reshape(shape) for a in note_latents.heard(roll, louder, mask))
    half = note_latents.BANDS // 2
    np.testing.assert_allclose(error[0, 0, :half], 0.1, rtol=0.01)
    np.testing.assert_allclose(error[1, 0, half:], -0.2, rtol=0.01)
    assert not error[0, 0, half:].any() and not error[1, 0, :half].any()
    np.testing.assert_allclose(weight[0, 0], np.where(np.arange(note_latents.BANDS) < half, 40.0, 0.0), rtol=1e-3)


def test_frames_that_do_not_count_tell_nothing():
    roll, error = roll_of_two(), jax.random.normal(jax.random.key(0), (1, 20, 128))
    mask = jnp.arange(20)[None] < 5
    garbage = jnp.where(mask[..., None], error, 7.0)
    for one, other in zip(note_latents.heard(roll, error, mask), note_latents.heard(roll, garbage, mask), strict=True):
        np.testing.assert_array_equal(one, other)


def test_information_is_the_divergence_from_the_standard_normal():
    posterior = note_latents.Posterior(jnp.asarray([[[0.7, -1.2]]]), jnp.log(jnp.asarray([[[0.5, 1.5]]])))
    x = posterior.sample(jax.random.normal(jax.random.key(0), (200_000, 1, 2)))
    log_ratio = jax.scipy.stats.norm.logpdf(x, posterior.mean, jnp.exp(posterior.log_deviation))
    log_ratio -= jax.scipy.stats.norm.logpdf(x)
    np.testing.assert_allclose(posterior.information()[0, 0], log_ratio.sum(axis=-1).mean(), rtol=0.02)
    nothing = note_latents.Posterior(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)))
    assert float(nothing.information()[0, 0]) == 0.0


def test_loudness_that_the_notes_do_not_tell_is_learned_as_theirs(params):
    """Two notes, each some dB louder or softer than its tokens say, each by itself.

    What the network infers follows each of them, and with latents drawn anew each varies as in the recordings.
    """
    rows, deviation = 16, 0.08  # of the model's range: 5.4 dB
    batch = make_batch(rows)
    roll = jax.jit(lambda p: MODEL._encode(p, batch, None))(params).roll - 1.0
    first = (jnp.arange(FRAMES) < 15)[None, :, None]

    def recordings(gains):  # [B, 2]
        shares = jnp.where(first, gains[:, :1, None], gains[:, 1:, None])
        return jnp.where(roll > -0.9, roll + shares, roll)

    def loss(p, key):
        gain_key, latent_key = jax.random.split(key)
        gains = deviation * jax.random.normal(gain_key, (rows, 2))
        heard = batch | {"mel": unscale_mel(recordings(gains))}
        cache = MODEL._encode_target(p, heard, latent_key, None)
        total, metrics = MODEL.prior_loss(cache, heard, False)
        return total, metrics["prior_error"]

    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(carry, key):
        p, state = carry
        (_, error), gradients = jax.value_and_grad(loss, has_aux=True)(p, key)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(p, updates), state), error

    with jax.numpy_dtype_promotion("standard"):  # of Adam's counter
        keys = jax.random.split(jax.random.key(1), 300)
        (learned, _), errors = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    batch = make_batch(64)
    latents = MODEL.draw_latents(jax.random.split(jax.random.key(2), 64), batch)
    means = jax.jit(lambda p: MODEL._encode(p, batch, None, latents=latents))(learned).prior.mean
    loud = roll[0] > -0.9
    of_first = np.asarray(means)[:, :15][:, np.asarray(loud)[:15]].mean(axis=1)
    of_second = np.asarray(means)[:, 16:][:, np.asarray(loud)[16:]].mean(axis=1)
    assert errors[-20:].mean() < 0.2 * deviation * np.sqrt(2 / np.pi)  # the mean deviation of a normal one
    np.testing.assert_allclose([of_first.std(), of_second.std()], deviation, rtol=0.35)
    assert abs(np.corrcoef(of_first, of_second)[0, 1]) < 0.4


def test_latents_are_drawn_row_by_row_and_token_by_token(params):
    """So that a row comes out the same in any company and in any bucket."""
    keys = jax.random.split(jax.random.key(3), 3)
    drawn = MODEL.draw_latents(keys, make_batch(3))
    assert drawn.shape == (3, 16, 2) and abs(float(drawn.std()) - 1.0) < 0.2
    np.testing.assert_array_equal(MODEL.draw_latents(keys[1:], make_batch(2, length=24))[:, :16], drawn[1:])
    sample = jax.jit(MODEL.sample)
    both, alone = (sample(params, make_batch(len(k)), k) for k in (keys, keys[1:2]))
    np.testing.assert_allclose(both[1], alone[0], atol=1e-4)
    assert np.abs(both[1] - both[2]).mean() > 0.1


def test_without_texture_renditions_differ_by_their_notes_alone(params):
    plain = jax.jit(MODEL.with_sampling(texture=0.0).sample)
    one, other = (np.asarray(plain(params, make_batch(1), jax.random.key(seed)))[0] for seed in (0, 1))
    before = int(50 * NOTES[0].onset) - 1  # the frame before the first note begins
    differ = np.abs(one - other).mean(axis=1)
    assert differ[4:].mean() > 1e-3 and differ[:before].max() < 0.2 * differ[4:].mean()


def test_the_mean_is_that_of_latents_0(params):
    mean = jax.jit(MODEL.with_sampling(temperature=0.0).sample)
    one, other = (np.asarray(mean(params, make_batch(1), jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    zeros = jax.jit(lambda p: MODEL._encode(p, make_batch(1), None, latents=jnp.zeros((1, 16, 2))))(params).prior.mean
    np.testing.assert_allclose(scale_mel(one, clip=False), jnp.clip(zeros, -1.0, 1.0), atol=1e-5)


def test_latents_need_a_prior():
    with pytest.raises(ValueError, match=r"note_latents = 4: needs num_prior_layers"):
        NetworkConfig(note_roll=True, note_latents=4)
    with pytest.raises((ValueError, UserError), match=r"note_latents = -1"):
        NetworkConfig(note_latents=-1)
