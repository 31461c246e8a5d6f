"""Note scores against golden numbers and by hand; basic-pitch on audio whose notes are known."""

import json

import numpy as np
import pytest

from music_synth.audio.io import resample
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.errors import UserError
from music_synth.evaluation import transcription
from music_synth.evaluation.transcription import (
    MEASURES,
    BasicPitch,
    match,
    note_scores,
    peaks,
    posteriors,
    without_drums,
)
from music_synth.midi.notes import Note, midi_bytes
from tests import golden_arrays

GOLDEN = golden_arrays.load("metrics")
SCORES = json.loads((golden_arrays.GOLDEN / "metrics_scores.json").read_text(encoding="utf-8"))
FRAME = transcription.HOP / transcription.MODEL_RATE  # seconds


def golden_notes(case, which):
    rows = GOLDEN[f"notes/{case}/{which}"]
    return [
        Note(int(pitch), int(vel), int(prog), start, end, bool(drum)) for start, end, pitch, vel, prog, drum in rows
    ]


def reference_key(key):
    """(name, measure, tolerance or None) here of a key of the reference: 'Drum onset F1 (flat)' -> drum, f1, None."""
    what, _, bracket = key.partition(" (")
    name, measure = what.rsplit(" ", 1)
    bracket = bracket.rstrip(")")
    if name.startswith("sweep"):
        name, tolerance = "offset", float(bracket)
    elif name.startswith("drumless"):
        name, tolerance = name.removeprefix("drumless ").lower().replace(" + ", "_"), None
    else:
        suffix = "_nondrum" if name.startswith("Nondrum") else ""
        name, tolerance = "drum" if name.startswith("Drum") else bracket + suffix, None
    return name, measure.lower(), tolerance


@pytest.mark.parametrize("case", SCORES["transcription"])
def test_note_scores_equal_the_reference(case):
    reference, estimate = golden_notes(case, "ref"), golden_notes(case, "est")
    scores = note_scores(reference, estimate)
    seen = set()
    for key, expected in SCORES["transcription"][case].items():
        name, measure, tolerance = reference_key(key)
        if tolerance is None:
            got = scores[f"{name}_{measure}"]
            seen.add(f"{name}_{measure}")
        else:
            pitched = without_drums(reference), without_drums(estimate)
            got = match(*pitched, tolerance=tolerance)[MEASURES.index(measure)]
        assert got == pytest.approx(expected, abs=1e-12), key
    assert seen == {key for key in scores if case == "multi" or "velocity" not in key or key in seen}


def test_means_over_clips_equal_the_reference():
    """The reference's wrapper: scores of the model's audio and of the recording ("GT"), mean over two clips."""
    means = {}
    for who, which in (("Model", "est"), ("GT", "gt_transcribed")):
        clips = [note_scores(golden_notes(case, "ref"), golden_notes(case, which)) for case in ("multi", "piano_close")]
        means[who] = {key: np.mean([clip[key] for clip in clips]) for key in clips[0]}
    for key, expected in SCORES["transcription_metric_fn_over_multi_and_piano_close"].items():
        who, _, key = key.partition(" ")
        name, measure, _ = reference_key(key)
        assert means[who][f"{name}_{measure}"] == pytest.approx(expected, abs=1e-12), key


def test_scores_of_hand_made_notes():
    reference = [Note(60, 80, 0, 0.0, 1.0), Note(64, 80, 0, 1.0, 2.0), Note(67, 80, 40, 2.0, 3.0)]
    drums = [Note(36, 80, 0, 0.5, 0.6, True), Note(38, 80, 0, 1.5, 1.6, True)]
    estimate = [
        Note(60, 80, 0, 0.04, 1.1),  # right
        Note(64, 80, 0, 1.0, 1.5),  # its offset is wrong
        Note(67, 80, 41, 2.0, 3.0),  # its program is wrong, the class is right
        Note(67, 80, 0, 2.06, 3.0),  # too late, and one too many
        Note(36, 80, 0, 0.5, 0.9, True),  # right: drums have no offset
    ]
    scores = note_scores(reference + drums, estimate)

    def of(name):
        return tuple(scores[f"{name}_{measure}"] for measure in MEASURES)

    def f1(p, r):
        return (p, r, 2 * p * r / (p + r))

    assert of("onset") == pytest.approx(f1(3 / 4, 3 / 3))
    assert of("onset_offset") == pytest.approx(f1(2 / 4, 2 / 3))
    assert of("drum") == pytest.approx(f1(1 / 1, 1 / 2))
    assert of("flat") == pytest.approx(f1(3 / 5, 3 / 5))
    assert of("midi_class_nondrum") == pytest.approx(f1(2 / 4, 2 / 3))
    assert of("full_nondrum") == pytest.approx(f1(1 / 4, 1 / 3))
    assert of("full") == pytest.approx(f1(2 / 5, 2 / 5))
    assert set(note_scores(reference, reference).values()) == {0, 1}  # 0: the drums that are not there
    assert note_scores(estimate[::-1], (reference + drums)[::-1]).keys() == scores.keys()
    assert note_scores((reference + drums)[::-1], estimate[::-1]) == pytest.approx(scores)  # in any order
    assert note_scores([*reference, *drums, Note(60, 80, 0, 4.0, 4.0)], estimate) == scores  # no length, no note
    assert set(note_scores([], []).values()) == {0}


