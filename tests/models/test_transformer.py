"""The networks against the reference outputs, and what must hold of any weights."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.models.encoders import context_position_ids
from music_synth.models.layers import NetworkConfig, has_fused_attention, permuted_offset_init, sinusoid_table
from music_synth.models.transformer import MelTransformer
from tests import golden_arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = NetworkConfig(
    model_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=2,
    max_tokens=64, target_frames=32, context_frames=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def context():
    return golden_arrays.load("network_context")


def run(function, arrays, config=TINY, extra=None):
    """function(network with the reference parameters, arrays), compiled."""
    params = golden_arrays.tree(arrays)
    for path, layers in (extra or {}).items():
        for name, attention in layers.items():
            params[path][name].update(attention)
    module = MelTransformer(config, 128, autoregressive=False)
    compiled = jax.jit(lambda params, used: function(module.bind({"params": params}), used))
    return compiled(params, {key: value for key, value in arrays.items() if key.startswith(("inputs/", "time_"))})


def inputs(arrays, rows=slice(None)):
    """Tokens, their mask, context and its mask, as `encode` takes them."""
    tokens = arrays["inputs/tokens"][rows]
    if "inputs/context" not in arrays:
        return tokens, tokens > 0, None, None
    return tokens, tokens > 0, arrays["inputs/context"][rows], arrays["inputs/context_mask"][rows] > 0


def without_keys(cache):
    return cache._replace(masks=tuple(jnp.zeros_like(mask) for mask in cache.masks))


def assert_close_in_time(actual, expected, time):
    """Within 5e-5 + 3e-3 t: float32 sinusoids of angles up to 20000 t."""
    error = np.abs(np.asarray(actual) - expected).max(axis=(1, 2))
    assert (error <= 5e-5 + 3e-3 * time).all(), error


def test_encoders_and_parameter_tree(context):
    mask = context["inputs/context_mask"] > 0
    for positions, key in (("terminal_relative", "out"), ("regular", "out_regular_positions")):
        config = dataclasses.replace(TINY, context_positions=positions)
        tokens, frames = run(
            lambda net, a: (
                net.token_encoder(*inputs(a)[:2], True),
                net.continuous_encoder(*inputs(a)[2:], True),
            ),
            context,
            config,
        )
        token_mask = context["inputs/tokens"] > 0
        assert np.abs(np.asarray(tokens) - context["out/tokens_encoded"])[token_mask].max() < 2e-5
        assert np.abs(np.asarray(frames) - context[f"{key}/context_encoded"])[mask].max() < 2e-5
    module = MelTransformer(TINY, 128, autoregressive=False)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *random_inputs())["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(np.shape, golden_arrays.tree(context))


def test_context_positions(context):
    mask = context["inputs/context_mask"] > 0
    ids = context_position_ids(jnp.asarray(mask), "terminal_relative")
    np.testing.assert_array_equal(ids, context["out/context_positions"])
    two_of_five = jnp.asarray([[True, True, False, False, False]])
    np.testing.assert_array_equal(context_position_ids(two_of_five, "terminal_relative"), [[3, 4, 0, 1, 2]])


@pytest.mark.parametrize("name", ["network_context", "network_nocontext"])
def test_decoder(name):
    """Conditional and unconditional, at noise time 0 and at the stored times."""
    arrays = golden_arrays.load(name)
    time = arrays["inputs/time"]

    def outputs(net, a):
        cache = net.encode(*inputs(a), True)
        film = net.condition_time(a["inputs/time"])
        return (
            net.decode(a["inputs/z"], net.condition_time(0 * a["inputs/time"]), cache),
            net.decode(a["inputs/z"], film, cache),
            net.decode(a["inputs/z"], film, without_keys(cache)),
        )

    config = dataclasses.replace(TINY, context_frames=32 if name.endswith("_context") else 0)
    at_zero, conditional, unconditional = run(outputs, arrays, config)
    assert_close_in_time(at_zero, arrays["out/decoder_all_times_zero"], 0 * time)
    assert_close_in_time(conditional, arrays["out/decoder"], time)
    assert_close_in_time(unconditional, arrays["out/decoder_unconditional"], time)


def test_decoder_given_the_reference_sinusoids(context):
    """With the reference's own time sinusoids every row agrees to float32 rounding."""

    def outputs(net, a):
        film = net.decoder.film(a["time_embedding/output_jit"])
        return net.decode(a["inputs/z"], film, net.encode(*inputs(a), True))

    np.testing.assert_allclose(run(outputs, context), context["out/decoder"], atol=3e-5)


