"""Playing: what context a segment gets, and that batching and order of pieces change nothing."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth import playing
from music_synth.autoregressive.objective import Autoregressive
from music_synth.autoregressive.outputs import Deterministic
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import pad_tokens, token_bucket
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.playing import Decoder, piece_seed, sample_batch, whole_mels
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


def sample_pieces(model, params, pieces, seeds, batch_size=1):
    return Decoder(model, params, Tokenizer()).sample_pieces(pieces, seeds, batch_size)


@pytest.mark.parametrize("context_frames", [6, 4, 1])
def test_context_is_the_end_of_the_segment_before(context_frames):
    model = Counter(dataclasses.replace(TINY, context_frames=context_frames))
    segments = [segment for (segment,) in sample_pieces(model, {}, [tokens(3, 3, 3, 3)], [0])]
    assert [segment.mel.shape for segment in segments] == [(6, 128)] * 4
    # Segment j starts at the number of the first context frame: 6 - C frames further each time.
    assert [segment.mel[0, 0] for segment in segments] == [100 + j * (6 - context_frames) for j in range(4)]


@pytest.mark.parametrize("context_frames", [6, 4, 1])
def test_true_context_is_the_end_of_the_true_segment_before(context_frames):
    model = Counter(dataclasses.replace(TINY, context_frames=context_frames))
    mels = [np.broadcast_to(np.arange(n, dtype=np.float32)[:, None], (n, 128)) for n in (15, 6)]
    decoder = Decoder(model, {}, Tokenizer())
    pieces = [tokens(9, 3, 5), tokens(4)]
    batches = list(decoder.sample_segments(pieces, mels, [0, 0], 3))
    assert [[(s.piece, s.number) for s in batch] for batch in batches] == [[(0, 1), (1, 0), (0, 2)], [(0, 0)]]
    first = {(segment.piece, segment.number): segment.mel[0, 0] for batch in batches for segment in batch}
    assert first == {(0, 0): 100, (1, 0): 100, (0, 1): 6 - context_frames, (0, 2): 12 - context_frames}


def test_segments_in_any_order_make_whole_pieces():
    rng = np.random.default_rng(0)
    mels = [rng.normal(size=(n, 3)).astype(np.float32) for n in (10, 4, 8)]
    segments = [
        playing.Segment(piece, index, np.pad(mel[4 * index : 4 * index + 4], ((0, 4), (0, 0)))[:4])
        for piece, mel in enumerate(mels)
        for index in range(-(-len(mel) // 4))
    ]
    batches = [[segments[k] for k in batch] for batch in ([5, 1], [3], [2, 4], [0])]
    made = list(whole_mels(batches, [10, 4, 8]))
    assert [piece for piece, _ in made] == [1, 2, 0]
    for piece, mel in made:
        np.testing.assert_array_equal(mel, mels[piece])


def test_seeds_of_pieces_go_by_their_name():
    assert piece_seed("a") == piece_seed("a", 0) != piece_seed("b") != piece_seed("b", 1)


def test_buckets_hold_the_tokens_and_end_at_the_limit():
    for limit in (100, 128, 300, 2048):
        for num_tokens in range(1, limit + 1):
            size = token_bucket(num_tokens, limit)
            assert num_tokens <= size <= limit
    assert token_bucket(5, 2048) == 128
    assert len({token_bucket(n, 2048) for n in range(1, 2049)}) == 6
    with pytest.raises(ValueError, match="2049 tokens"):
        token_bucket(2049, 2048)


def models():
    network = dataclasses.replace(TINY, max_tokens=200)  # two buckets
    return {
        "diffusion": Diffusion(network, sampler=Sampler(name="ddpm", num_steps=3, guidance_scale=2.0)),
        "autoregressive": Autoregressive(network, output=Deterministic(dither=0.1)),
        "published": Autoregressive(
            dataclasses.replace(network, context_frames=0), Deterministic(dither=0.1), as_published=True
        ),
    }


def whole(batches):
    """What `sample_pieces` yields, put together: {piece: log-mel [T, M]}."""
    parts = {}
    for segment in (segment for batch in batches for segment in batch):
        parts.setdefault(segment.piece, []).append(segment.mel)
        assert segment.number == len(parts[segment.piece]) - 1
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
    sampled = playing.sample_batch
    monkeypatch.setattr(playing, "sample_batch", lambda *args: sizes.append(len(args[3])) or sampled(*args))
    lengths = [1, 5, 2, 1, 4, 3, 1]
    mels = whole(sample_pieces(model, {}, [tokens(*[3] * n) for n in lengths], [0] * 7, 3))
    assert sum(sizes) == sum(lengths)
    assert set(sizes) == {1, 2}
    assert len(sizes) < 2 * -(-sum(lengths) // 3) + 2  # two batches a round, and rows are full but at the end
    for piece, length in enumerate(lengths):
        np.testing.assert_array_equal(mels[piece][0], 100.0)  # each starts anew, without another's context
        assert len(mels[piece]) == 6 * length


@pytest.mark.parametrize("model", models().values(), ids=models())
def test_a_segment_is_what_the_model_samples(model):
    params = tiny_runs.random_like(model.init)
    batch = {
        "note_tokens": pad_tokens(*tokens(20), 64)[None],
        "context_mel": np.full((1, 6, 128), -3.0, np.float32),
        "context_mask": np.ones((1, 6), bool),
    }
    seeds, index = np.array([5], np.uint32), np.array([2], np.uint32)
    chained = sample_batch(model, params, batch, seeds, index)
    rng = jax.random.fold_in(jax.random.key(5), 2)
    plain = jax.jit(model.sample)(params, batch, rng[None])
    np.testing.assert_allclose(chained, plain, atol=2e-4)


def test_a_longer_piece_compiles_nothing_after_its_first_segment(compilations):
    sample_batch.clear_cache()  # of an earlier run of this test
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
        next(sample_pieces(Broken(TINY), {}, [tokens(3)], [0]))


def test_kernels_are_converted_before_the_loop_that_uses_them_in_bfloat16():
    model = Diffusion(dataclasses.replace(TINY, dtype="bfloat16"))
    params = tiny_runs.random_like(model.init)
    converted = model._in_dtype(params)
    decoder = converted["decoder"]
    assert decoder["layers_0"]["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16
    kept = decoder["spec_out_dense"]["kernel"], decoder["layers_0"]["pre_mlp_layer_norm"]["scale"]
    assert [leaf.dtype for leaf in kept] == [jnp.float32] * 2
    batch = {"note_tokens": pad_tokens(*tokens(20), 64)[None], "context_mask": np.ones((1, 6), bool)}
    batch["context_mel"] = np.full((1, 6, 128), -3.0, np.float32)
    encode = jax.jit(lambda params: model._encode(params, batch, None))
    jax.tree.map(np.testing.assert_array_equal, encode(params), encode(converted))


NOTES = [[Note(60 + k, 90, 0, 0.01 * k, 0.02 * n - 0.01)] for k, n in enumerate((60, 250, 7))]  # 110, 300 and 57 frames


def frame_numbers(mel, notes=None):
    """An inverter that cannot stream: the value of each frame, 320 times."""
    return np.repeat(mel[:, 0], 320)


class Streaming:
    """An inverter that gives all but the last `behind` frames that it has seen; and the pitch it was told."""

    def __init__(self, behind):
        self.behind = behind

    def stream(self, mels, notes=None):
        waiting = np.zeros((0, 128), np.float32)
        for mel in mels:
            waiting = np.concatenate([waiting, mel])
            yield frame_numbers(waiting[: -self.behind]) + notes[0].pitch
            waiting = waiting[-self.behind :]
        yield frame_numbers(waiting) + notes[0].pitch


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("behind", [0, 2, 5])  # 0: the inverter that cannot stream
def test_pieces_side_by_side_are_played_as_they_come(batch_size, behind):
    """Each part belongs to its piece, is cut at the piece's end, and nothing is kept waiting without need."""
    model, told = Counter(dataclasses.replace(TINY, context_frames=4)), []
    decoder = Decoder(model, {}, Tokenizer(segment_frames=6, max_tokens=64))
    inverter = Streaming(behind) if behind else frame_numbers
    heard, ends = {}, []
    for part in decoder.play(NOTES, inverter, batch_size=batch_size, on_segment=told.append):
        assert part.piece not in ends
        ends += [part.piece] * part.ended
        heard.setdefault(part.piece, []).append(part.audio)
        if behind:  # no segment waits while another is sampled
            sampled = sum(segment.piece == part.piece for segment in told)
            assert sampled * 6 <= sum(map(len, heard[part.piece])) / 320 + behind + 12 or part.ended
    assert sorted(ends) == [0, 1, 2] and len(told) == 19 + 50 + 10
    for piece, frames in enumerate((110, 300, 57)):
        whole = np.concatenate(heard[piece])
        expected = [100 + 2 * (t // 6) + t % 6 + (60 + piece) * bool(behind) for t in range(frames)]
        np.testing.assert_array_equal(whole[::320], expected)


def test_playing_begins_after_one_segment():
    decoder, told = Decoder(Counter(TINY), {}, Tokenizer(segment_frames=6, max_tokens=64)), []
    part = next(decoder.play(NOTES, Streaming(2), on_segment=told.append))
    assert len(told) == 1 and len(part.audio) == 4 * 320


def test_plays_with_a_timbre_that_the_model_knows():
    tokenizer = Tokenizer(segment_frames=6, max_tokens=64, timbres=("hall", "room"))
    notes = [Note(60, 90, 0, 0.0, 0.2)]
    (first, *_), _ = Decoder(Counter(TINY), {}, tokenizer, "room").tokenize(notes)
    assert first[0] == tokenizer.vocabulary.end_id + 1
    (unknown, *_), _ = Decoder(Counter(TINY), {}, tokenizer).tokenize(notes)
    np.testing.assert_array_equal(first[1:], unknown)
    with pytest.raises(UserError, match="no timbre 'cellar': choose from hall, room"):
        Decoder(Counter(TINY), {}, tokenizer, "cellar")
    with pytest.raises(UserError, match="no timbre 'hall': this model has none"):
        Decoder(Counter(TINY), {}, Tokenizer(), "hall")
