import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from music_synth.audio.mel import HOP_LENGTH, log_mel
from music_synth.errors import UserError
from music_synth.vocoder.discriminators import SpectrogramDiscriminators
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.melgan import Discriminators, MelGANGenerator
from music_synth.vocoder.objective import VocoderObjective, mel_distance, stft_distance

pytestmark = pytest.mark.usefixtures("quick_compilation")
FRAMES = 16
JUDGES = Discriminators(num_scales=2, channels=2, num_layers=1)
MELGAN = VocoderObjective(MelGANGenerator(channels=8, strides=(20, 16), dilations=(1,)), JUDGES)
ISTFT = VocoderObjective(ISTFTGenerator(dim=8, mlp_dim=8, num_layers=1), JUDGES, spectrum_weight=1.0)
INFORMED = VocoderObjective(
    ISTFTGenerator(dim=8, mlp_dim=8, num_layers=1, width=5, ahead=1, source=True),
    SpectrogramDiscriminators(channels=2, windows=(512,)),
    spectrum_weight=1.0,
)
EACH = pytest.mark.parametrize("vocoder", [MELGAN, ISTFT, INFORMED], ids=["melgan", "istft", "informed"])


@pytest.fixture(scope="module")
def batch():
    t = np.arange((FRAMES + 1) * HOP_LENGTH) / 16_000
    rng = np.random.default_rng(0)
    tones = [0.3 * np.sin(2 * np.pi * hz * t) + 0.02 * rng.normal(size=t.shape) for hz in (440, 1234)]
    audio = np.stack(tones).astype(np.float32)
    mask = np.ones((2, FRAMES), bool)
    source = np.pad(audio, ((0, 0), (HOP_LENGTH, HOP_LENGTH)))
    mel = log_mel(audio, np)[:, :FRAMES]
    return {"audio": audio[:, : FRAMES * HOP_LENGTH], "mel": mel, "mel_mask": mask, "source": source}


def init(vocoder):
    return jax.jit(vocoder.init)(jax.random.key(0))


@functools.cache
def gradient_of(vocoder):
    return jax.jit(jax.value_and_grad(lambda p, b: vocoder.loss(p, b, jax.random.key(1)), has_aux=True))


def grads(vocoder, params, batch):
    return gradient_of(vocoder)(params, batch)


@pytest.mark.slow
@EACH
def test_gradients_reach_every_parameter(vocoder, batch):
    params = init(vocoder)
    for scale in params["discriminators"].values():  # so sure of some places that the hinge leaves those alone
        scale["score"]["scale"] = 50.0 * scale["score"]["scale"]
    _, gradient = grads(vocoder, params, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_the_players_gradients_do_not_mix(batch):
    """The hinge moves the discriminators alone, the adversarial and feature terms the generator alone."""
    vocoder, params = MELGAN, init(MELGAN)
    zero = dict.fromkeys(("spectrum_weight", "stft_weight", "mel_weight", "adversarial_weight", "feature_weight"), 0.0)
    _, hinge = grads(dataclasses.replace(vocoder, **zero), params, batch)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(hinge["generator"]))
    _, adversarial = grads(dataclasses.replace(vocoder, **(zero | {"adversarial_weight": 5.0})), params, batch)
    jax.tree.map(np.testing.assert_array_equal, adversarial["discriminators"], hinge["discriminators"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adversarial["generator"]))


@pytest.mark.slow
@EACH
def test_a_step_lowers_what_it_should(vocoder, batch):
    """A small step of either player against its gradient: the discriminators' hinge, the generator's own terms."""
    params = init(vocoder)
    (_, before), gradient = grads(vocoder, params, batch)

    def own(metrics):
        return sum(
            float(value) * getattr(vocoder, f"{name}_weight", vocoder.spectrum_weight)
            for name, value in metrics.items()
            if name != "discriminator"
        )

    for player, measure in (("discriminators", lambda m: float(m["discriminator"])), ("generator", own)):
        size = float(optax.tree.norm(gradient[player]))
        step = jax.tree.map(lambda p, g: p - 1e-3 / size * g, params[player], gradient[player])  # noqa: B023
        (_, after), _ = grads(vocoder, dict(params, **{player: step}), batch)
        assert measure(after) < measure(before)


