"""What a player sounds, against what the standard and FluidSynth say of each kind of file that is played otherwise."""

import gc
import os
import random
import struct
import threading
import time
import warnings
from pathlib import Path

import pytest

from music_synth.errors import UserError
from music_synth.midi import smf
from music_synth.midi.notes import Note, midi_bytes, read_midi
from music_synth.midi.smf import CONTROL_CHANGE, NOTE_OFF, NOTE_ON, PROGRAM_CHANGE, TEMPO, Event, MidiWarning
from music_synth.midi.tokenizer import Tokenizer

CASES = Path(__file__).parent / "cases"  # made for this project; see the table for what each has
MIDDLE_C = [(60, 0.0, 0.5)]
# What a player sounds: (pitch, onset, offset), and for some the program; the warning, where there is one.
RIGHT = {
    "all_notes_off": ([(60, 0.0, 0.5), (64, 0.0, 0.5), (67, 4.0, 4.5)], None),  # CC 123; no note-offs
    "byte_before_header": (MIDDLE_C, "1 byte before the header"),
    "controller_value_255": (MIDDLE_C, "track 1: byte 2: a data byte above 127"),
    "format2_one_track": (MIDDLE_C, None),  # as format 0
    "format2_two_tracks": ([(60, 0.0, 0.5), (67, 0.5, 1.0)], None),  # one after the other
    "gs_channel10_melodic": ([(60, 0.5, 1.0)], None),  # GS "use for rhythm part: off" for channel 10
    "gs_drum_part": ([(36, 0.5, 1.0)], None),  # GS "use for rhythm part" for channel 11
    "header_counts_too_many": (MIDDLE_C, "the header announces 3 tracks, there are 1"),
    "last_track_cut": ([(60, 0.0, 0.5), (67, 0.0, 0.5)], "track 2 of 2 announces 22 bytes, 16 are left"),
    "macbinary": (MIDDLE_C, "128 bytes before the header"),
    "no_note_off_at_end": ([(60, 0.0, 0.5), (67, 0.5, 1.5)], None),  # to the end of the track
    "off_then_pedal_same_tick": ([(60, 0.0, 0.5), (62, 0.5, 2.0)], None),
    "one_note_24h": ([(60, 0.0, 86039.98979)], None),
    "only_note_ons": ([(60, 0.0, 1.5), (62, 0.5, 1.5), (64, 1.0, 1.5)], None),
    "pedal_in_other_track": ([(72, 0.0, 2.0), (48, 0.0, 2.0)], None),  # two hands on one channel
    "pedal_then_program_change": ([(60, 0.0, 0.5), (64, 0.5, 1.5), (67, 1.5, 2.0), (60, 20.0, 20.5)], None),
    "program_255": (MIDDLE_C, "track 1: byte 2: a data byte above 127"),
    "program_change_while_held": ([(60, 0.0, 1.0), (64, 1.0, 1.5)], None),
    "reset_all_controllers": ([(60, 0.0, 1.0), (62, 2.0, 2.5)], None),  # CC 121 lets the pedal go
    "riff_rmid": (MIDDLE_C, None),
    "sostenuto": ([(48, 0.0, 3.0), (72, 1.0, 1.5)], None),
    "tempo_second_track": ([(60, 0.0, 0.25), (62, 0.25, 0.5)], None),
    "tempo_two_bytes": (MIDDLE_C, "track 1: byte 4: tempo of 2 bytes"),
    "track_length_too_long": ([(60, 0.0, 0.5), (67, 0.0, 0.5)], "track 1 announces 18 bytes, it has 13"),
    "unison_two_tracks": ([(60, 0.0, 4.0), (60, 1.0, 4.0)], None),  # the other violin plays it, too
    "vlq_five_bytes": (MIDDLE_C, "track 1: byte 0: a number of more than 4 bytes"),
    "xg_drum_bank": ([(36, 0.5, 1.0)], None),  # bank 127 makes channel 4 drums
    "zero_length_drums": ([(36, onset / 2, onset / 2 + 0.1) for onset in range(4)], None),
}
DRUMS = {"gs_drum_part", "xg_drum_bank", "zero_length_drums"}
PROGRAMS = {
    "gs_channel10_melodic": [40],
    "pedal_then_program_change": [0, 0, 48, 48],
    "program_change_while_held": [40, 19],  # that of the onset
    "unison_two_tracks": [40, 40],
}


