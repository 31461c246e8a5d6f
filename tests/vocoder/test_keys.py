"""Keys that are read off a mel, and lists of notes that it does not bear out."""

import numpy as np
import pytest

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, SAMPLE_RATE, log_mel
from music_synth.errors import UserError
from music_synth.vocoder import keys
from music_synth.vocoder.excitation import Excitation
from music_synth.vocoder.source import source_of_frames
from tests.vocoder.test_notes import FRAMES, NOTES, played


def listed(notes):
    sounds = np.zeros((FRAMES, keys.NUM_KEYS), bool)
    for note in notes:
        sounds[int(note.onset * FRAME_RATE) : int(note.offset * FRAME_RATE) + 3, note.pitch - keys.LOWEST] = True
    return sounds


def test_most_of_what_is_read_sounds_and_most_of_what_sounds_is_read():
    """Measured: 0.83 and 0.99."""
    levels = keys.key_levels(log_mel(played(NOTES), np)[:FRAMES])
    sounds = listed(NOTES)
    assert levels[sounds].sum() > 0.75 * levels.sum()
    middles = [(int((n.onset + 0.2) * FRAME_RATE), n.pitch - keys.LOWEST) for n in NOTES]
    assert np.mean([levels[t, key] > 0.05 * levels[t].max() for t, key in middles]) > 0.9


def test_noise_is_hardly_taken_for_keys():
    """In shares of a tone as loud (measured: 0.05)."""
    rng, t = np.random.default_rng(0), np.arange(FRAMES * HOP_LENGTH) / SAMPLE_RATE
    noise = rng.normal(size=len(t)).astype(np.float32) * 0.1
    tone = (0.1 * np.sqrt(2) * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    loudest = [keys.key_levels(log_mel(x, np)).max(axis=1).mean() for x in (noise, tone)]
    assert loudest[0] < 0.1 * loudest[1]


def test_tones_run_on_at_their_frequencies():
    """However many hops are made at once; the clock goes 1 % fast."""
    levels = np.zeros((101, keys.NUM_KEYS), np.float32)
    levels[:, 69 - keys.LOWEST] = 0.1
    clock = 1.01 * np.arange(101) / FRAME_RATE
    whole = keys.tones(levels, clock)
    parts = [keys.tones(levels[i : i + 26], clock[i : i + 26]) for i in range(0, 100, 25)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    spectrum = np.abs(np.fft.rfft(whole * np.hanning(len(whole))))
    assert abs(np.argmax(spectrum[:1200]) * SAMPLE_RATE / len(whole) - 1.01 * 440) < 1


def test_a_silent_mel_and_an_empty_one_have_no_keys():
    assert not keys.key_levels(log_mel(np.zeros(FRAMES * HOP_LENGTH, np.float32), np)).any()
    excitation = Excitation([])
    excitation.hear(np.zeros((0, 128), np.float32))
    np.testing.assert_array_equal(excitation.of_frames(0, 5), np.zeros(8 * HOP_LENGTH, np.float32))


def test_pitches_that_there_are_not_are_named():
    with pytest.raises(UserError, match=r"a note of pitch 300: pitches are 0\.\.127"):
        Excitation([NOTES[0]._replace(pitch=300)])


@pytest.mark.parametrize("shift, believed", [(0.0, True), (1.0, False), (0.5, False)])
def test_a_list_is_believed_where_the_mel_bears_it_out(shift, believed):
    """Three times the chords; as much source of the list as is believed."""
    notes = [n._replace(onset=n.onset + 2.8 * i, offset=n.offset + 2.8 * i) for i in range(3) for n in NOTES]
    audio = np.concatenate([played(NOTES)[: round(2.8 * SAMPLE_RATE)]] * 3)
    mel = log_mel(audio, np)[:400]
    said = [n._replace(onset=n.onset + shift, offset=n.offset + shift) for n in notes]
    excitation = Excitation(said)
    excitation.hear(mel)
    made, ideal = excitation.of_frames(300, 80), source_of_frames(said, 300, 80)
    share = made @ ideal / (ideal @ ideal)
    assert share > 0.9 if believed else share < 0.3