def test_rows_beyond_the_cache_are_unconditional(context):
    """Batched guidance: twice the rows, one call, equals two calls."""

    def outputs(net, a):
        cache, z = net.encode(*inputs(a), True), a["inputs/z"]
        film = net.condition_time(jnp.asarray([0.25]))
        calls = net.decode(z, film, cache), net.decode(z, film, without_keys(cache))
        return net.decode(jnp.concatenate([z, z]), film, cache), jnp.concatenate(calls)

    np.testing.assert_allclose(*run(outputs, context), atol=5e-5)


def test_training_style_unconditional(context):
    """Tokens and masks zeroed before the encoders give the same as masks zeroed after them."""

    def outputs(net, a):
        tokens, _, mel, mask = inputs(a, slice(2))
        cache = net.encode(0 * tokens, 0 * tokens > 0, mel, mask & False, True)
        return net.decode(a["inputs/z"][:2], net.condition_time(a["inputs/time"][:2]), cache)

    expected = context["out/decoder_train_style_unconditional_rows0to1"]
    assert_close_in_time(run(outputs, context), expected, context["inputs/time"][:2])


def test_sum_of_cross_attentions(context):
    def outputs(net, a):
        return net.decode(a["inputs/z"], net.condition_time(a["inputs/time"]), net.encode(*inputs(a), True))

    extra = golden_arrays.tree(context, "params_sum_cross_attends_extra/")
    output = run(outputs, context, dataclasses.replace(TINY, cross_attention="sum"), extra)
    assert_close_in_time(output, context["out_sum_cross_attends/decoder"], context["inputs/time"])


def test_token_padding_changes_nothing(context):
    """Buckets: the same notes with less padding decode to the same frames."""
    used = int((context["inputs/tokens"][0] > 0).sum())
    assert used < context["inputs/tokens"].shape[1]

    def outputs(net, a):
        tokens, token_mask, mel, mask = inputs(a, slice(1))
        caches = (net.encode(tokens[:, :n], token_mask[:, :n], mel, mask, True) for n in (used, tokens.shape[1]))
        return [net.decode(a["inputs/z"][:1], net.condition_time(jnp.zeros(1)), cache) for cache in caches]

    np.testing.assert_allclose(*run(outputs, context), atol=2e-5)


def random_inputs(rows=2, tokens=12):
    rng = np.random.default_rng(0)
    note_tokens = jnp.asarray(rng.integers(1, 1391, (rows, tokens)), jnp.int32)
    frames = jnp.asarray(rng.normal(size=(rows, 32, 128)), jnp.float32)
    return note_tokens, frames, jnp.asarray([0.1, 0.7])[:rows], frames[::-1], jnp.ones((rows, 32), bool)


ONE_LAYER = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)  # compiles faster


@functools.cache
def initialized(config=ONE_LAYER, autoregressive=False):
    module = MelTransformer(config, 128, autoregressive)
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *random_inputs()))["params"]


@functools.cache
def forward(config=ONE_LAYER, autoregressive=False, deterministic=True):
    """Compiled (params, inputs, dropout key) -> output [B, T, M]."""
    module = MelTransformer(config, 128, autoregressive)
    return jax.jit(
        lambda params, args, key: module.apply(
            {"params": params}, *args, deterministic=deterministic, rngs={"dropout": key}
        )
    )


KEY = jax.random.key(1)


def stack_layers(params):
    """Parameters of separate layers -> those of scanned layers."""
    if not isinstance(params, dict):
        return params
    params = {key: stack_layers(value) for key, value in params.items()}
    names = sorted(key for key in params if key.startswith("layers_"))
    if names:
        params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params.pop(name) for name in names))
    return params


