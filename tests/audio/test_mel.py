from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio import mel
from music_synth.midi.segments import num_frames

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mel.npz")
BACKENDS = pytest.mark.parametrize("xp", [jnp, np], ids=["jax", "numpy"])


def assert_same_mel(actual, expected):
    """The tolerance of docs/spec.md, section 1: magnitudes, as the floor of the logarithm is noise."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    np.testing.assert_allclose(np.exp(actual), np.exp(expected), rtol=1e-4, atol=2e-4)
    audible = expected > -6
    np.testing.assert_allclose(actual[audible], expected[audible], atol=2e-3)


def test_constants():
    assert GOLDEN["constants/min_value"] == pytest.approx(mel.MIN_LOG_MEL, abs=1e-6)
    assert GOLDEN["constants/max_value"] == mel.MAX_LOG_MEL
    assert mel.FRAME_RATE == 50 and mel.NUM_MELS == 128


def test_matrix_and_window():
    np.testing.assert_allclose(mel.mel_matrix(), GOLDEN["mel_matrix"], atol=2e-5)
    np.testing.assert_allclose(mel.hann_window(), GOLDEN["hann_window_640"], atol=3e-7)
    assert (mel.mel_matrix().sum(axis=0) > 0).all(), "a filter without any bin could not be inverted"


@BACKENDS
@pytest.mark.parametrize("name", ["sweep", "noise", "chord"])
def test_equals_golden(name, xp):
    assert_same_mel(mel.log_mel(xp.asarray(GOLDEN[f"{name}/audio"]), xp), GOLDEN[f"{name}/logmel"])


@BACKENDS
def test_silence_and_shortest(xp):
    assert_same_mel(mel.log_mel(xp.zeros(16000, np.float32), xp), GOLDEN["silence_1s/logmel"])
    np.testing.assert_allclose(mel.log_mel(xp.zeros(5, np.float32), xp), mel.MIN_LOG_MEL, rtol=1e-6)
    assert mel.log_mel(xp.zeros(0, np.float32), xp).shape == tuple(GOLDEN["empty/shape"])
    assert mel.log_mel(xp.zeros((3, 2, 321), np.float32), xp).shape == (3, 2, 2, 128)


def test_batched_equals_single():
    audio = np.stack([GOLDEN["sweep/audio"][:16000], GOLDEN["noise/audio"][:16000]])
    batched = np.asarray(mel.log_mel(jnp.asarray(audio)))
    for row, x in zip(batched, audio, strict=True):
        np.testing.assert_allclose(np.exp(row), np.exp(mel.log_mel(x, np)), rtol=1e-4, atol=1e-4)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int16"):
        mel.log_mel(np.zeros(640, np.int16), np)


def test_jit_and_gradient():
    audio = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, 1600), jnp.float32)
    np.testing.assert_allclose(jax.jit(mel.log_mel)(audio), mel.log_mel(audio), atol=1e-3)

    def magnitude(x):
        return jnp.exp(mel.log_mel(x)).sum()

    # Euler: the magnitude is homogeneous of degree 1, so its derivative along the audio is itself
    gradient = jax.grad(magnitude)(audio)
    np.testing.assert_allclose(jnp.vdot(gradient, audio), magnitude(audio), rtol=1e-4)
    direction = jnp.asarray(np.random.default_rng(0).normal(size=audio.shape), jnp.float32)
    step = 1e-3
    numeric = (magnitude(audio + step * direction) - magnitude(audio - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), numeric, rtol=2e-2)
    # |0| and ln of the floor must not give NaN
    assert (jax.grad(lambda x: mel.log_mel(x).sum())(jnp.zeros(1600)) == 0).all()


@pytest.mark.parametrize("num_samples", [0, 1, 319, 320, 321, 639, 640, 641])
def test_frame_counts(num_samples):
    frames = mel.log_mel(np.zeros(num_samples, np.float32), np).shape[0]
    assert frames == mel.num_mel_frames(num_samples) == int(np.ceil(num_samples / 320))
    if num_samples >= 319:
        assert frames == GOLDEN[f"frame_count/{num_samples}"]
    assert num_frames(num_samples / 16000) == frames + (num_samples % 320 == 0)


@BACKENDS
def test_one_extra_frame_suffices(xp):
    audio, hop = xp.asarray(GOLDEN["song/audio"]), mel.HOP_LENGTH
    whole = mel.log_mel(audio, xp)[:40]
    excerpts = {extra: mel.log_mel(audio[: (40 + extra) * hop], xp)[:40] for extra in (0, 1, 16)}
    for extra, excerpt in excerpts.items():
        assert_same_mel(excerpt, GOLDEN[f"extra_frames/first40_with_{extra}_extra"])
    assert_same_mel(whole, GOLDEN["extra_frames/whole_song"])
    np.testing.assert_allclose(excerpts[1], excerpts[16], atol=2e-6)
    np.testing.assert_allclose(np.exp(excerpts[0][:39]), np.exp(whole[:39]), rtol=1e-4, atol=1e-4)
    assert np.abs(excerpts[0][39] - whole[39]).max() > 1, "without it the last frame is cut short"


@BACKENDS
def test_song_segments_are_slices_of_the_whole(xp):
    """Segments of a song need no window of their own: slices of the whole song's mel are the same."""
    audio = GOLDEN["song/audio"]
    frames = num_frames(len(audio) / 16000)
    assert frames == GOLDEN["song/n_frames"] == 281
    padded = xp.asarray(np.pad(audio, (0, frames * mel.HOP_LENGTH - len(audio))))
    song = mel.log_mel(padded, xp)
    assert_same_mel(song[:256], GOLDEN["song/segment0_logmel"])
    assert_same_mel(song[256:], GOLDEN["song/segment1_logmel"])


@BACKENDS
def test_scaling(xp):
    x, y = xp.asarray(GOLDEN["scale/x"]), xp.asarray(GOLDEN["scale/y"])
    unclipped, clipped = mel.scale_mel(x, clip=False), mel.scale_mel(x)
    np.testing.assert_allclose(unclipped, GOLDEN["scale/scale_features_m1_1"], atol=1e-6)
    np.testing.assert_allclose(clipped, GOLDEN["scale/scale_features_m1_1_clip"], atol=1e-6)
    assert np.abs(unclipped).max() > 1 >= np.abs(clipped).max()
    np.testing.assert_allclose(mel.unscale_mel(y), GOLDEN["scale/scale_to_features_m1_1"], atol=2e-6)
    sweep = xp.asarray(GOLDEN["sweep/logmel"])
    np.testing.assert_allclose(mel.scale_mel(sweep), GOLDEN["sweep/scaled"], atol=1e-6)
    np.testing.assert_allclose(mel.scale_mel(sweep, clip=False), GOLDEN["sweep/scaled_noclip"], atol=1e-6)
    np.testing.assert_allclose(mel.unscale_mel(xp.asarray(GOLDEN["sweep/scaled"])), GOLDEN["sweep/unscaled"], atol=2e-6)
    np.testing.assert_allclose(mel.unscale_mel(unclipped), x, atol=5e-6)
    assert clipped.dtype == np.float32


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        log_mel = mel.log_mel(jnp.zeros((2, 640)))
        mel.unscale_mel(mel.scale_mel(log_mel))
