"""Chained sampling: what context a segment gets, and that batching and order of pieces change nothing."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth import chaining
from music_synth.autoregressive.objective import Autoregressive
from music_synth.autoregressive.outputs import Deterministic
from music_synth.chaining import pad_to_bucket, sample_chain, sample_pieces, sample_segment
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from music_synth.midi.segments import token_bucket
from music_synth.models.layers import NetworkConfig
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = NetworkConfig(
    model_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    max_tokens=64,
    target_frames=6,
    context_frames=6,
)


@dataclass(frozen=True)
class Counter:
    """Writes frame numbers: those of the context's first frame and on; from 100 where there is no context."""

    network: NetworkConfig

    def sample(self, params, batch, rngs):
        first = jnp.where(batch["context_mask"].all(axis=1), batch["context_mel"][:, 0, 0], 100.0)
        frames = first[:, None] + jnp.arange(self.network.target_frames, dtype=jnp.float32)[None]
        return jnp.broadcast_to(frames[..., None], (*frames.shape, self.network.num_mels))


@dataclass(frozen=True)
class Broken:
    network: NetworkConfig

    def sample(self, params, batch, rngs):
        return jnp.full((len(rngs), self.network.target_frames, self.network.num_mels), jnp.nan)


def tokens(*lengths):
    """A piece of segments with so many tokens each."""
    return [np.arange(1, length + 1, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("context_frames", [6, 4, 1])
def test_context_is_the_end_of_the_segment_before(context_frames):
    model = Counter(dataclasses.replace(TINY, context_frames=context_frames))
    mels = list(sample_chain(model, {}, [tokens(3, 3, 3, 3)], [0]))
    assert [mel.shape for mel in mels] == [(1, 6, 128)] * 4
    # Segment j starts at the number of the first context frame: 6 - C frames further each time.
    assert [mel[0, 0, 0] for mel in mels] == [100 + j * (6 - context_frames) for j in range(4)]


def test_buckets_hold_the_tokens_and_end_at_the_limit():
    for limit in (100, 128, 300, 2048):
        for num_tokens in range(1, limit + 1):
            size = token_bucket(num_tokens, limit)
            assert num_tokens <= size <= limit
    assert token_bucket(5, 2048) == 128
    assert len({token_bucket(n, 2048) for n in range(1, 2049)}) == 6
    with pytest.raises(ValueError, match="2049 tokens"):
        token_bucket(2049, 2048)


def test_padding_is_zero_and_follows_the_tokens():
    padded = pad_to_bucket(tokens(3, 200), 2048)
    assert padded.shape == (2, 256)
    assert padded.dtype == np.int32
    np.testing.assert_array_equal((padded > 0).sum(axis=1), [3, 200])
    np.testing.assert_array_equal(padded[0, :3], [1, 2, 3])


def models():
    network = dataclasses.replace(TINY, max_tokens=200)  # two buckets
    return {
        "diffusion": Diffusion(network, sampler=Sampler(name="ddpm", num_steps=3, guidance_scale=2.0)),
        "autoregressive": Autoregressive(network, output=Deterministic(dither=0.1)),
        "published": Autoregressive(
            dataclasses.replace(network, context_frames=0), Deterministic(dither=0.1), as_published=True
        ),
    }


def whole(sampled):
    """What `sample_pieces` yields, put together: {piece: log-mel [T, M]}."""
    parts = {}
    for piece, mel in sampled:
        parts.setdefault(piece, []).append(mel)
    return {piece: np.concatenate(mels) for piece, mels in parts.items()}


@pytest.mark.parametrize("model", models().values(), ids=models())
def test_a_piece_sounds_the_same_alone_and_in_any_company(model):
    params = jax.tree.map(lambda leaf: 3 * leaf, tiny_runs.random_like(model.init))  # large: each input must tell
    pieces, seeds = [tokens(4, 60), tokens(150), tokens(9, 2, 30), tokens(5, 5)], [7, 8, 9, 10]
    alone = whole(sample_pieces(model, params, pieces, seeds, 1))
    assert {piece: len(mel) for piece, mel in alone.items()} == {0: 12, 1: 6, 2: 18, 3: 12}
    together = whole(sample_pieces(model, params, pieces, seeds, 2))
    swapped = whole(sample_pieces(model, params, pieces[::-1], seeds[::-1], 2))
    for piece in range(4):
        np.testing.assert_allclose(together[piece], alone[piece], atol=2e-4)
        np.testing.assert_allclose(swapped[3 - piece], alone[piece], atol=2e-4)
    # ... and it is the seed that tells pieces apart:
    other = whole(sample_pieces(model, params, pieces[:1], [11], 1))[0]
    assert np.abs(other - alone[0]).max() > 0.01


def test_a_row_goes_to_the_next_piece_and_none_is_idle(monkeypatch):
    model, sizes = Counter(TINY), []
    sampled = chaining.sample_segment
    monkeypatch.setattr(chaining, "sample_segment", lambda *args: sizes.append(len(args[3])) or sampled(*args))
    lengths = [1, 5, 2, 1, 4, 3, 1]
    mels = whole(sample_pieces(model, {}, [tokens(*[3] * n) for n in lengths], [0] * 7, 3))
    assert sum(sizes) == sum(lengths)
    assert set(sizes) == {1, 2}
    assert len(sizes) < 2 * -(-sum(lengths) // 3) + 2  # two batches a round, and rows are full but at the end
    for piece, length in enumerate(lengths):
        np.testing.assert_array_equal(mels[piece][0], 100.0)  # each starts anew, without another's context
        assert len(mels[piece]) == 6 * length


def test_a_chain_holds_all_pieces_and_zeros_after_their_ends():
    model = Counter(dataclasses.replace(TINY, context_frames=4))
    mels = list(sample_chain(model, {}, [tokens(3), tokens(3, 3, 3), tokens(3, 3)], [0, 0, 0]))
    assert [mel[:, 0, 0].tolist() for mel in mels] == [[100, 100, 100], [0, 102, 102], [0, 104, 0]]


@pytest.mark.parametrize("model", models().values(), ids=models())
def test_a_segment_is_what_the_model_samples(model):
    params = tiny_runs.random_like(model.init)
    batch = {
        "note_tokens": pad_to_bucket(tokens(20), 64),
        "context_mel": np.full((1, 6, 128), -3.0, np.float32),
        "context_mask": np.ones((1, 6), bool),
    }
    seeds, index = np.array([5], np.uint32), np.array([2], np.uint32)
    chained = sample_segment(model, params, batch, seeds, index)
    rng = jax.random.fold_in(jax.random.key(5), 2)
    plain = jax.jit(model.sample)(params, batch, rng[None])
    np.testing.assert_allclose(chained, plain, atol=2e-4)


def test_a_longer_piece_compiles_nothing_after_its_first_segment(compilations):
    sample_segment.clear_cache()  # of an earlier run of this test
    model = Counter(dataclasses.replace(TINY, max_tokens=2048))
    sampled = sample_pieces(model, {}, [tokens(3, 500, *[100, 400] * 10)], [0], 1)
    next(sampled)
    first = len(compilations)
    assert first > 0
    assert len(list(sampled)) == 21
    list(sample_pieces(model, {}, [tokens(400, 2)], [3], 1))  # another piece of its bucket
    assert len(compilations) == first


def test_output_that_is_no_number_is_refused():
    with pytest.raises(UserError, match=r"segment 0.*not finite"):
        next(sample_chain(Broken(TINY), {}, [tokens(3)], [0]))


def test_kernels_are_converted_before_the_loop_that_uses_them_in_bfloat16():
    model = Diffusion(dataclasses.replace(TINY, dtype="bfloat16"))
    params = tiny_runs.random_like(model.init)
    converted = model._in_dtype(params)
    decoder = converted["decoder"]
    assert decoder["layers_0"]["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16
    kept = decoder["spec_out_dense"]["kernel"], decoder["layers_0"]["pre_mlp_layer_norm"]["scale"]
    assert [leaf.dtype for leaf in kept] == [jnp.float32] * 2
    batch = {"note_tokens": pad_to_bucket(tokens(20), 64), "context_mask": np.ones((1, 6), bool)}
    batch["context_mel"] = np.full((1, 6, 128), -3.0, np.float32)
    encode = jax.jit(lambda params: model._encode(params, batch, None))
    jax.tree.map(np.testing.assert_array_equal, encode(params), encode(converted))
