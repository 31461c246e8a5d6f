import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.models.convolution import DepthwiseConv


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_channel_is_filtered_by_its_own_taps(dilation):
    x = np.random.default_rng(0).normal(size=(2, 20, 3)).astype(np.float32)
    module = DepthwiseConv(dilation)
    params = nn.unbox(module.init(jax.random.key(0), x))
    y = module.apply(params, jnp.asarray(x))
    taps = np.asarray(params["params"]["taps"])
    for channel in range(3):
        spread = np.zeros(6 * dilation + 1)
        spread[::dilation] = taps[::-1, channel]
        expected = np.convolve(x[1, :, channel], spread)[3 * dilation : 3 * dilation + 20]
        np.testing.assert_allclose(y[1, :, channel], expected, atol=1e-5)