def test_stages():
    staged = dataclasses.replace(ISTFT, warm_steps=20, audio_from=10)
    stages = [staged.at_step(step) for step in (0, 9, 10, 19, 20)]
    assert [stage.audible for stage in stages] == [False, False, True, True, True]
    assert [stage.adversarial for stage in stages] == [False, False, False, False, True]
    alone = dataclasses.replace(MELGAN, adversarial_weight=0.0, feature_weight=0.0)
    assert not alone.at_step(5).adversarial


def test_terms_of_each_stage(batch):
    params = init(ISTFT)

    def traced(model):
        return jax.eval_shape(model.loss, params, batch, jax.random.key(0))

    def terms(**stage):
        return set(traced(dataclasses.replace(ISTFT, **stage))[1])

    spectra = {"log_magnitude", "convergence", "frequency", "phase_in_time", "phase_in_frequency"}
    assert terms(audible=False, adversarial=False) == spectra
    assert terms(adversarial=False) == spectra | {"stft", "mel"}
    assert terms() == spectra | {"stft", "mel", "adversarial", "feature", "discriminator"}


def test_distances():
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, (3, 8000)).astype(np.float32)
    made = np.stack([audio[0], 2 * audio[1], rng.normal(0, 0.1, 8000).astype(np.float32)])
    distance = np.asarray(stft_distance(made, audio))
    assert distance[0] < 1e-3
    # Twice the amplitude: convergence ||A - 2A|| / ||A|| = 1, log-magnitude ln 2.
    assert distance[1] == pytest.approx(1 + np.log(2), rel=0.02)
    assert distance[2] > 0.5
    assert mel_distance(made, audio)[:2] == pytest.approx([0, np.log(2)], abs=1e-3)


def test_the_loss_ignores_rows_that_do_not_count(batch):
    vocoder = dataclasses.replace(MELGAN, adversarial=False)
    params = init(vocoder)
    alone = {name: array[:1] for name, array in batch.items()}
    blank = dict(batch, mel_mask=batch["mel_mask"] & np.array([[True], [False]]))
    one, other = (vocoder.loss(params, b, jax.random.key(0), train=False)[1] for b in (alone, blank))
    assert other["stft"] == pytest.approx(float(one["stft"]), rel=1e-5)
    assert other["mel_error_db"] == pytest.approx(float(one["mel"]) * 8.6859, rel=1e-4)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mel_weight": -1.0}, "mel_weight = -1.0: must be 0 or more"),
        ({"spectrum_weight": 1.0}, "a MelGAN writes no spectra"),
        ({"warm_steps": -5}, "warm_steps = -5"),
        ({"audio_from": 5}, "nothing to train on before"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(MELGAN, **changes)


def test_batches_that_do_not_suit(batch):
    MELGAN.check_batch(batch)
    with pytest.raises(UserError, match=r"brings no audio.*@AudioFeed"):
        MELGAN.check_batch({"mel": batch["mel"]})
    with pytest.raises(UserError, match=r"brings no notes: set AudioFeed\.notes = True"):
        INFORMED.check_batch({name: array for name, array in batch.items() if name != "source"})
    with pytest.raises(UserError, match="320 samples a frame"):
        MELGAN.check_batch(dict(batch, audio=batch["audio"][:, :-1]))
    with pytest.raises(UserError, match="8 frames are too short"):
        MELGAN.check_batch({"mel": batch["mel"][:, :8], "audio": batch["audio"][:, : 8 * HOP_LENGTH]})


def test_axes_fit_the_parameters():
    shapes = jax.eval_shape(MELGAN.init, jax.random.key(0))
    jax.tree.map(lambda leaf, axes: np.testing.assert_equal(len(axes), leaf.ndim), shapes, MELGAN.logical_axes())