def test_every_case_has_a_right_value():
    assert sorted(RIGHT) == sorted(path.stem for path in CASES.glob("*.mid"))


@pytest.mark.parametrize("name", RIGHT)
def test_cases_are_played_right(name):
    right, warning = RIGHT[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes = read_midi(CASES / f"{name}.mid")
    assert [(n.pitch, round(n.onset, 5), round(n.offset, 5)) for n in notes] == right
    assert {n.is_drum for n in notes} == {name in DRUMS}
    assert [n.program for n in notes] == PROGRAMS.get(name, [0] * len(notes))
    messages = [str(w.message) for w in caught]
    assert len(messages) == (warning is not None)
    if warning:
        assert issubclass(caught[0].category, MidiWarning)
        assert warning in messages[0] and f"{name}.mid" in messages[0] and "\n" not in messages[0]


# --- rules, one by one -------------------------------------------------------------------------------------------

BEAT = 100  # ticks, half a second


def play(*tracks):
    """(pitch, onset, offset) in beats of what tracks of (tick, kind, channel, a, b) sound."""
    return [(n.pitch, round(2 * n.onset, 6), round(2 * n.offset, 6)) for n in notes_of(*tracks)]


def notes_of(*tracks):
    return read_midi(smf.build([[Event(*event) for event in track] for track in tracks], BEAT))


def on(beat, pitch, velocity=90, channel=0):
    return (int(beat * BEAT), NOTE_ON, channel, pitch, velocity)


def off(beat, pitch, channel=0):
    return (int(beat * BEAT), NOTE_OFF, channel, pitch, 0)


def control(beat, number, value, channel=0):
    return (int(beat * BEAT), CONTROL_CHANGE, channel, number, value)


def program(beat, number, channel=0):
    return (int(beat * BEAT), PROGRAM_CHANGE, channel, number, 0)


def test_a_struck_key_ends_its_note_with_and_without_pedal():
    assert play([on(0, 60), on(1, 60), off(2, 60)]) == [(60, 0, 1), (60, 1, 2)]
    pedal = [control(0, 64, 127), on(0, 60), off(0.5, 60), on(1, 60), off(2, 60), control(3, 64, 0)]
    assert play(pedal) == [(60, 0, 1), (60, 1, 3)]


def test_a_change_of_pedal_on_one_tick_damps():
    track = [control(0, 64, 127), on(0, 60), off(1, 60), control(2, 64, 0), control(2, 64, 127), on(2, 62)]
    assert play([*track, off(3, 62), control(4, 64, 0)]) == [(60, 0, 2), (62, 2, 4)]


def test_a_pedal_that_is_never_released_holds_to_the_end_of_the_piece():
    assert play([control(0, 64, 127), on(0, 60), off(1, 60)], [on(4, 40, channel=1), off(5, 40, 1)])[0] == (60, 0, 5)


def test_a_pedal_holds_its_channel_and_no_other_and_no_drums():
    first = [control(0, 64, 127), on(0, 60), on(0, 40, channel=1), on(0, 36, channel=9)]
    assert play([*first, off(1, 36, 9), off(1, 40, 1), off(1, 60), control(2, 64, 0), control(3, 64, 0, 9)]) == [
        (60, 0, 2),
        (40, 0, 1),
        (36, 0, 1),
    ]


def test_sustain_takes_over_what_sostenuto_lets_go():
    track = [on(0, 60), control(1, 66, 127), off(1, 60), control(2, 64, 127), control(3, 66, 0), control(4, 64, 0)]
    assert play(track) == [(60, 0, 4)]


def test_sound_off_and_mode_messages_end_notes():
    held = [control(0, 64, 127), on(0, 60), off(1, 60), on(1, 62)]
    assert play([*held, control(2, 120, 0), control(5, 64, 0)]) == [(60, 0, 2), (62, 1, 2)]
    assert play([*held, control(2, 123, 0), control(5, 64, 0)]) == [(60, 0, 5), (62, 1, 5)]  # the pedal holds on
    assert play([on(0, 60), control(2, 127, 0), off(5, 60)]) == [(60, 0, 2)]


def test_velocities_above_127_are_as_loud_as_can_be():
    """As in five files of Debian's songwrite: what the notes are is plain."""
    data = smf.build([[Event(*e) for e in (on(0, 60), off(1, 60), on(1, 62), off(2, 62))]], BEAT)
    data = data.replace(bytes((62, 90)), bytes((62, 0xCC))).replace(bytes((60, 0)), bytes((60, 0xCC)))
    with pytest.warns(MidiWarning, match="track 1: byte 7: a velocity above 127"):
        assert [(n.pitch, n.velocity, n.offset) for n in read_midi(data)] == [(60, 90, 0.5), (62, 127, 1.0)]


def test_notes_of_no_length_are_short_notes():
    assert play([on(0, 60), off(0, 60), on(1, 36, channel=9), off(1, 36, 9)]) == [(60, 0, 0.02), (36, 1, 1.2)]
    # The off is that of the note that was struck last, as in FluidSynth: the file's order counts.
    assert play([on(0, 60), on(1, 60), off(1, 60), off(2, 60)]) == [(60, 0, 1), (60, 1, 1.02)]


def test_a_drum_that_nothing_ends_rings_shortly():
    assert play([on(0, 49, channel=9), on(8, 36, channel=9), off(9, 36, 9)])[0] == (49, 0, 0.2)


def test_tempo_of_every_track_and_of_none():
    late = [(BEAT, TEMPO, 0, 1_000_000, 0)]
    assert play([on(0, 60), off(2, 60)], late) == [(60, 0, 3)]
    assert play([on(0, 60), off(2, 60)]) == [(60, 0, 2)]


def test_state_belongs_to_the_channel_in_any_track():
    notes = notes_of([program(0, 40), control(0, 7, 50)], [on(0, 60, 80)], [off(1, 60)])
    assert notes == [Note(60, 40, 40, 0.0, 0.5)]


@pytest.mark.parametrize(
    ("volume", "expression", "velocity", "heard"),
    [
        (None, None, 100, 100),
        (100, 127, 77, 77),
        (50, None, 100, 50),
        (None, 64, 100, 50),
        (127, None, 100, 127),
        (127, None, 50, 64),
        (127, 127, 127, 127),
        (0, None, 100, 1),
        (25, 32, 80, 5),
    ],
)
def test_loudness_is_the_product(volume, expression, velocity, heard):
    controls = [control(0, n, value) for n, value in ((7, volume), (11, expression)) if value is not None]
    (note,) = notes_of([*controls, on(1, 60, velocity), control(1.5, 7, 1), off(2, 60)])
    assert note.velocity == heard


def test_published_reading_keeps_the_velocity_of_the_key():
    data = smf.build([[Event(*e) for e in (control(0, 7, 50), on(0, 60, 80), off(1, 60))]], BEAT)
    assert read_midi(data, as_published=True) == [Note(60, 80, 0, 0.0, 0.5)]
    assert read_midi(data) == [Note(60, 40, 0, 0.0, 0.5)]


XG_ON, GM2_ON = (0x43, 0x10, 0x4C, 0, 0, 0x7E, 0), (0x7E, 0x7F, 9, 3)
GS_RESET, GM_ON = (0x41, 0x10, 0x42, 0x12, 0x40, 0, 0x7F, 0, 0x41), (0x7E, 0x7F, 9, 1)
XG_PART_3_DRUMS = (0x43, 0x10, 0x4C, 0x08, 3, 7, 2)
GS_PART_3_DRUMS = (0x41, 0x10, 0x42, 0x12, 0x40, 0x14, 0x15, 1, 0x16)
GS_PART_3_WRONG_SUM = (*GS_PART_3_DRUMS[:-1], 0x17)


@pytest.mark.parametrize(
    ("message", "bank", "drums"),
    [
        (None, None, (False, True)),
        (None, 0, (False, True)),  # many programs send bank 0 everywhere
        (None, 127, (True, True)),
        (None, 120, (True, True)),
        (GM_ON, 0, (False, True)),
        (GM2_ON, 120, (True, True)),
        (GM2_ON, 121, (False, False)),
        (XG_ON, 127, (True, True)),
        (XG_ON, 126, (True, True)),
        (XG_ON, 0, (False, False)),
        (GS_RESET, 127, (False, True)),  # in GS a map of the MT-32's sounds
        (GS_PART_3_DRUMS, None, (True, True)),
        (GS_PART_3_DRUMS, 0, (True, True)),
        (GS_PART_3_WRONG_SUM, None, (False, True)),
        (XG_PART_3_DRUMS, None, (True, True)),
    ],
)
def test_drums_by_bank_and_by_system_exclusive(message, bank, drums):
    events = []
    for channel in (3, 9):
        if bank is not None:
            events += [control(1, 0, bank, channel), control(1, 32, 0, channel)]
        events += [program(1, 8, channel), on(1, 60, channel=channel), off(2, 60, channel)]
    data = bytearray(smf.build([[Event(*event) for event in sorted(events, key=lambda e: e[0])]], BEAT))
    if message:
        event = bytes((0, 0xF0, len(message) + 1, *message, 0xF7))
        data[22:22] = event
        data[18:22] = struct.pack(">I", len(data) - 22)
    notes = read_midi(bytes(data))
    assert [n.is_drum for n in notes] == list(drums)
    assert [n.program for n in notes] == [8, 8]


def test_a_reset_ends_notes_and_forgets_programs():
    data = smf.build(
        [[Event(*e) for e in (program(0, 40), control(0, 7, 9), on(0, 60), program(1, 40), on(2, 62))]], BEAT
    )
    data = data.replace(bytes((BEAT, 0xC0, 40)), bytes((BEAT, 0xF0, 5, *GM_ON, 0xF7)))  # in place of the second change
    data = data[:18] + struct.pack(">I", len(data) - 22) + data[22:]
    assert bytes(GM_ON) in data
    assert read_midi(data)[0] == Note(60, 8, 40, 0.0, 0.5, False, 0)
    assert read_midi(data)[1][:3] == (62, 90, 0)


# --- unisons ------------------------------------------------------------------------------------------------------


def heard(notes):
    """The stretches of 10 ms steps in which each (program, pitch) sounds."""
    steps = {}
    for n in notes:
        steps.setdefault((n.program, n.pitch), set()).update(range(round(n.onset * 100), round(n.offset * 100)))
    return steps


def test_unisons_sound_as_long_in_tokens_as_in_the_file():
    rng = random.Random(0)
    for _ in range(200):
        channels = [0, 1, 2]
        tracks = []
        for channel in channels:
            track, beat = [], 0
            for _ in range(rng.randint(1, 5)):
                beat += rng.randint(0, 4) / 2
                pitch, length = rng.choice((60, 61)), rng.randint(1, 6) / 2
                track += [on(beat, pitch, channel=channel), off(beat + length, pitch, channel)]
                beat += length
            tracks.append(track)
        alone = [note for track in tracks for note in notes_of(track)]
        notes = notes_of(*tracks)
        assert sorted((n.onset, n.pitch) for n in notes) == sorted((n.onset, n.pitch) for n in alone)
        assert heard(notes) == heard(alone)
        tokenizer = Tokenizer()
        assert heard(tokenizer.decode(tokenizer.encode(notes)).notes) == heard(alone)


def test_a_unison_changes_as_little_as_it_can():
    # Two players who let go 10 ms apart: both end with the later.
    tracks = [on(0, 60), off(1.98, 60)], [on(0.02, 60, channel=1), off(2, 60, 1)]
    assert play(*tracks) == [(60, 0, 2), (60, 0.02, 2)]
    # One whose note ends just after the other's begins: it is cut there.
    tracks = [on(0, 60), off(1.02, 60)], [on(1, 60, channel=1), off(4, 60, 1)]
    assert play(*tracks) == [(60, 0, 1), (60, 1, 4)]


# --- bounds -------------------------------------------------------------------------------------------------------


def test_endless_and_large_sources_are_refused_in_bounded_memory(tmp_path):
    for source in ("/dev/zero", bytes(smf.MAX_BYTES + 1)):
        with pytest.raises(UserError, match="larger than 16 MiB"):
            read_midi(source)
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe.mid"
        os.mkfifo(pipe)
        data = midi_bytes([Note(60, 90, 0, 0.0, 0.5)])
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        assert len(read_midi(pipe)) == 1
        writer.join()
    with pytest.raises(UserError, match="empty"):
        read_midi("/dev/null")


def test_too_many_notes_are_refused(monkeypatch):
    monkeypatch.setattr(smf, "MAX_EVENTS", 100)
    body = bytes((0, 0x90, 60, 90)) + bytes((1, 60, 90)) * 200
    data = struct.pack(">4sIHHH4sI", b"MThd", 6, 1, 2, 96, b"MTrk", len(body)) + body
    for as_published in (False, True):
        with pytest.raises(UserError, match="more than 100 notes and controls"):
            read_midi(data, as_published)


def crowd(kind, count):
    """A file with `count` times what took quadratic time: pedals under held notes, or note-ons of one pitch."""
    body = bytearray((0, 0x90, 60, 90))
    for i in range(count):
        if kind == "pedals":
            body += bytes((1, 0xB0, 64, 127 * (i % 2), 0, 0x90, i % 100, 90))
        elif kind == "notes":
            body += bytes((1, 0x90, 60, 90))
        else:
            body += bytes((1, 0xB0, 66, 127 * (i % 2), 0, 0xC0, i % 128, 0, 0x90, 60 + i % 7, 90 * (i % 2)))
    body += bytes((1, 0x80, 60, 0, 0, 0xFF, 0x2F, 0))
    return struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, 96, b"MTrk", len(body)) + body


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("kind", ["pedals", "notes", "all sorts"])
def test_time_is_linear_in_the_events(kind, as_published):
    """Ten times the file takes about ten times as long; a quadratic reader takes a hundred times."""

    def seconds(count):
        data, spent = crowd(kind, count), []
        gc.disable()  # its pauses grow with what other tests have left in memory
        for _ in range(3):
            start = time.process_time()
            read_midi(data, as_published)
            spent.append(time.process_time() - start)
        gc.enable()
        return min(spent)

    assert seconds(20_000) < 40 * max(seconds(2_000), 0.005)


