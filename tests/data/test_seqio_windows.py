"""The seqio feed: its batches, their order, and the plan of its rounds."""

import itertools

import numpy as np
import pytest

from music_synth.data import seqio_windows
from music_synth.data.examples import cut_window, pad_window
from music_synth.data.feed import Feed, open_feed
from music_synth.data.prepared import write_folder
from music_synth.data.quiet_tensorflow import closed_at_exit, tf
from music_synth.data.seqio_windows import NoteToMelFeatureConverter, Stream, plan_rounds
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Events, Tokenizer
from tests.data.batches import assert_same, take


@pytest.fixture
def open_made(made_tasks, made_data_dir, monkeypatch):
    monkeypatch.setattr(seqio_windows, "ROUND_EXAMPLES", 24)  # three batches; the default is far beyond these tests

    def open_it(task="made", batch_size=8, tokenizer=None, **settings):
        settings = {"seed": 5, "data_dir": str(made_data_dir)} | settings
        return open_feed(task, tokenizer or Tokenizer(), batch_size, **settings)

    return open_it


@pytest.fixture(scope="module")
def prepared(made, tmp_path_factory) -> Feed:
    folder = tmp_path_factory.mktemp("prepared") / "made"
    write_folder(folder, made, "made", "1.0.0")
    return open_feed(str(folder), Tokenizer(), 8)


def test_rows_are_windows_of_the_prepared_pieces(open_made, prepared, find_window):
    """The seqio path and the prepared path give the same tokens and mel for the same window, bit for bit."""
    pieces = list(prepared.pieces("train"))
    mels, events = [piece.mel for piece in pieces], [Events.from_notes(piece.notes) for piece in pieces]
    seen = set()
    for batch in take(open_made(empty_context=0.0), 5):
        for i in range(8):
            piece, start = find_window(batch["mel"][i], mels)
            window = cut_window(mels[piece], events[piece], Tokenizer(), start, 256)
            expected = pad_window(window, Tokenizer(), 256, training=True)
            assert_same({name: batch[name][i] for name in batch}, expected)
            seen.add((piece, start))
    assert len(seen) > 36


def test_batch_has_the_form_of_the_prepared_feed(open_made, prepared):
    batch, expected = take(open_made(), 1)[0], take(prepared, 1)[0]
    assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {n: (v.shape, v.dtype) for n, v in expected.items()}
    without = {"note_tokens", "mel", "mel_mask"}
    assert (
        set(take(open_made(context=False), 1)[0])
        == set(take(open_made("made_nocontext", context=False), 1)[0])
        == without
    )


def test_batch_is_a_function_of_seed_and_number(open_made):
    feed = open_made()
    batches = take(feed, 8)  # of three rounds
    for first in (2, 7):
        for batch, expected in zip(take(open_made(), 8 - first, first), batches[first:], strict=True):
            assert_same(batch, expected)
    assert_same(take(feed, 1, start_step=4)[0], batches[4])  # the same feed again
    with pytest.raises(AssertionError):
        assert_same(take(open_made(seed=6), 1)[0], batches[0])
    for a, b in itertools.combinations(batches, 2):
        assert not np.array_equal(a["mel"], b["mel"])


def test_evaluation_equals_that_of_the_prepared_feed(open_made, prepared):
    for batch, expected in zip(open_made().eval_batches(), prepared.eval_batches(), strict=True):
        for name in ("note_tokens", "mel_mask", "context_mask"):
            np.testing.assert_array_equal(batch[name], expected[name])
        for name in ("mel", "context_mel"):
            np.testing.assert_allclose(batch[name], expected[name], atol=0.004)


def test_pieces_are_whole(open_made, made):
    for split in made:
        for piece, expected in zip(open_made().pieces(split), made[split], strict=True):
            assert (piece.id, piece.notes) == (expected.id, expected.notes)
            np.testing.assert_array_equal(piece.mel, expected.mel)
            np.testing.assert_array_equal(piece.audio, expected.audio)


def test_windows_with_too_many_tokens_are_skipped_and_counted(open_made, caplog):
    limit = int(np.median((take(open_made(), 1)[0]["note_tokens"] > 0).sum(axis=1)))
    feed = open_made(tokenizer=Tokenizer(max_tokens=limit))
    batches = take(feed, 3)
    assert feed.num_skipped > 5
    assert f"more than {limit} tokens" in caplog.text
    assert all((batch["note_tokens"] == 1).any(axis=1).all() for batch in batches)
    with pytest.raises(UserError, match="in a row have more than 2 tokens"):
        take(open_made(tokenizer=Tokenizer(max_tokens=2)), 1)


def test_user_errors(open_made, made_tasks):
    with pytest.raises(UserError, match=r"'nonsense': choose from .*made, made_nocontext.*prepared folder"):
        open_made("nonsense")
    with pytest.raises(UserError, match=r"Feed\.context"):
        open_made("made_nocontext")
    with pytest.raises(UserError, match=r"no split 'holdout': choose from .*train"):
        next(open_made().pieces("holdout"))
    with pytest.raises(UserError, match="segment_frames = 1000"):
        open_made(tokenizer=Tokenizer(segment_frames=1000))
    with pytest.raises(UserError, match=r"not cached in /nowhere"):
        open_made(cache_dir="/nowhere")


def test_large_task_must_be_cached(open_made, monkeypatch):
    monkeypatch.setattr(seqio_windows, "IN_MEMORY_BYTES", 1000)
    with pytest.raises(UserError, match="too large"):
        take(open_made(), 1)


def test_converter_equals_padding(made):
    tokenizer, piece = Tokenizer(), made["train"][0]
    events = Events.from_notes(piece.notes)
    lengths = {"inputs": 2048, "targets": 256, "targets_context": 256}
    for start in (0, 2300):
        window = cut_window(piece.mel, events, tokenizer, start, 256)
        example = {"inputs": window.tokens, "targets": window.target, "targets_context": window.context}
        dataset = tf.data.Dataset.from_generator(
            lambda example=example: iter([example]),
            output_signature={
                "inputs": tf.TensorSpec([None], tf.int32),
                "targets": tf.TensorSpec([None, 128], tf.float32),
                "targets_context": tf.TensorSpec([None, 128], tf.float32),
            },
        )
        (row,) = NoteToMelFeatureConverter()(dataset, lengths).as_numpy_iterator()
        assert_same(row, pad_window(window, tokenizer, 256, training=True))


@pytest.mark.parametrize("seed", range(20))
def test_rounds_read_every_group_to_its_end(seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3))
    streams = [
        Stream(None, float(share), int(rng.integers(1, 1_000_000)), int(rng.integers(8, 3000))) for share in shares
    ]
    examples, groups = plan_rounds(streams, 2048)
    assert examples >= 2048
    for stream, num_groups in zip(streams, groups, strict=True):
        assert 1 <= num_groups <= stream.num_files
        assert stream.share * examples >= stream.num_windows / num_groups * 0.999


def test_rounds_of_a_small_task_are_short():
    assert plan_rounds([Stream(None, 1.0, 480, 60)], 2048) == (2048, [1])
    examples, groups = plan_rounds([Stream(None, 1.0, 143_000, 64)], 2048)
    assert examples < 2300 and groups == [64]


def test_what_is_left_open_is_closed_at_exit(monkeypatch):
    registered, closed = [], []
    monkeypatch.setattr("atexit.register", registered.append)

    @closed_at_exit
    def count():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    left_open, dropped = count(), count()
    assert (next(left_open), next(dropped)) == (0, 0)
    del dropped
    for at_exit in registered:
        at_exit()
    assert len(registered) == len(closed) == 2
