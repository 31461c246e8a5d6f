"""WAD archives: the MIDI files in them, and what is none."""

import struct

import pytest

from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, read_midi
from music_synth.midi.smf import MidiWarning
from music_synth.midi.wad import is_wad, read_wad

NOTES = [Note(60, 90, 0, 0.0, 0.5)], [Note(62, 90, 40, 0.0, 0.5)]


def wad(lumps, magic=b"PWAD"):
    body, directory = b"", b""
    for name, data in lumps:
        directory += struct.pack("<II8s", 12 + len(body), len(data), name)
        body += data
    return struct.pack("<4sII", magic, len(lumps), 12 + len(body)) + body + directory


def test_midi_lumps_are_taken_out(tmp_path):
    path = tmp_path / "a.wad"
    first, second = map(midi_bytes, NOTES)
    path.write_bytes(wad([(b"MAP01", b""), (b"D_ONE", first), (b"SOUND", b"x" * 99), (b"D_SECOND", second)]))
    assert is_wad(path)
    pieces = read_wad(path)
    assert list(pieces) == ["D_ONE", "D_SECOND"]
    assert [read_midi(data)[0].pitch for data in pieces.values()] == [60, 62]


def test_what_cannot_be_read_is_passed_over_with_a_warning(tmp_path):
    path = tmp_path / "a.wad"
    path.write_bytes(wad([(b"D_OLD", b"MUS\x1a" + bytes(40)), (b"D_ONE", midi_bytes(NOTES[0]))]))
    with pytest.warns(MidiWarning, match="D_OLD"):
        assert list(read_wad(path)) == ["D_ONE"]


@pytest.mark.parametrize("data", [b"", b"IWAD", b"MThd" + bytes(40), struct.pack("<4sII", b"IWAD", 1 << 31, 12)])
def test_what_is_no_archive_is_one_clear_error(tmp_path, data):
    path = tmp_path / "a.wad"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.wad"):
        read_wad(path)
    with pytest.raises(UserError, match=r"missing\.wad"):
        read_wad(tmp_path / "missing.wad")