# --- anything at all ---------------------------------------------------------------------------------------------

WORDS = [
    b"MThd",
    b"MTrk",
    b"\xff\x2f\x00",
    b"\xff\x51\x03",
    b"\xf0",
    b"\xf7",
    b"\xff\xff\xff\x7f",
    b"\x90",
    b"\xb0\x40",
]


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        choice = rng.random()
        if choice < 0.4 and at < len(data):
            data[at] = rng.randrange(256)
        elif choice < 0.55:
            del data[at : at + rng.choice((1, 2, 4, 20))]
        elif choice < 0.7:
            data[at:at] = rng.choice(WORDS)
        elif choice < 0.8:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        elif choice < 0.9:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        else:
            del data[at:]
    return bytes(data)


def read_without_surprise(data):
    """Reads both ways: notes that make sense, or a UserError of one line."""
    for as_published in (False, True):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                notes = read_midi(data, as_published)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            continue
        assert notes and all(0 <= n.onset < n.offset < 24 * 3600 and 1 <= n.velocity <= 127 for n in notes)
        assert all(0 <= n.pitch <= 127 and 0 <= n.program <= 127 for n in notes)
        assert len(caught) <= 1 and all("\n" not in str(w.message) and len(str(w.message)) < 500 for w in caught)
        if not as_published:
            assert {n.velocity > 0 for n in notes} == {True}


def mutations(count, seed):
    sources = [path.read_bytes() for path in sorted(CASES.glob("*.mid"))]
    sources += [path.read_bytes() for path in sorted((CASES.parents[1] / "golden/midi").glob("[ae]_*.mid"))]
    rng = random.Random(seed)
    return (mutated(rng, rng.choice(sources)) for _ in range(count))


def test_mutated_files_raise_nothing_else():
    for data in mutations(600, 0):
        read_without_surprise(data)


@pytest.mark.slow
def test_many_mutated_files_raise_nothing_else():
    start = time.process_time()
    for data in mutations(20_000, 1):
        read_without_surprise(data)
    assert time.process_time() - start < 300


def test_every_truncation_plays_what_is_whole():
    data = (CASES.parents[1] / "golden/midi/a_piano_sustain.mid").read_bytes()
    whole = {(n.pitch, n.onset) for n in read_midi(data)}
    counts = []
    for length in range(40, len(data), 7):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                notes = read_midi(data[:length])
        except UserError as error:
            assert "no notes" in str(error)
            notes = []
        assert {(n.pitch, n.onset) for n in notes} <= whole
        counts.append(len(notes))
    assert counts == sorted(counts) and counts[-1] > 0.9 * len(whole)
