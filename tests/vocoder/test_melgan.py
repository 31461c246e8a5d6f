import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL
from music_synth.vocoder.istft import ISTFTGenerator, analysis, inverse
from music_synth.vocoder.melgan import Conv, Discriminators, MelGANGenerator
from music_synth.vocoder.neural import play_whole
from music_synth.vocoder.stft import frames_of, magnitude, overlap_add, project_to_mel, spread_matrix, stft

SMALL = {"dim": 8, "mlp_dim": 16, "num_layers": 2, "num_projections": 2}
GENERATORS = [
    MelGANGenerator(channels=4, strides=(20, 16), dilations=(1, 3)),
    ISTFTGenerator(**SMALL, num_consistency_steps=1),
    ISTFTGenerator(**SMALL | {"num_layers": 6}, num_consistency_steps=0, width=4, ahead=1, source=True),
    ISTFTGenerator(**SMALL).as_played(),
]
EACH = pytest.mark.parametrize("generator", GENERATORS, ids=["melgan", "istft", "source", "pulled"])
pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_mel(frames, rows=1, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(-3, 2, (rows, frames, 128))).astype(np.float32).clip(MIN_LOG_MEL)


def scaled(params, factor=3.0):
    """Parameters as far from their start as training takes them, so that nothing is zero by accident."""
    keys = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + factor * 0.05 * jax.random.normal(next(keys), p.shape), params)


# --- convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, dilation, stride", [(7, 1, 1), (3, 9, 1), (5, 1, 4)])
def test_convolution_is_xlas(width, dilation, stride):
    conv = Conv(6, width, dilation, stride)
    x = jax.random.normal(jax.random.key(0), (2, 40, 5))
    params = scaled(conv.init(jax.random.key(1), x)["params"])
    kernel = params["kernel"]  # [taps, channels, D]
    norm = jnp.sqrt(jnp.sum(kernel**2, axis=(0, 1)))
    folded = x.reshape(2, 40 // stride, stride * 5)
    reach = dilation * (width // 2)
    expected = jax.lax.conv_general_dilated(
        folded,
        kernel * (params["scale"] / norm)[None, None],
        (1,),
        [(reach, reach)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NTC", "TIO", "NTC"),
    )
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected + params["bias"][None, None], atol=1e-5)


@pytest.mark.parametrize("factor", [5, 8])
def test_upsampling_is_a_transposed_convolution(factor):
    """Every input step adds its own `2 factor` outputs, the middle of which lies on its own place."""
    conv = Conv(3, upsample=factor)
    x = jax.random.normal(jax.random.key(0), (1, 6, 4))
    params = scaled(conv.init(jax.random.key(1), x)["params"])
    v = params["kernel"][0]
    outputs = (x[0] @ (v * (params["scale"] / jnp.linalg.norm(v, axis=0))[None])).reshape(6, 2 * factor, 3)
    expected = np.zeros((7 * factor, 3), np.float32)
    for i in range(6):
        expected[i * factor : (i + 2) * factor] += outputs[i]
    expected = expected[factor // 2 : factor // 2 + 6 * factor] + np.asarray(params["bias"])
    np.testing.assert_allclose(conv.apply({"params": params}, x)[0], expected, atol=1e-5)


def test_the_kernels_length_is_the_scale_alone():
    conv, x = Conv(4, 3), jax.random.normal(jax.random.key(0), (1, 9, 2))
    params = conv.init(jax.random.key(1), x)["params"]
    longer = dict(params, kernel=7.0 * params["kernel"])
    np.testing.assert_allclose(conv.apply({"params": longer}, x), conv.apply({"params": params}, x), atol=1e-5)
    np.testing.assert_allclose(params["scale"], jnp.linalg.norm(params["kernel"].reshape(-1, 4), axis=0), rtol=1e-6)


# --- both generators ---------------------------------------------------------------------------------------------


def play(generator, params, mel, exists=None, first=0):
    exists = np.ones(mel.shape[:2], bool) if exists is None else exists
    source = random_source(mel.shape[1], first)[None].repeat(len(mel), 0) if generator.source else None
    numbers = jnp.full(len(mel), first, jnp.int32)
    return jax.jit(play_whole, static_argnums=0)(generator, params, mel, exists, numbers, source)


def random_source(frames, first=0):
    """A function of the frame's number in the piece alone, as a source of notes is."""
    return np.concatenate(
        [np.random.default_rng(100 + first + i).normal(0, 0.1, HOP_LENGTH) for i in range(frames + 3)]
    ).astype(np.float32)


def fresh(generator):
    return jax.jit(generator.init)(jax.random.key(0))


@EACH
def test_a_hop_of_audio_a_frame(generator):
    params = fresh(generator)
    audio = play(generator, params, random_mel(11, rows=2))
    assert audio.shape == (2, 11 * HOP_LENGTH) and audio.dtype == jnp.float32 and np.isfinite(audio).all()


@pytest.mark.slow
@EACH
def test_the_outermost_frames_of_the_stated_reach_matter(generator):
    """By derivatives. That no others do, streams show: they equal the whole (`test_neural`)."""
    params = scaled(fresh(generator))
    behind, ahead = generator.reach
    hops = 10  # what is read last reaches the audio some hops later, by the state
    mel = random_mel(behind + hops + ahead)
    exists = np.ones(mel.shape[:2], bool)
    source = random_source(mel.shape[1])[None] if generator.takes_notes else None
    state = jax.tree.map(lambda x: x + 0.1, generator.no_state(1))
    target = np.random.default_rng(0).normal(size=hops * HOP_LENGTH).astype(np.float32)

    def played(mel):
        audio, _ = generator.play(params, mel, exists, jnp.zeros(1, jnp.int32), source, state)
        return jnp.sum(audio[0] * target)

    for outermost in (slice(0, 3), slice(-3, None)):
        change = np.zeros_like(mel)
        change[:, outermost] = np.random.default_rng(1).normal(size=change[:, outermost].shape)
        assert jax.jit(lambda mel, change: jax.jvp(played, (mel,), (change,))[1])(mel, change), "stated far too wide"


@EACH
def test_what_does_not_exist_is_not_looked_at(generator):
    params = scaled(fresh(generator))
    mel = random_mel(12)
    padded = np.concatenate([random_mel(5, seed=1), mel, random_mel(3, seed=2)], axis=1)
    exists = (np.arange(20) >= 5) & (np.arange(20) < 17)
    alone, among = play(generator, params, mel), play(generator, params, padded, exists[None], first=-5)
    np.testing.assert_allclose(among[:, 5 * HOP_LENGTH : 17 * HOP_LENGTH], alone, atol=2e-4 * np.abs(alone).max())
    assert not np.any(among[:, : 5 * HOP_LENGTH]) and not np.any(among[:, 17 * HOP_LENGTH :])


# --- spectra -----------------------------------------------------------------------------------------------------


def test_frames_and_overlap_add_are_transposes():
    rng = np.random.default_rng(0)
    audio, frames = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 40), (2, 7, 16)))
    assert frames_of(audio, 16, 4).shape == (2, 7, 16)
    assert np.vdot(frames_of(audio, 16, 4), frames) == pytest.approx(np.vdot(audio, overlap_add(frames, 4)), rel=1e-5)


