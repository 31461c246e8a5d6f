"""The file format alone: every way of being damaged is one `MidiError`, and lenience where files need it."""

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from music_synth.errors import UserError
from music_synth.midi import smf
from music_synth.midi.notes import Note, parse_midi, read_midi
from music_synth.midi.smf import Event, MidiError, MidiWarning

MIDI = Path(__file__).parents[1] / "golden" / "midi"
NOTE = bytes.fromhex("00 903c64 60 803c00")  # middle C for 96 ticks
END = bytes.fromhex("00 ff2f00")


def header(file_format=0, tracks=1, division=96):
    return struct.pack(">4sIHHH", b"MThd", 6, file_format, tracks, division)


def track(body, length=None):
    return struct.pack(">4sI", b"MTrk", len(body) if length is None else length) + body


def test_smallest_file():
    assert read_midi(header() + track(NOTE + END), as_published=True) == [Note(60, 100, 0, 0.0, 0.5)]


@pytest.mark.parametrize(
    "body",
    [
        NOTE,  # no end of track
        bytes.fromhex("00 903c64 60 3c00") + END,  # running status, note-on of velocity 0 as note-off
        bytes.fromhex("00 903c64 00 ff0102 4141 60 3c00") + END,  # running status across a meta event
        bytes.fromhex("00 903c64 00 f003 010203 60 3c00") + END,  # and across system exclusive
        bytes.fromhex("00 d005 00 a03c05 00 f8 00 f3 01") + NOTE + END,  # pressure, clock, song select
        NOTE + END + bytes.fromhex("00 90"),  # rubbish after the end of the track
        bytes.fromhex("00 ff510307a120") + NOTE + END,  # 500000 us a beat, as it is without
    ],
)
def test_reads_what_is_found_in_the_wild(body):
    assert read_midi(header() + track(body), as_published=True) == [Note(60, 100, 0, 0.0, 0.5)]


def test_reads_past_unknown_chunks_long_headers_and_trailing_bytes():
    longer = b"MThd" + struct.pack(">IHHHH", 8, 1, 2, 96, 0)
    unknown = struct.pack(">4sI", b"XFIH", 3) + b"abc"
    data = longer + track(END) + unknown + track(NOTE + END) + b"trailing"
    assert read_midi(data, as_published=True) == [Note(60, 100, 0, 0.0, 0.5)]


@pytest.mark.parametrize(("division", "seconds"), [(0xE728, 96 / 1000), (0xE350, 96 * 1001 / 30000 / 80)])
def test_smpte_division_fixes_the_tick(division, seconds):
    fast = bytes.fromhex("00 ff5103000001")  # a tempo that must not matter
    (note,) = read_midi(header(division=division) + track(fast + NOTE + END), as_published=True)
    assert (note.onset, note.offset) == (0.0, pytest.approx(seconds, rel=1e-12))


def test_tempo_of_the_first_track_only():
    def tempo(delta, microseconds):
        return bytes([delta, 0xFF, 0x51, 3]) + microseconds.to_bytes(3, "big")

    first = track(tempo(0, 250_000) + tempo(48, 1_000_000) + END)
    second = track(tempo(0, 1) + NOTE + END)
    (note,) = read_midi(header(1, 2) + first + second, as_published=True)
    assert note.offset == pytest.approx(0.125 + 0.5, abs=1e-12)  # 48 ticks at 4 beats a second, 48 at 1


