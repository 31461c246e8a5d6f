"""The networks against the reference outputs, and what must hold of any weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.models.layers import NetworkConfig, permuted_offset_init, sinusoid_table
from music_synth.models.transformer import MelTransformer, context_position_ids
from tests import golden_arrays

TINY = NetworkConfig(
    model_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=2,
    max_tokens=64, target_frames=32, context_frames=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def context():
    return golden_arrays.load("network_context")


def network(arrays, config=TINY, extra=None):
    """Bound network with the reference parameters."""
    params = golden_arrays.tree(arrays)
    for path, layers in (extra or {}).items():
        for name, attention in layers.items():
            params[path][name].update(attention)
    return MelTransformer(config, 128, autoregressive=False).bind({"params": params})


def inputs(arrays):
    tokens = arrays["inputs/tokens"]
    context, mask = arrays.get("inputs/context"), arrays.get("inputs/context_mask")
    return tokens, tokens > 0, context, None if mask is None else mask > 0


def decode(net, arrays, time, cache):
    return net.decode(arrays["inputs/z"], net.condition_time(jnp.asarray(time)), cache)


def assert_close_in_time(actual, expected, time):
    """Within 5e-5 + 3e-3 t: float32 sinusoids of angles up to 20000 t."""
    error = np.abs(np.asarray(actual) - expected).max(axis=(1, 2))
    assert (error <= 5e-5 + 3e-3 * time).all(), error


def test_parameter_tree_is_the_published_one(context):
    module = MelTransformer(TINY, 128, autoregressive=False)
    mask = jnp.zeros((1, 32), bool)
    frames = jnp.zeros((1, 32, 128))
    params = module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), frames, jnp.zeros(1), frames, mask)["params"]
    shapes = jax.tree.map(jnp.shape, nn.unbox(params))
    assert shapes == jax.tree.map(np.shape, golden_arrays.tree(context))


def test_encoders(context):
    net = network(context)
    tokens, token_mask, mel, mask = inputs(context)
    encoded = net.token_encoder(tokens, token_mask, True)
    expected = context["out/tokens_encoded"]
    assert np.abs(np.asarray(encoded) - expected)[token_mask].max() < 2e-5
    for positions, key in (("terminal_relative", "out"), ("regular", "out_regular_positions")):
        config = dataclasses.replace(TINY, context_positions=positions)
        encoded = network(context, config).continuous_encoder(mel, mask, True)
        assert np.abs(np.asarray(encoded) - context[f"{key}/context_encoded"])[mask].max() < 2e-5


def test_context_positions(context):
    mask = context["inputs/context_mask"] > 0
    ids = context_position_ids(jnp.asarray(mask), "terminal_relative")
    np.testing.assert_array_equal(ids, context["out/context_positions"])
    two_of_five = jnp.asarray([[True, True, False, False, False]])
    np.testing.assert_array_equal(context_position_ids(two_of_five, "terminal_relative"), [[3, 4, 0, 1, 2]])


@pytest.mark.parametrize("name", ["network_context", "network_nocontext"])
def test_decoder(name):
    arrays = golden_arrays.load(name)
    net = network(arrays, dataclasses.replace(TINY, context_frames=32 if name.endswith("_context") else 0))
    time = arrays["inputs/time"]
    cache = net.encode(*inputs(arrays), True)
    assert_close_in_time(decode(net, arrays, 0 * time, cache), arrays["out/decoder_all_times_zero"], 0 * time)
    assert_close_in_time(decode(net, arrays, time, cache), arrays["out/decoder"], time)
    unconditional = cache._replace(masks=tuple(jnp.zeros_like(mask) for mask in cache.masks))
    expected = arrays["out/decoder_unconditional"]
    assert_close_in_time(decode(net, arrays, time, unconditional), expected, time)


def test_decoder_given_the_reference_sinusoids(context):
    """With the reference's own time sinusoids every row agrees to float32 rounding."""
    net = network(context)
    film = net.decoder.film(context["time_embedding/output_jit"])
    output = net.decode(context["inputs/z"], film, net.encode(*inputs(context), True))
    np.testing.assert_allclose(output, context["out/decoder"], atol=3e-5)


def test_rows_beyond_the_cache_are_unconditional(context):
    """Batched guidance: twice the rows, one call, equals two calls."""
    net, z = network(context), context["inputs/z"]
    cache = net.encode(*inputs(context), True)
    film = net.condition_time(jnp.asarray([0.25], jnp.float32))
    both = net.decode(jnp.concatenate([z, z]), film, cache)
    unconditional = cache._replace(masks=tuple(jnp.zeros_like(mask) for mask in cache.masks))
    np.testing.assert_allclose(both[:7], net.decode(z, film, cache), atol=1e-5)
    np.testing.assert_allclose(both[7:], net.decode(z, film, unconditional), atol=1e-5)


def test_training_style_unconditional(context):
    net = network(context)
    tokens, _, mel, mask = (None if a is None else a[:2] for a in inputs(context))
    cache = net.encode(0 * tokens, 0 * tokens > 0, mel, mask & False, True)
    time = context["inputs/time"][:2]
    output = net.decode(context["inputs/z"][:2], net.condition_time(time), cache)
    assert_close_in_time(output, context["out/decoder_train_style_unconditional_rows0to1"], time)