def test_analysis_and_inverse_undo_each_other():
    audio = np.random.default_rng(0).normal(size=(1, 12 * HOP_LENGTH)).astype(np.float32)
    again = inverse(analysis(audio), np.ones((1, 12), np.float32))
    inside = slice(2 * HOP_LENGTH, -2 * HOP_LENGTH)  # where four windows overlap
    np.testing.assert_allclose(again[:, inside], audio[:, inside], atol=1e-5)


def test_phases_of_a_tone_are_those_of_its_recurrence():
    """In the main lobe of a steady tone all bins have one phase, which turns by 2 pi f hop / rate a frame."""
    hz = 437.0
    audio = np.cos(2 * np.pi * hz * np.arange(20 * HOP_LENGTH) / 16_000)[None].astype(np.float32)
    spectrum = np.asarray(analysis(audio))[0, 4:-4]
    lobe = round(hz / 12.5) + np.arange(-1, 2)
    phases = spectrum[:, lobe] / np.abs(spectrum[:, lobe])
    np.testing.assert_allclose(phases, phases[:, :1].repeat(3, axis=1), atol=2e-3)
    turn = np.exp(2j * np.pi * hz * HOP_LENGTH / 16_000)
    np.testing.assert_allclose(phases[1:], phases[:-1] * turn, atol=2e-3)


def test_stft_magnitude_of_a_tone():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    spectrum = stft(tone[None], 512, 128)
    assert spectrum.shape == (1, 126, 257)  # centers at 0, 128, ... 16000
    assert magnitude(spectrum, 1e-6)[0, 60, 32] == pytest.approx(0.5 * 512 / 4, rel=1e-3)


def test_projections_approach_the_mel_and_leave_what_has_it_alone():
    from music_synth.audio.mel import log_mel

    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, (1, 40 * HOP_LENGTH)).astype(np.float32)
    mel, exists = log_mel(audio, np), np.ones((1, 40), np.float32)
    np.testing.assert_allclose(
        project_to_mel(audio, np.exp(mel), exists)[:, HOP_LENGTH:-HOP_LENGTH],
        audio[:, HOP_LENGTH:-HOP_LENGTH],
        atol=1e-4,
    )
    other = rng.normal(0, 0.1, audio.shape).astype(np.float32)
    errors = []
    for _ in range(6):
        errors.append(float(np.abs(log_mel(np.asarray(other), np) - mel)[:, 1:-2].mean()))
        other = project_to_mel(other, np.exp(mel), exists)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.4 * errors[0]


def test_the_spread_of_gains_keeps_a_constant():
    np.testing.assert_allclose(spread_matrix() @ np.ones(128, np.float32), 1.0, rtol=1e-6)


# --- discriminators ----------------------------------------------------------------------------------------------


def test_discriminators_return_maps_of_each_scale():
    config = Discriminators(num_scales=3, channels=4, num_layers=2)
    audio = jnp.zeros((2, 4000))
    params = config.module.init(jax.random.key(0), audio)["params"]
    judged = config.module.apply({"params": params}, audio)
    assert len(judged) == 3
    for scale, maps in enumerate(judged):
        steps = 4000 // 2**scale
        shapes = [(steps, 4), (-(-steps // 4), 16), (-(-steps // 16), 64), (-(-steps // 16), 64), (-(-steps // 16), 1)]
        assert [m.shape for m in maps] == [(2, *shape) for shape in shapes]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: MelGANGenerator(strides=(8, 8, 4)), "product must be the hop, 320"),
        (lambda: MelGANGenerator(channels=12), "must divide by 8"),
        (lambda: ISTFTGenerator(width=4), "width = 4: must be odd"),
        (lambda: dataclasses.replace(GENERATORS[1], num_projections=-1), "num_projections = -1: must be at least 0"),
    ],
)
def test_bad_sizes(make, said):
    with pytest.raises(ValueError, match=said):
        make()