@pytest.mark.parametrize("autoregressive", [False, True])
def test_scanned_layers_equal_separate_ones(autoregressive):
    params = initialized(TINY, autoregressive)
    expected = forward(TINY, autoregressive)(params, random_inputs(), KEY)
    scanned = dataclasses.replace(TINY, scan_layers=True, remat=True)
    output = forward(scanned, autoregressive)(stack_layers(params), random_inputs(), KEY)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    module = MelTransformer(scanned, 128, autoregressive)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *random_inputs())["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, stack_layers(params))


@functools.cache
def gradients(config=ONE_LAYER):
    """Of the sum of squared outputs, by parameter."""
    return jax.jit(jax.grad(lambda p: jnp.sum(forward(config)(p, random_inputs(), KEY) ** 2)))(initialized())


def test_remat_keeps_gradients():
    remat = gradients(dataclasses.replace(ONE_LAYER, remat=True))
    for a, b in zip(jax.tree.leaves(gradients()), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()) + 1e-6)


def test_position_tables_get_no_gradient():
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients()):
        assert np.any(gradient) == ("Embed_0" not in str(path)), path


def test_bfloat16_activations_stay_near_float32():
    full = forward()(initialized(), random_inputs(), KEY)
    half = forward(dataclasses.replace(ONE_LAYER, dtype="bfloat16"))(initialized(), random_inputs(), KEY)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(full - half).max()) < 0.1 * float(jnp.abs(full).max())


@pytest.mark.parametrize("autoregressive", [False, True])
def test_causality_by_gradient(autoregressive):
    """Autoregressive: frame 10 depends on frames up to 10 only; diffusion: on all."""
    tokens, frames, *rest = random_inputs()
    apply = forward(ONE_LAYER, autoregressive)

    def frame_ten(x):
        return jnp.sum(apply(initialized(ONE_LAYER, autoregressive), (tokens, x, *rest), KEY)[:, 10])

    touched = np.abs(np.asarray(jax.jit(jax.grad(frame_ten))(frames))).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(touched, np.arange(32) <= 10 if autoregressive else True)


def test_dropout_acts_only_when_not_deterministic():
    def dropped(key):
        return forward(deterministic=False)(initialized(), random_inputs(), jax.random.key(key))

    plain = forward()(initialized(), random_inputs(), KEY)
    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert float(jnp.abs(dropped(1) - dropped(2)).max()) > 1e-3
    assert float(jnp.abs(dropped(1) - plain).max()) > 1e-3


def test_positions(context):
    np.testing.assert_allclose(sinusoid_table(256, 32), context["position_init/plain_max256x32"], atol=2e-5)
    np.testing.assert_allclose(sinusoid_table(40, 16), context["position_init/plain_40x16_key7"], atol=1e-5)
    # Each column of the shuffled table is a sinusoid of one of the base frequencies, each used twice.
    table = np.asarray(permuted_offset_init(jax.random.key(3), (64, 8)), np.float64)
    frequencies = np.tile(10000.0 ** (-np.arange(4) / 3), 2)
    found = []
    for column in table.T:
        fits = []
        for frequency in frequencies[:4]:
            basis = np.stack([np.sin(frequency * np.arange(64)), np.cos(frequency * np.arange(64))], axis=1)
            weights, *_ = np.linalg.lstsq(basis, column, rcond=None)
            fits.append(np.abs(basis @ weights - column).max() + abs(np.hypot(*weights) - 1))
        found.append(int(np.argmin(fits)))
        assert min(fits) < 1e-3
    assert sorted(found) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "field, value", [("model_dim", 0), ("model_dim", 7), ("dropout_rate", 1.0), ("dtype", "float16"),
                     ("cross_attention", "both"), ("context_frames", -1), ("context_positions", "odd")],
)  # fmt: skip
def test_nonsense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        NetworkConfig(**{field: value})


@pytest.mark.parametrize(
    ("platform", "version", "capability", "fused"),
    [
        ("gpu", "PJRT C API\ncuda 12080", "8.0", True),
        ("gpu", "PJRT C API\ncuda 12080", "12.0", True),
        ("gpu", "PJRT C API\ncuda 12080", "7.5", False),
        ("gpu", "PJRT C API\nrocm 60300", "gfx942", False),
        ("tpu", "libtpu", None, False),
    ],
)
def test_the_fused_kernel_is_for_gpus_that_have_it(platform, version, capability, fused):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)
    assert has_fused_attention(device) is fused
    assert not has_fused_attention(jax.devices("cpu")[0])
