"""Windows of a piece: what is cut, what is padded, and how starts are drawn."""

from pathlib import Path

import numpy as np
import pytest

from music_synth.audio.mel import DB_PER_NEPER, MIN_LOG_MEL
from music_synth.data.examples import (
    blank_example,
    cut_window,
    evaluation_batches,
    num_strata,
    pad_window,
    quieter,
    stratified_start,
)
from music_synth.midi.notes import Note
from music_synth.midi.segments import OverlongSegmentWarning, SegmentTooLong
from music_synth.midi.tokenizer import Events, Tokenizer

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mel.npz")
CONTEXT = TARGET = 256


def numbered_mel(num_frames: int) -> np.ndarray:
    """Frames that carry their own number."""
    return np.repeat(np.arange(num_frames, dtype=np.float32)[:, None], 128, axis=1)


def cut(num_frames: int, start: int, context_frames: int = CONTEXT):
    return cut_window(numbered_mel(num_frames), Events.from_notes([]), Tokenizer(), start, context_frames)


@pytest.mark.parametrize("num_frames", [1, 90, 256, 700, 2000])
def test_window_relations_hold_at_every_start(num_frames):
    for start in range(num_frames):
        window = cut(num_frames, start)
        target, context = window.target[:, 0], window.context[:, 0]
        assert target[0] == start
        assert len(target) == min(TARGET, num_frames - start)
        assert len(context) == min(CONTEXT, start)
        np.testing.assert_array_equal(
            np.concatenate([context, target]), np.arange(len(context) + len(target)) + start - len(context)
        )


@pytest.mark.parametrize("num_frames", [90, 700, 2000])
def test_windows_are_those_of_the_published_selector_without_its_leak(num_frames):
    """golden chunk_context: context first, context length, target first, target length, with extra STFT frames.

    The published context reaches 16 frames into the target and is then cut to 256 frames: full contexts lose the
    excess, short ones keep (some of) it. Ours are the same windows without those frames.
    """
    leaks = 0
    for context_first, context_length, target_first, target_length, *_ in GOLDEN[f"chunk_context/n{num_frames}"]:
        window = cut(num_frames, int(target_first))
        context = window.context[:, 0]
        if len(context):
            assert context[0] == context_first
        assert len(window.target) == min(TARGET, target_length)
        assert len(context) <= min(CONTEXT, context_length)
        published = np.arange(context_first, context_first + min(CONTEXT, context_length))
        leaked = np.intersect1d(published, window.target[:, 0])
        leaks += len(leaked) > 0
        assert len(context) + len(leaked) == len(published)
        assert not np.intersect1d(context, window.target[:, 0]).size
    assert leaks > 0  # the fault that is not here is in the golden draws


@pytest.mark.parametrize("num_frames", [1, 90, 700, 2000])
def test_published_starts_without_context_lie_in_our_range(num_frames):
    for first, length, *_ in GOLDEN[f"chunk_plain/n{num_frames}"]:
        assert 0 <= first < num_frames
        window = cut(num_frames, int(first), context_frames=0)
        assert not len(window.context)
        assert window.target[0, 0] == first
        assert len(window.target) >= length  # published, one that begins before the piece is shortened


def test_starts_cover_the_piece_evenly():
    rng = np.random.default_rng(0)
    num_starts = 700
    strata = num_strata(num_starts, TARGET)
    assert strata == 3
    draws = np.array([[stratified_start(rng, s, strata, num_starts) for s in range(strata)] for _ in range(4000)])
    assert (draws[:, :-1] < draws[:, 1:]).all()  # one from each part
    assert draws.min() == 0 and draws.max() == num_starts - 1
    counts = np.bincount(draws.ravel() // 70, minlength=10)
    np.testing.assert_allclose(counts, 1200, atol=5 * np.sqrt(1200))


def test_one_frame_piece_has_one_start():
    rng = np.random.default_rng(0)
    assert num_strata(1, TARGET) == 1
    assert stratified_start(rng, 0, 1, 1) == 0


@pytest.mark.parametrize("start", [0, 1, 100, 256, 600, 699])
def test_padding(start):
    tokenizer, num_frames = Tokenizer(), 700
    window = cut(num_frames, start)
    training = pad_window(window, tokenizer, CONTEXT, training=True)
    evaluation = pad_window(window, tokenizer, CONTEXT, training=False)
    frames = min(TARGET, num_frames - start)
    for example in (training, evaluation):
        assert example["note_tokens"].shape == (2048,) and example["note_tokens"].dtype == np.int32
        np.testing.assert_array_equal(example["note_tokens"][: len(window.tokens)], window.tokens)
        assert not example["note_tokens"][len(window.tokens) :].any()
        np.testing.assert_array_equal(example["mel"][:frames], window.target)
        assert (example["mel"][frames:] == np.float32(MIN_LOG_MEL)).all()
        context_length = min(start, CONTEXT)
        np.testing.assert_array_equal(example["context_mask"], np.arange(CONTEXT) < context_length)
        np.testing.assert_array_equal(example["context_mel"][:context_length], window.context)
    assert training["mel_mask"].all()
    np.testing.assert_array_equal(evaluation["mel_mask"], np.arange(TARGET) < frames)


def test_no_context_leaves_the_keys_out():
    example = pad_window(cut(700, 300, 0), Tokenizer(), 0, training=True)
    assert set(example) == {"note_tokens", "mel", "mel_mask"}


def test_stretch_of_a_piece_gives_the_same_window(made):
    piece, tokenizer = made["train"][0], Tokenizer()
    events = Events.from_notes(piece.notes)
    for start in (600, 777, 1000):
        whole = cut_window(piece.mel, events, tokenizer, start, CONTEXT)
        part = cut_window(piece.mel[300:1400], events, tokenizer, start - 300, CONTEXT, first_frame=300)
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a, b)