def test_sum_of_cross_attentions(context):
    extra = golden_arrays.tree(context, "params_sum_cross_attends_extra/")
    net = network(context, dataclasses.replace(TINY, cross_attention="sum"), extra)
    time = context["inputs/time"]
    output = decode(net, context, time, net.encode(*inputs(context), True))
    assert_close_in_time(output, context["out_sum_cross_attends/decoder"], time)


def test_token_padding_changes_nothing(context):
    """Buckets: the same notes with less padding decode to the same frames."""
    net = network(context)
    tokens, _, mel, mask = inputs(context)
    used = int((tokens[:1] > 0).sum())
    assert used < tokens.shape[1]
    film = net.condition_time(jnp.zeros(1))
    outputs = []
    for length in (used, tokens.shape[1]):
        cut = tokens[:1, :length]
        cache = net.encode(cut, cut > 0, mel[:1], mask[:1], True)
        outputs.append(net.decode(context["inputs/z"][:1], film, cache))
    np.testing.assert_allclose(*outputs, atol=1e-5)


def random_inputs(rows=2, tokens=12):
    rng = np.random.default_rng(0)
    note_tokens = jnp.asarray(rng.integers(1, 1391, (rows, tokens)), jnp.int32)
    frames = jnp.asarray(rng.normal(size=(rows, 32, 128)), jnp.float32)
    return note_tokens, frames, jnp.asarray([0.1, 0.7])[:rows], frames[::-1], jnp.ones((rows, 32), bool)


def initialized(config, autoregressive=False):
    module = MelTransformer(config, 128, autoregressive)
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), *random_inputs()))["params"]


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
def test_scanned_and_rematerialized_layers_equal_separate_ones(autoregressive):
    module, params = initialized(TINY, autoregressive)
    expected = module.apply({"params": params}, *random_inputs())
    scanned = MelTransformer(dataclasses.replace(TINY, scan_layers=True, remat=True), 128, autoregressive)
    output = scanned.apply({"params": stack_layers(params)}, *random_inputs())
    np.testing.assert_allclose(output, expected, atol=2e-5)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), *random_inputs())["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, stack_layers(params))


def test_remat_keeps_gradients():
    module, params = initialized(TINY)
    remat = MelTransformer(dataclasses.replace(TINY, remat=True), 128, False)

    def gradient(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, *random_inputs()) ** 2)))(params)

    for a, b in zip(jax.tree.leaves(gradient(module)), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_bfloat16_activations_stay_near_float32():
    module, params = initialized(TINY)
    half = MelTransformer(dataclasses.replace(TINY, dtype="bfloat16"), 128, False)
    a, b = (net.apply({"params": params}, *random_inputs()) for net in (module, half))
    assert b.dtype == jnp.float32
    assert 0 < float(jnp.abs(a - b).max()) < 0.1 * float(jnp.abs(a).max())


def test_causality_by_gradient():
    """Autoregressive: frame i depends on frames up to i only; diffusion: on all."""
    for autoregressive in (True, False):
        module, params = initialized(TINY, autoregressive)
        tokens, frames, *rest = random_inputs()

        def frame_ten(x, module=module, params=params, tokens=tokens, rest=rest):
            return jnp.sum(module.apply({"params": params}, tokens, x, *rest)[:, 10])

        touched = np.abs(np.asarray(jax.grad(frame_ten)(frames))).max(axis=(0, 2)) > 0
        np.testing.assert_array_equal(touched, np.arange(32) <= 10 if autoregressive else True)


def test_dropout_acts_only_when_not_deterministic():
    module, params = initialized(TINY)
    apply = lambda key: module.apply(
        {"params": params}, *random_inputs(), deterministic=False, rngs={"dropout": key}
    )
    plain = module.apply({"params": params}, *random_inputs())
    np.testing.assert_array_equal(apply(jax.random.key(1)), apply(jax.random.key(1)))
    assert float(jnp.abs(apply(jax.random.key(1)) - apply(jax.random.key(2))).max()) > 1e-3
    assert float(jnp.abs(apply(jax.random.key(1)) - plain).max()) > 1e-3


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


def test_position_tables_get_no_gradient():
    module, params = initialized(TINY)
    grads = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, *random_inputs()) ** 2))(params)
    for network_name in ("token_encoder", "continuous_encoder", "decoder"):
        assert not np.any(grads[network_name]["Embed_0"]["embedding"])
    others = [np.any(g) for path, g in jax.tree_util.tree_leaves_with_path(grads) if "Embed_0" not in str(path)]
    assert all(others)


@pytest.mark.parametrize(
    "field, value", [("model_dim", 0), ("model_dim", 7), ("dropout_rate", 1.0), ("dtype", "float16"),
                     ("cross_attention", "both"), ("context_frames", -1), ("context_positions", "odd")],
)  # fmt: skip
def test_nonsense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        NetworkConfig(**{field: value})
