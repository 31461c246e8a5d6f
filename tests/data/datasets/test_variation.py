"""Variations: what is drawn, and that labels follow the change."""

import numpy as np
import pytest

from music_synth.audio.soundfont import Room
from music_synth.data.datasets.variation import (
    FAMILY,
    KINDS,
    MAX_GAIN,
    MAX_TEMPO,
    MAX_TRANSPOSITION,
    Variation,
    equalize,
    vary,
)
from music_synth.errors import UserError
from music_synth.midi import players, smf
from music_synth.midi.notes import Note
from music_synth.midi.smf import CONTROL_CHANGE, NOTE_OFF, NOTE_ON, PITCH_BEND, PROGRAM_CHANGE, TEMPO, Event


def piece(*events):
    return smf.parse(smf.build([sorted((Event(*event) for event in events), key=lambda event: event.tick)], 100))


def notes(midi):
    return [Note(*sound) for sound in players.sounds(midi)]


SONG = piece(
    (0, TEMPO, 0, 400_000, 0),
    (0, PROGRAM_CHANGE, 0, 40, 0),
    (0, PROGRAM_CHANGE, 9, 16, 0),
    (0, CONTROL_CHANGE, 1, players.VOLUME, 64),
    *((tick, NOTE_ON, channel, 60 + channel, 90) for tick, channel in ((0, 0), (100, 1), (200, 9))),
    *((tick + 50, NOTE_OFF, channel, 60 + channel, 0) for tick, channel in ((0, 0), (100, 1), (200, 9))),
)


def test_a_variation_is_its_seed_and_stays_in_its_bounds():
    drawn = [Variation.draw(f"{i}") for i in range(200)]
    assert drawn == [Variation.draw(f"{i}") for i in range(200)] and len(set(drawn)) == 200
    for variation in drawn:
        assert all(new // FAMILY == old // FAMILY for old, new in enumerate(variation.programs))
        assert abs(variation.transposition) <= MAX_TRANSPOSITION
        assert 1 / MAX_TEMPO <= variation.tempo <= MAX_TEMPO
        assert max(map(abs, variation.gains)) <= MAX_GAIN
    assert {v.transposition for v in drawn} == set(range(-MAX_TRANSPOSITION, MAX_TRANSPOSITION + 1))
    assert {isinstance(v.room, Room) for v in drawn} == {True, False}
    assert len({v.programs[40] for v in drawn}) == FAMILY


def test_one_kind_more_changes_none_of_the_others():
    whole = Variation.draw("a")
    for kind in KINDS:
        alone = Variation.draw("a", [kind])
        assert getattr(alone, kind) == getattr(whole, kind)
        assert all(getattr(alone, other) == getattr(Variation(), other) for other in KINDS if other != kind)
    with pytest.raises(UserError, match="unknown variation 'colour': choose from programs, transposition"):
        Variation.draw("a", ["tempo", "colour"])


def test_nothing_is_changed_by_default():
    assert notes(vary(SONG, Variation())) == notes(SONG)


def test_programs_change_but_not_drums():
    programs = tuple(range(128))[::-1]
    assert [(n.program, n.is_drum) for n in notes(vary(SONG, Variation(programs)))] == [
        (87, False),
        (127, False),  # no program was chosen: 0
        (16, True),
    ]


def test_pitches_move_together_and_within_the_keys():
    assert [n.pitch for n in notes(vary(SONG, Variation(transposition=3)))] == [63, 64, 69]
    low = piece((0, NOTE_ON, 0, 1, 90), (0, NOTE_ON, 0, 30, 90), (50, NOTE_OFF, 0, 1, 0), (50, NOTE_OFF, 0, 30, 0))
    moved = notes(vary(low, Variation(transposition=-5)))
    assert [(n.pitch, n.offset) for n in moved] == [(0, 0.25), (29, 0.25)]


@pytest.mark.parametrize("song", [SONG, SONG._replace(division=0, tick_seconds=0.004)])
def test_tempo_scales_every_time(song):
    for before, after in zip(notes(song), notes(vary(song, Variation(tempo=1.25))), strict=True):
        assert after.onset * 1.25 == pytest.approx(before.onset)
        assert after.offset * 1.25 == pytest.approx(before.offset)


def test_gains_are_in_the_effective_velocity():
    louder = notes(vary(SONG, Variation(gains=(-6.0, 6.0) + (0.0,) * 14)))
    # 40 log10 of the velocities' ratio is the gain
    for before, after, gain in zip(notes(SONG), louder, (-6, 6, 0), strict=True):
        assert 40 * np.log10(after.velocity / before.velocity) == pytest.approx(gain, abs=0.4)


def test_vibrato_goes_around_the_bends_of_the_piece():
    bent = piece(*SONG.tracks[0], (100, PITCH_BEND, 1, 0, 80))
    varied = vary(bent, Variation(vibrato=(25.0, 10.0, *(50.0,) * 14)))
    assert notes(varied) == notes(bent)
    bends = [event for track in varied.tracks for event in track if event.kind == PITCH_BEND]
    assert {event.channel for event in bends} == {*range(16)} - {9}
    for channel, center, depth in ((0, 8192, 25), (1, 80 << 7, 10)):
        values = [event.a | event.b << 7 for event in bends if event.channel == channel and event.tick > 100]
        cents = (np.array(values) - center) / 8192 * 200
        assert np.abs(cents).max() == pytest.approx(depth, rel=0.06) and abs(np.mean(cents)) < depth / 4


def test_a_reset_keeps_the_variation():
    midi = SONG._replace(tracks=[[Event(0, smf.RESET, 0, smf.GM, 0), *SONG.tracks[0]]])
    variation = Variation.draw("b")
    assert notes(vary(midi, variation)) == notes(vary(SONG, variation))


def test_the_equalizer_has_the_gain_it_is_given():
    time = np.arange(16000) / 16000
    for frequency, gain in ((60, 3.0), (250, -4.0), (1000, 2.0), (4000, 0.0)):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        made = equalize(tone, 16000, (3.0, -4.0, 2.0, 0.0, 1.0))
        middle = slice(4000, 12000)
        assert made.dtype == np.float32 and len(made) == len(tone)
        assert 20 * np.log10(made[middle].std() / tone[middle].std()) == pytest.approx(gain, abs=0.3)
    assert equalize(tone, 16000, (0.0,) * 5) is tone
