import jax
import numpy as np
import optax
import pytest

from music_synth.vocoder.discriminators import FoldedConv, SpectrogramDiscriminators
from music_synth.vocoder.objective import hinge_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_folded_convolution_is_xlas():
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3)).astype(np.float32)
    conv = FoldedConv(5, fold=4)
    params = conv.init(jax.random.key(1), x)["params"]
    kernel = np.asarray(params["kernel"]).reshape(3, 4, 3, 5)  # frames, bins, channels in and out
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 4), [(1, 1), (0, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected, atol=1e-4)


def test_they_learn_to_tell_tones_from_noise():
    """Of one loudness: the hinge falls from 2 (no opinion) below 0.2 in thirty steps."""
    rng = np.random.default_rng(0)
    t = np.arange(3200) / 16_000
    tones = np.stack([np.sin(2 * np.pi * hz * t) for hz in rng.uniform(200, 2000, 4)]).astype(np.float32)
    noise = np.sqrt(0.5) * rng.normal(size=tones.shape).astype(np.float32)
    module = SpectrogramDiscriminators(channels=4, windows=(512,)).module
    params = jax.jit(module.init)(jax.random.key(0), tones)["params"]
    optimizer = optax.adam(3e-3)

    def loss(params):
        real, made = (module.apply({"params": params}, audio) for audio in (tones, noise))
        return hinge_loss(real, 1.0) + hinge_loss(made, -1.0)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.2 < values[0]
