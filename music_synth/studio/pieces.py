"""The pieces that can be played, and what an edit makes of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, read_midi
from music_synth.midi.segments import FRAME_RATE, frames_of
from music_synth.studio import limits
from music_synth.studio.protocol import Edit, PartEdit, flag, number, read, some, text, whole

DB_OF_VELOCITY = 40.0  # a SoundFont's default attenuation is 40 log10(127 / velocity) dB
MIN_OFFSET = 1e-3  # seconds, that a note lasts in a MIDI file that we write


@dataclass(frozen=True)
class StudioPiece:
    """A piece that can be played. Its recording, where a data set has one, is int16 [S] at 16 kHz."""

    id: str
    name: str
    midi: bytes
    notes: tuple[Note, ...]
    recording: Callable[[], np.ndarray] | None = None

    @cached_property
    def seconds(self) -> float:
        return frames_of(self.notes) / FRAME_RATE

    def head(self) -> dict[str, Any]:
        """What a list says of it."""
        return {"id": self.id, "name": self.name, "seconds": self.seconds, "recording": self.recording is not None}

    def describe(self) -> dict[str, Any]:
        """What the page draws: parts, and notes [part, pitch, velocity, onset, offset]."""
        parts: dict[int, dict[str, Any]] = {}
        for note in self.notes:
            empty = {"part": note.instrument, "program": note.program, "drum": note.is_drum, "notes": 0}
            parts.setdefault(note.instrument, empty)["notes"] += 1
        notes = [(n.instrument, n.pitch, n.velocity, round(n.onset, 4), round(n.offset, 4)) for n in self.notes]
        return self.head() | {"parts": [parts[number] for number in sorted(parts)], "notes": notes}

    def edited(self, edit: Edit) -> tuple[list[Note], bytes]:
        """Makes the notes of an edit, and the MIDI file that holds them; of no edit the file as it came.

        The notes are read from the file, so what is heard is what `synthesize` plays of it. There may be none.
        """
        if not changes(edit):
            return list(self.notes), self.midi
        notes = edit_notes(self.notes, edit)
        if not notes:
            return [], b""
        midi = midi_bytes(notes)
        return read_midi(midi), midi


def changes(edit: Edit) -> bool:
    """Whether an edit changes anything."""
    return edit.transpose != 0 or edit.tempo != 1.0 or any(part != PartEdit() for part in edit.parts.values())


def edit_notes(notes: Iterable[Note], edit: Edit) -> list[Note]:
    """Changes notes part by part; those that leave the range of MIDI are gone, and so are muted parts."""
    notes = list(notes)
    heard = {number for number in {note.instrument for note in notes} if edit.hears(number)}
    result = []
    for note in notes:
        if note.instrument not in heard:
            continue
        part = edit.parts.get(note.instrument, PartEdit())
        is_drum = note.is_drum if part.drum is None else part.drum
        pitch = note.pitch if is_drum else note.pitch + edit.transpose
        if not 0 <= pitch <= 127:
            continue
        onset = note.onset / edit.tempo
        result.append(
            note._replace(
                pitch=pitch,
                velocity=min(127, max(1, round(note.velocity * 10 ** (part.gain / DB_OF_VELOCITY)))),
                program=note.program if part.program is None else part.program,
                onset=onset,
                offset=max(note.offset / edit.tempo, onset + MIN_OFFSET),
                is_drum=is_drum,
            )
        )
    return result


def from_midi(midi: bytes, name: str, id: str | None = None) -> StudioPiece:
    """Makes a piece of a MIDI file that somebody sent. UserError: none, or more than `limits` allow."""
    if len(midi) > limits.MAX_MIDI_BYTES:
        raise UserError(f"the file has {len(midi):,} bytes: at most {limits.MAX_MIDI_BYTES:,} are taken")
    notes = read_midi(midi)
    if len(notes) > limits.MAX_NOTES:
        raise UserError(f"{len(notes):,} notes: a piece has at most {limits.MAX_NOTES:,}")
    seconds = frames_of(notes) / FRAME_RATE
    if seconds > limits.MAX_PIECE_SECONDS:
        raise UserError(f"{seconds / 60:.0f} minutes: a piece has at most {limits.MAX_PIECE_SECONDS / 60:.0f}")
    return StudioPiece(id or "u" + hashlib.sha256(midi).hexdigest()[:16], name, midi, tuple(notes))


@dataclass(frozen=True)
class Stroke:
    """A note that was played on keys."""

    pitch: int = whole(0, 127)
    velocity: int = whole(1, 127)
    onset: float = number(0.0, limits.MAX_PIECE_SECONDS)
    offset: float = number(0.0, limits.MAX_PIECE_SECONDS)

    @classmethod
    def read(cls, row: Any) -> Stroke:
        """Reads [pitch, velocity, onset, offset]."""
        if not isinstance(row, list) or len(row) != 4:
            raise UserError("phrase.notes: a note is [pitch, velocity, onset, offset]")
        return read(cls, dict(zip(("pitch", "velocity", "onset", "offset"), row, strict=True)), "note")


@dataclass(frozen=True)
class Phrase:
    """Notes that were played on keys, by one instrument."""

    name: str = text()
    notes: tuple[Stroke, ...] = some(limits.MAX_KEYS, Stroke.read)
    program: int = whole(0, 127, 0)
    drum: bool = flag(False)


def from_phrase(value: Any) -> StudioPiece:
    """Makes a piece of a `Phrase`, as JSON has it; UserError if it is none."""
    phrase = read(Phrase, value, "phrase")
    if not phrase.notes:
        raise UserError("phrase.notes: no notes")
    notes = [
        Note(one.pitch, one.velocity, phrase.program, one.onset, max(one.offset, one.onset + 0.01), phrase.drum)
        for one in sorted(phrase.notes, key=lambda one: one.onset)
    ]
    return from_midi(midi_bytes(notes), phrase.name)


class Library:
    """The pieces by their names: those that are always there, and uploads, of which the oldest go. Thread-safe."""

    def __init__(self, fixed: Sequence[StudioPiece]):
        self.fixed = {piece.id: piece for piece in fixed}
        self.uploads: OrderedDict[str, StudioPiece] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> StudioPiece:
        """Finds a piece by its id; UserError if it is not there (any more)."""
        with self._lock:
            if id in self.uploads:
                self.uploads.move_to_end(id)
                return self.uploads[id]
        if id not in self.fixed:
            raise UserError(f"no piece {id[:60]!r}: it was never here, or too many came after it")
        return self.fixed[id]

    def add(self, piece: StudioPiece) -> None:
        with self._lock:
            self.uploads[piece.id] = piece
            self.uploads.move_to_end(piece.id)
            while len(self.uploads) > limits.MAX_UPLOADS:
                self.uploads.popitem(last=False)

    def heads(self) -> list[dict[str, Any]]:
        """Lists the pieces that are always there."""
        return [piece.head() for piece in self.fixed.values()]