# --- basic-pitch -------------------------------------------------------------------------------------------------

MELODY = [Note(pitch, 90, 0, 0.2 + 0.5 * i, 0.6 + 0.5 * i) for i, pitch in enumerate((60, 64, 67, 72, 55, 62, 69))]


@pytest.fixture(scope="module")
def melody():
    """A piano, 3.9 s: two windows and a bit."""
    return resample(render_midi(midi_bytes(MELODY), reverb=False), RENDER_RATE, 16_000)


def test_basic_pitch_hears_a_melody(melody):
    notes = BasicPitch()(melody)
    scores = note_scores(MELODY, notes)
    assert scores["onset_recall"] == 1 and scores["onset_precision"] > 0.6
    onsets = [note.onset for note in MELODY]
    heard = [
        min((note.onset for note in notes if note.pitch == p.pitch), key=lambda t: abs(t - p.onset)) for p in MELODY
    ]
    assert np.abs(np.array(heard) - onsets).max() < 0.03
    assert all(0 <= note.onset < note.offset <= len(melody) / 16_000 for note in notes)
    assert {(note.program, note.is_drum) for note in notes} == {(0, False)}
    # A semitone up, the same notes are all wrong.
    assert note_scores([note._replace(pitch=note.pitch + 1) for note in MELODY], notes)["onset_recall"] < 0.2


def test_time_stays_exact_over_many_windows(melody):
    late = BasicPitch()(np.concatenate([np.zeros(20 * 16_000, np.float32), melody]))
    moved = [note._replace(onset=note.onset + 20, offset=note.offset + 20) for note in MELODY]
    off = [min((note.onset - p.onset for note in late if note.pitch == p.pitch), key=abs) for p in moved]
    assert np.abs(off).max() < 0.03 and abs(np.mean(off)) < 0.01


def test_posteriors_do_not_depend_on_how_many_windows_run_together(melody, monkeypatch):
    together = posteriors(melody)
    assert together.onsets.shape == (int(np.ceil(len(melody) * 22050 / 16000 / 256)), 88)
    assert together.contours.shape == (len(together.onsets), 264)
    assert all(0 <= part.min() and part.max() <= 1 for part in together)
    transcription._posteriors.cache_clear()
    monkeypatch.setattr(transcription, "WINDOWS_PER_CALL", 1)
    for a, b in zip(together, posteriors(melody), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_basic_pitch_on_what_is_no_music():
    assert BasicPitch()(np.zeros(16_000, np.float32)) == []
    assert BasicPitch()(np.zeros(1, np.float32)) == []
    with pytest.raises(UserError, match="too short for basic-pitch"):
        BasicPitch()(np.zeros(0, np.float32))
    with pytest.raises(UserError, match=r"not finite .* at 0.50 s"):
        BasicPitch()(np.where(np.arange(16_000) == 8000, np.nan, 0).astype(np.float32))
    with pytest.raises(ValueError, match="mono floats"):
        BasicPitch()(np.zeros((100, 2), np.float32))


def test_basic_pitch_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    transcription.basic_pitch_session.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps basic-pitch"):
        transcription.basic_pitch_session()


def found(onsets, activation, **settings):
    return [note[:3] for note in BasicPitch(**settings).find_notes(onsets, activation)]


def test_notes_from_posteriors():
    onsets, activation = np.zeros((2, 200, 88))
    activation[20:60, 40] = 0.8
    onsets[20, 40] = 0.9
    assert found(onsets, activation) == [(20, 60, 40)]
    activation[40:46, 40] = [0.2, 0.1, 0.1, 0.25, 0.45, 0.65]  # a short dip is bridged
    assert found(onsets, activation) == [(20, 60, 40)]
    assert found(onsets, activation, max_gap=2) == [(20, 40, 40), (44, 60, 40)]  # a longer one ends the note
    assert found(onsets, activation, max_gap=2, min_seconds=0.19) == [(20, 40, 40)]
    activation[40:46, 40] = [0.2, 0.1, 0.1, 0.1, 0.1, 0.1]  # a jump up is an onset
    assert found(onsets, activation) == [(46, 60, 40), (20, 40, 40)]
    activation[:] = 0
    activation[20:60, 40] = 0.8
    onsets[40, 40] = 0.9  # struck again while it sounds
    assert sorted(found(onsets, activation)) == [(20, 40, 40), (40, 60, 40)]
    onsets[:] = 0
    assert found(onsets, activation) == [(20, 60, 40)]  # no onset at all: what sounds is still a note
    activation[20:60, 41] = 0.5  # what leaks into a neighbor is no note of its own
    assert found(onsets, activation) == [(20, 60, 40)]
    assert found(onsets, activation, min_seconds=1.0) == []
    assert found(onsets[:0], activation[:0]) == []


def test_peaks_over_time():
    values = np.zeros((5, 2))
    values[:, 0] = [0.9, 0.1, 0.6, 0.5, 0.9]
    values[:, 1] = [0.1, 0.4, 0.1, 0.7, 0.2]
    assert peaks(values, 0.5) == [(2, 0), (3, 1)]  # no peaks at the ends