DAMAGED = {
    "empty": (b"", "empty"),
    "text": (b"once upon a time", "not a MIDI file"),
    "riff": (b"RIFF" + bytes(40), "not a MIDI file"),
    "header cut": (header()[:9], "truncated.*header needs 14 bytes, there are 9"),
    "short header": (b"MThd" + struct.pack(">IHHH", 4, 0, 1, 96), "a header of 4 bytes"),
    "format 2": (header(2, 2) + track(NOTE + END) * 2, "format 2"),
    "no division": (header(division=0) + track(NOTE + END), "0 ticks a beat"),
    "smpte": (header(division=0x8000) + track(NOTE + END), "SMPTE division 128 x 0"),
    "no track": (header(), "announces 1 tracks, there are 0"),
    "track missing": (header(1, 3) + track(END) * 2, "announces 3 tracks, there are 2"),
    "track cut": (header() + track(NOTE, 500), "track 1 of 1 announces 500 bytes, 8 are left"),
    "event cut": (header() + track(NOTE[:-2]), "track 1: ends inside an event"),
    "delta cut": (header() + track(b"\x81"), "ends inside an event"),
    "meta cut": (header() + track(bytes.fromhex("00 ff0105 41")), "ends inside an event"),
    "sysex cut": (header() + track(bytes.fromhex("00 f005 41")), "ends inside an event"),
    "no status": (header() + track(bytes.fromhex("00 3c64")), "data with no event before it"),
    "high data": (header() + track(bytes.fromhex("00 90ff3c")), "a data byte above 127"),
    "high velocity": (header() + track(bytes.fromhex("00 903cff")), "a velocity above 127"),
    "long number": (header() + track(bytes.fromhex("ffffffff7f 903c64")), "more than 4 bytes"),
    "zero tempo": (header() + track(bytes.fromhex("00 ff5103000000") + NOTE), "tempo"),
    "short tempo": (header() + track(bytes.fromhex("00 ff510101") + NOTE), "tempo of 1 bytes"),
    "no notes": (header() + track(END), "no notes"),
    "never released": (header() + track(bytes.fromhex("00 903c64") + END), "no notes"),
    "no tracks": (header(tracks=0), "no notes"),
    "endless": (header(division=1) + track(bytes.fromhex("00 903c64 ffffff7f 803c00")), "hours"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_one_clear_error(case, tmp_path):
    data, message = DAMAGED[case]
    path = tmp_path / "song.mid"
    path.write_bytes(data)
    with pytest.raises(MidiError, match=message) as error:
        read_midi(path, as_published=True)
    assert isinstance(error.value, UserError)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(MidiError, match=r"^MIDI data: .*" + message):
        read_midi(data, as_published=True)


@pytest.mark.parametrize("event", ["00 b00740", "00 ff5103070000", "00 f0057e7f0901f7"])
def test_events_of_every_kind_are_bounded(monkeypatch, event):
    """Controls, tempo, system exclusive: each takes memory, and time to play."""
    monkeypatch.setattr(smf, "MAX_EVENTS", 10)
    with pytest.raises(MidiError, match="more than 10 notes and controls"):
        parse_midi(header() + track(bytes.fromhex(event) * 11 + NOTE + END))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(MidiError, match=r"missing\.mid: no such MIDI file"):
        read_midi(tmp_path / "missing.mid", as_published=True)
    with pytest.raises(MidiError, match="a folder"):
        read_midi(str(tmp_path), as_published=True)
    with pytest.raises(MidiError, match="cannot be read"):
        read_midi("a\0b.mid", as_published=True)
    with pytest.raises(MidiError, match="cannot be read"):
        read_midi(tmp_path / ("x" * 400), as_published=True)


@pytest.mark.parametrize("name", ["a_piano_sustain", "e_edge_cases"])
def test_every_truncation_is_an_error(name):
    data = (MIDI / f"{name}.mid").read_bytes()
    for length in range(len(data)):
        with pytest.raises(MidiError):
            parse_midi(data[:length])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_changed_bytes_never_raise_anything_else(data):
    original = (MIDI / "e_edge_cases.mid").read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        notes = read_midi(bytes(changed), as_published=True)
    except MidiError:
        return
    assert all(0 <= note.onset < note.offset for note in notes)


EVENTS = st.lists(
    st.builds(
        Event,
        tick=st.integers(0, 40),
        kind=st.sampled_from(smf.KEPT),
        channel=st.integers(0, 15),
        a=st.integers(0, 127),
        b=st.integers(0, 127),
    ),
    max_size=20,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(EVENTS, max_size=4), st.integers(1, 32767))
def test_build_and_parse_are_inverse(tracks, division):
    tracks = [
        sorted((e._replace(b=0) if e.kind == smf.PROGRAM_CHANGE else e for e in track), key=lambda e: e.tick)
        for track in tracks
    ]
    tempo = [[Event(0, smf.TEMPO, 0, 400_000, 0), Event(1 << 20, smf.TEMPO, 0, 1, 0)]]
    tracks = tempo + tracks
    ends = [track[-1].tick if track else 0 for track in tracks]
    assert smf.parse(smf.build(tracks, division), strict=True) == (tracks, division, 0.0, ends, [])


def test_wrong_track_counts_and_lengths_are_read_and_reported():
    two = track(NOTE + END), track(bytes.fromhex("00 904064 60 804000") + END)
    for data, problem in (
        (header(1, 1) + two[0] + two[1], "announces 1 tracks, there are 2"),
        (header(1, 9) + two[0] + two[1], "announces 9 tracks, there are 2"),
        (header(1, 2) + track(NOTE + END, 3) + two[1], "track 1 announces 3 bytes, it has 12"),
        (header(1, 2) + track(NOTE + END, 17) + two[1], "track 1 announces 17 bytes, it has 12"),
        (header(1, 2) + track(NOTE + END, 1 << 30) + two[1], "track 1 of 2 announces 1073741824 bytes, 32 are left"),
        (header(3, 2) + two[0] + two[1], "format 3 is unknown"),
    ):
        with pytest.warns(MidiWarning, match=problem):
            assert [note.pitch for note in read_midi(data)] == [60, 64]
    # Well-formed: a chunk of another kind, in front and behind, and an end of track that is left out.
    other = struct.pack(">4sI", b"XFIH", 3) + b"abc"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = header(1, 2) + other + track(NOTE) + other + two[1] + other
        assert [note.pitch for note in read_midi(data)] == [60, 64]


def test_a_track_that_breaks_off_leaves_its_whole_notes_and_the_other_tracks():
    broken = track(NOTE + bytes.fromhex("00 904064 60 ff0105 41"))
    with pytest.warns(MidiWarning, match="track 1: ends inside an event"):
        notes = read_midi(header(1, 2) + broken + track(bytes.fromhex("00 914164 60 814100") + END))
    assert [note.pitch for note in notes] == [60, 65]


def test_build_rejects_what_no_file_can_hold():
    with pytest.raises(ValueError, match=r"must be 0\.\.127"):
        smf.build([[Event(0, smf.NOTE_ON, 0, 128, 1)]], 96)
    with pytest.raises(ValueError, match="-5 ticks"):
        smf.build([[Event(-5, smf.NOTE_ON, 0, 60, 1)]], 96)


def test_tick_times_are_exact_for_repeated_and_simultaneous_tempos():
    tempos = [(0, 1), (0, 250_000), (10, 250_000), (20, 100_000), (20, 500_000), (30, 250_000)]
    midi = smf.MidiFile([[Event(tick, smf.TEMPO, 0, value, 0) for tick, value in tempos]], 100, 0.0, [30], [])
    times = smf.tick_times(midi, np.array([0, 10, 20, 21, 30, 34]))
    np.testing.assert_allclose(times, [0, 0.025, 0.05, 0.055, 0.1, 0.11], rtol=0, atol=1e-15)
