"""Note tokens back to notes (docs/spec.md 3.10)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from music_synth.midi import segments as seg
from music_synth.midi.notes import Note
from music_synth.midi.vocabulary import EOS_ID, Vocabulary

DRUM_INSTRUMENT = 9  # of decoded drums
DEFAULT_VELOCITY = 100  # of a decoder that has seen no velocity token
MIN_NOTE_STEPS = 1  # decoded notes last at least 10 ms; drums exactly that


class Decoded(NamedTuple):
    """What `Tokenizer.decode` returns."""

    notes: list[Note]
    num_invalid: int  # tokens that make no sense where they stand
    num_dropped: int  # tokens in a segment's tail that lies after the start of the next segment


class NoteReader:
    """The state of decoding which lives on from segment to segment. Times are steps."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.time, self.velocity, self.program = 0, DEFAULT_VELOCITY, 0
        self.active: dict[tuple[int, int], tuple[int, int]] = {}  # (pitch, program) -> (onset, velocity)
        self.tied: set[tuple[int, int]] | None = None  # None outside a tie section
        self.notes: list[Note] = []
        self.instruments: dict[int, int] = {}  # program -> instrument
        self.num_invalid = self.num_dropped = 0

    def decode_segment(self, tokens: np.ndarray, start: int, end: int | None, ties: bool) -> None:
        ids = np.asarray(tokens).tolist()
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        vocabulary = self.vocabulary
        if ties:
            self.tied = set()
        now, shift = start, 0
        for i, token in enumerate(ids):
            if vocabulary.is_timbre(token):
                continue
            if not vocabulary.shift_id <= token < vocabulary.end_id:
                self.num_invalid += 1
            elif token < vocabulary.pitch_id:
                shift += token - vocabulary.shift_id
                now = start + shift
                if end is not None and now > end:
                    self.num_dropped += len(ids) - i
                    return
            else:
                shift = 0
                if now < self.time:
                    self.num_invalid += 1
                else:
                    self.time = now
                    self.num_invalid += not self._apply(token)

    def _apply(self, token: int) -> bool:
        """Applies a token other than a shift at `self.time`; False where it makes no sense."""
        vocabulary = self.vocabulary
        if token < vocabulary.velocity_id:
            return self._pitch(token - vocabulary.pitch_id)
        if token < vocabulary.tie_id:
            self.velocity = vocabulary.bin_to_velocity(token - vocabulary.velocity_id)
        elif token == vocabulary.tie_id:
            if self.tied is None:
                return False
            for key in [key for key in self.active if key not in self.tied]:
                self._end(key)
            self.tied = None
        elif token < vocabulary.drum_id:
            self.program = token - vocabulary.program_id
        elif self.velocity:
            pitch = token - vocabulary.drum_id
            self._add(pitch, self.velocity, 0, self.time, self.time + MIN_NOTE_STEPS, is_drum=True)
        else:
            return False
        return True

    def _pitch(self, pitch: int) -> bool:
        key = (pitch, self.program)
        if self.tied is not None:
            valid = key in self.active and key not in self.tied
            self.tied.add(key)
            return valid
        if not self.velocity and key not in self.active:
            return False
        if key in self.active:
            self._end(key)
        if self.velocity:
            self.active[key] = self.time, self.velocity
        return True

    def _end(self, key: tuple[int, int]) -> None:
        onset, velocity = self.active.pop(key)
        pitch, program = key
        self._add(pitch, velocity, program, onset, max(self.time, onset + MIN_NOTE_STEPS), is_drum=False)

    def _add(self, pitch: int, velocity: int, program: int, onset: int, offset: int, is_drum: bool) -> None:
        if is_drum:
            instrument = DRUM_INSTRUMENT
        else:  # in order of appearance, leaving out the drums' number
            count = len(self.instruments)
            instrument = self.instruments.setdefault(program, count + (count >= DRUM_INSTRUMENT))
        seconds = (onset / seg.STEPS_PER_SECOND, offset / seg.STEPS_PER_SECOND)
        self.notes.append(Note(pitch, velocity, program, *seconds, is_drum, instrument))

    def finish(self) -> Decoded:
        """Ends what still sounds, all at one time."""
        for onset, _ in self.active.values():
            self.time = max(self.time, onset + MIN_NOTE_STEPS)
        for key in list(self.active):
            self._end(key)
        return Decoded(self.notes, self.num_invalid, self.num_dropped)