def test_too_many_tokens(made):
    piece = made["train"][0]
    events, tokenizer = Events.from_notes(piece.notes), Tokenizer(max_tokens=40)
    with pytest.raises(SegmentTooLong):
        cut_window(piece.mel, events, tokenizer, 300, CONTEXT, on_overflow="error")
    with pytest.warns(OverlongSegmentWarning):
        window = cut_window(piece.mel, events, tokenizer, 300, CONTEXT)
    full = cut_window(piece.mel, events, Tokenizer(), 300, CONTEXT)
    assert 30 < len(window.tokens) <= 40 and window.tokens[-1] == 1
    np.testing.assert_array_equal(window.tokens[:-1], full.tokens[: len(window.tokens) - 1])


def test_evaluation_batches_are_the_segments_in_order(made):
    tokenizer, batch_size = Tokenizer(), 4
    batches = list(evaluation_batches(made["validation"], tokenizer, context_frames=CONTEXT, batch_size=batch_size))
    rows = [{name: batch[name][i] for name in batch} for batch in batches for i in range(batch_size)]
    expected = []
    for piece in made["validation"]:
        segments = tokenizer.encode(piece.notes, len(piece.mel))
        for j, tokens in enumerate(segments):
            expected.append((tokens, piece.mel[256 * j : 256 * (j + 1)], piece.mel[max(0, 256 * (j - 1)) : 256 * j]))
    assert len(rows) == -(-len(expected) // batch_size) * batch_size > len(expected)
    for row, (tokens, mel, context) in zip(rows, expected, strict=False):
        np.testing.assert_array_equal(row["note_tokens"][: len(tokens)], tokens)
        assert not row["note_tokens"][len(tokens) :].any()
        np.testing.assert_array_equal(row["mel"][row["mel_mask"]], mel)
        np.testing.assert_array_equal(row["context_mel"][row["context_mask"]], context)
    blank = blank_example(tokenizer, CONTEXT)
    assert not blank["mel_mask"].any() and not blank["context_mask"].any() and not blank["note_tokens"].any()
    for row in rows[len(expected) :]:
        for name in row:
            np.testing.assert_array_equal(row[name], blank[name])


def test_quieter_examples_have_the_velocities_and_the_mel_of_softer_playing():
    """12 dB are a velocity of half; what falls below silence is silence."""
    tokenizer, mel = Tokenizer(velocity_bins=32), np.zeros((256, 128), np.float32)
    mel[:, 64:] = MIN_LOG_MEL + 0.5

    def example(divisor):
        notes = [
            Note(60 + i, velocity // divisor, 0, i * 0.1, 5, i > 3) for i, velocity in enumerate((126, 80, 40, 70, 90))
        ]
        window = cut_window(mel, Events.from_notes(notes), tokenizer, 0, 0, timbre="")
        return pad_window(window, tokenizer, 0, training=True)

    decibels = 40 * np.log10(2)
    loud, soft = example(1), example(2)
    made = quieter({name: value[None] for name, value in loud.items()}, np.array([decibels]), tokenizer.vocabulary)
    np.testing.assert_allclose(made["note_tokens"][0], soft["note_tokens"], atol=1)  # a bin, as tokens know bins alone
    ids = tokenizer.vocabulary
    is_velocity = (soft["note_tokens"] > ids.velocity_id) & (soft["note_tokens"] <= ids.velocity_id + 32)
    np.testing.assert_array_equal(made["note_tokens"][0][~is_velocity], loud["note_tokens"][~is_velocity])
    np.testing.assert_allclose(made["mel"][0, :, 0], -decibels / DB_PER_NEPER, rtol=1e-6)
    np.testing.assert_array_equal(made["mel"][0, :, 64], np.float32(MIN_LOG_MEL))
    assert "context_mel" not in made and made["mel"].dtype == np.float32
