"""Notes to serialized NoteSequences and back. No TensorFlow here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from music_synth.midi.notes import SUSTAIN_CONTROL, Note, Pedal


def write_note_sequence(name: str, notes: Sequence[Note], timbre: str = "") -> bytes:
    """Notes as a serialized NoteSequence: the same numbers, in the same order. A timbre is its artist."""
    sequence = _music_pb2().NoteSequence(id=name, total_time=max(note.offset for note in notes))
    if timbre:
        sequence.sequence_metadata.artist = timbre
    for note in notes:
        sequence.notes.add(
            pitch=note.pitch,
            velocity=note.velocity,
            program=note.program,
            start_time=note.onset,
            end_time=note.offset,
            is_drum=note.is_drum,
            instrument=note.instrument,
        )
    return sequence.SerializeToString(deterministic=True)


def parse_note_sequence(sequence: bytes) -> tuple[list[Note], list[Pedal]]:
    """Notes as they are stored, and the movements of the sustain pedal. ValueError: these bytes are no NoteSequence."""
    from google.protobuf.message import DecodeError

    try:
        message = _music_pb2().NoteSequence.FromString(sequence)
    except DecodeError as error:
        raise ValueError(f"not a NoteSequence ({error})") from error
    notes = [
        Note(n.pitch, n.velocity, n.program, n.start_time, n.end_time, n.is_drum, n.instrument) for n in message.notes
    ]
    pedals = [
        Pedal(c.time, c.instrument, c.control_value)
        for c in message.control_changes
        if c.control_number == SUSTAIN_CONTROL
    ]
    return notes, pedals


def timbre_of_note_sequence(sequence: bytes) -> str:
    """The timbre that `write_note_sequence` stored, or ""."""
    return _music_pb2().NoteSequence.FromString(sequence).sequence_metadata.artist


def _music_pb2():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of its imports looks for ffmpeg, which nobody needs here
        from note_seq.protobuf import music_pb2  # 3 seconds

    return music_pb2
