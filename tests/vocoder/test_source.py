import time

import numpy as np
import pytest

from music_synth.audio.mel import HOP_LENGTH, SAMPLE_RATE
from music_synth.midi.notes import Note
from music_synth.vocoder.source import RELEASE_SECONDS, render, source_of_frames

A4 = Note(69, 127, 0, 0.25, 1.25)
DRUM = Note(38, 127, 0, 0.5, 0.6, is_drum=True)


def test_a_note_is_its_harmonics():
    """sum of sin(2 pi k f t) / k from the onset on, to 8 kHz; 440 Hz has 18 of them."""
    t = np.arange(4000) / SAMPLE_RATE
    expected = sum(np.sin(2 * np.pi * k * 440 * t) / k for k in range(1, 19))
    onset = round(A4.onset * SAMPLE_RATE)
    heard = render([A4], 0, onset + 4000)
    assert not np.any(heard[:onset])
    np.testing.assert_allclose(heard[onset + 40 :], expected[40:], atol=5e-3)


def test_phases_are_exact_after_hours():
    late = A4._replace(onset=A4.onset + 10_000, offset=A4.offset + 10_000)
    np.testing.assert_allclose(render([late], 10_000 * SAMPLE_RATE, 20_000), render([A4], 0, 20_000), atol=1e-3)


@pytest.mark.parametrize("note", [A4, DRUM, A4._replace(onset=-3.0), A4._replace(pitch=0), A4._replace(pitch=127)])
def test_pieces_of_a_stream_are_those_of_the_whole(note):
    whole = render([note, DRUM], -1000, 40_000)
    parts = [render([note, DRUM], start, 777) for start in range(-1000, 39_000, 777)]
    np.testing.assert_array_equal(np.concatenate(parts)[:40_000], whole)
    assert np.isfinite(whole).all() and np.any(whole)


def test_beginnings_and_ends():
    for note in (A4, DRUM):
        heard = np.flatnonzero(render([note], 0, 3 * SAMPLE_RATE)) / SAMPLE_RATE
        assert 0 <= heard[0] - note.onset < 0.001
        assert heard[-1] <= note.offset + RELEASE_SECONDS
    quiet, loud = (np.abs(render([A4._replace(velocity=v)], 0, SAMPLE_RATE)).max() for v in (20, 120))
    assert loud / quiet == pytest.approx(36, rel=1e-3)


def test_notes_of_no_length_and_none():
    assert not np.any(render([], 0, 100))
    odd = [A4._replace(offset=A4.onset), A4._replace(offset=0.0), A4._replace(onset=np.nan)]
    assert np.isfinite(render(odd, 0, SAMPLE_RATE)).all()


def test_frames_have_what_their_windows_see():
    whole = render([A4], 0, SAMPLE_RATE)
    np.testing.assert_array_equal(source_of_frames([A4], 10, 4), whole[9 * HOP_LENGTH : 16 * HOP_LENGTH])


def test_fifty_times_real_time():
    """Ten voices on one core, and as many that ring out."""
    notes = [Note(30 + 6 * i, 90, 0, 0.25 * n, 0.25 * n + 0.25) for i in range(10) for n in range(40)]
    render(notes, 0, SAMPLE_RATE)  # tables
    start = time.process_time()
    render(notes, 0, 10 * SAMPLE_RATE)
    assert time.process_time() - start < 0.2
