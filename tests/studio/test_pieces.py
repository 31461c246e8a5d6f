"""Edits change what they say and nothing else; pieces stay within bounds."""

import pytest

from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, read_midi
from music_synth.studio import limits, pieces
from music_synth.studio.pieces import Library, edit_notes, from_midi, from_phrase
from music_synth.studio.protocol import Edit, PartEdit
from tests.studio import tiny

NOTES = [
    Note(60, 64, 0, 1.0, 2.0, False, 0),
    Note(36, 100, 0, 1.0, 1.1, True, 1),
    Note(120, 64, 40, 2.0, 4.0, False, 2),
]


def test_no_edit_plays_the_file_as_it_came():
    piece = tiny.piece()
    assert piece.edited(Edit()) == (list(piece.notes), piece.midi)
    assert piece.edited(Edit({0: PartEdit()}))[1] is piece.midi


def test_an_edit_changes_the_part_that_it_names():
    edited = edit_notes(NOTES, Edit({0: PartEdit(program=73, gain=40 * 0.30103)}))
    assert edited == [NOTES[0]._replace(program=73, velocity=127), *NOTES[1:]]  # +12 dB double the velocity
    assert edit_notes(NOTES, Edit({2: PartEdit(mute=True)})) == NOTES[:2]
    assert edit_notes(NOTES, Edit({1: PartEdit(solo=True)})) == [NOTES[1]]
    assert edit_notes(NOTES, Edit({0: PartEdit(drum=True)}))[0].is_drum


def test_transposing_spares_drums_and_drops_what_leaves_the_keyboard():
    assert [note.pitch for note in edit_notes(NOTES, Edit(transpose=10))] == [70, 36]


def test_tempo_moves_every_time():
    assert [(n.onset, n.offset) for n in edit_notes(NOTES, Edit(tempo=2.0))] == [(0.5, 1.0), (0.5, 0.55), (1.0, 2.0)]


def test_what_is_heard_of_an_edit_is_what_its_file_holds():
    notes, midi = tiny.piece().edited(Edit({0: PartEdit(program=12)}, transpose=3, tempo=1.3))
    assert notes == read_midi(midi) and {note.program for note in notes if not note.is_drum} == {12}
    assert tiny.piece().edited(Edit({0: PartEdit(mute=True), 1: PartEdit(mute=True)})) == ([], b"")


def test_pieces_that_are_too_large_are_refused(monkeypatch):
    with pytest.raises(UserError, match="at most 2,097,152"):
        from_midi(bytes(limits.MAX_MIDI_BYTES + 1), "a")
    with pytest.raises(UserError, match="31 minutes"):
        from_midi(midi_bytes([Note(60, 64, 0, 0.0, 1860.0)]), "a")
    monkeypatch.setattr(limits, "MAX_NOTES", 3)
    with pytest.raises(UserError, match="a piece has at most 3"):
        from_midi(midi_bytes(tiny.notes()), "a")


def test_a_phrase_becomes_a_piece():
    piece = from_phrase({"name": "keys", "notes": [[64, 80, 0.5, 1.0], [60, 90, 0.0, 0.0]], "program": 11})
    assert [note[:4] for note in piece.notes] == [(60, 90, 11, 0.0), (64, 80, 11, 0.5)]
    for value, said in (({"name": "keys", "notes": []}, "no notes"), ({"name": "k", "notes": [[1]]}, "a note is")):
        with pytest.raises(UserError, match=said):
            from_phrase(value)


def test_the_library_forgets_the_upload_that_was_used_least_recently(monkeypatch):
    monkeypatch.setattr(limits, "MAX_UPLOADS", 2)
    library = Library([tiny.piece()])
    made = [from_midi(midi_bytes(tiny.notes(pitch=pitch)), "u") for pitch in (60, 61, 62)]
    for piece in made[:2]:
        library.add(piece)
    library.get(made[0].id)
    library.add(made[2])
    assert library.get(made[0].id) is made[0] and library.get("scale").name == "a scale"
    with pytest.raises(UserError, match="no piece"):
        library.get(made[1].id)
    with pytest.raises(UserError, match=r"no piece '\.\./etc/passwd'"):
        library.get("../etc/passwd")


def test_the_page_is_told_of_parts_and_notes():
    told = tiny.piece().describe()
    assert [(part["part"], part["drum"], part["notes"]) for part in told["parts"]] == [(0, False, 26), (1, True, 13)]
    assert len(told["notes"]) == 39 and told["notes"][0][2:] == (80, 0.0, 0.4)
    assert pieces.changes(Edit()) is False
