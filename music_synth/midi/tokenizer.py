"""Notes to note tokens, a segment at a time, and back.

The token language is that of MT3 (Gardner et al. 2022, arXiv:2111.03017) as used by Hawthorne et al. 2022
(arXiv:2206.05408); docs/spec.md 3.3 to 3.10 states it exactly. A segment reads

    [timbre] [program pitch]... tie | shift [program] [velocity] pitch | shift [velocity] drum | ... EOS

First come the notes that already sound at its start, then its events in order of time. A shift gives the time
since the start of the segment, not since the event before; program and velocity are left out where they do
not change. A timbre, what the segment sounds like, is no part of the published language; unless the tokenizer has
names of timbres, and a piece one of them, nothing is written of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from music_synth.errors import UserError, check_range
from music_synth.midi import segments as seg
from music_synth.midi.decoding import Decoded, NoteReader
from music_synth.midi.notes import Note
from music_synth.midi.vocabulary import EOS_ID, MAX_VELOCITY, NUM_PITCHES, NUM_PROGRAMS, Vocabulary

# Programs that stand for the 34 instrument classes of Slakh2100; each class reaches up to the next.
SLAKH_PROGRAMS = (
    (0, 4, 8, 16, 24, 26, 29, 32, 33, 40, 41, 42, 43, 46, 47, 48, 50)
    + (52, 55, 56, 57, 58, 60, 61, 64, 66, 67, 68, 69, 70, 71, 73, 80, 88)
)  # fmt: skip

Granularity = Literal["full", "midi_class", "flat", "slakh"]
OnOverflow = Literal["truncate", "error", "keep"]


@dataclass(frozen=True, eq=False)
class Events:
    """The note-ons and note-offs of a piece, in the order of docs/spec.md 3.4. Arrays are int32 [E].

    Drums have no note-off. `moment` numbers the distinct unrounded times: order within a moment can be
    restored when programs change, although the times themselves are only kept to the step.
    """

    step: np.ndarray  # 10 ms steps since the start of the piece, ascending
    moment: np.ndarray  # ascending
    velocity: np.ndarray  # 1..127; 0 is a note-off
    program: np.ndarray
    pitch: np.ndarray
    is_drum: np.ndarray  # 0 or 1

    def __len__(self) -> int:
        return len(self.step)

    @classmethod
    def from_notes(cls, notes: Sequence[Note]) -> Events:
        """Sorts by unrounded time; at equal times offs before ons, drums last, by program, by pitch.

        Raises ValueError naming a note that is out of range or does not end after it begins.
        """
        pitch, velocity, program, onset, offset, is_drum = _columns(notes)
        order = np.lexsort((pitch, program, is_drum))
        off = order[is_drum[order] == 0]
        source = np.concatenate([off, order])  # of each event, before sorting by time
        time = np.concatenate([offset[off], onset[order]])
        by_time = np.argsort(time, kind="stable")
        source, time = source[by_time], time[by_time]
        return cls(
            step=np.rint(time * seg.STEPS_PER_SECOND).astype(np.int32),
            moment=np.cumsum(np.diff(time, prepend=time[:1]) > 0, dtype=np.int32),
            velocity=np.where(by_time < len(off), 0, velocity[source]).astype(np.int32),
            program=program[source].astype(np.int32),
            pitch=pitch[source].astype(np.int32),
            is_drum=is_drum[source].astype(np.int32),
        )

    def to_array(self) -> np.ndarray:
        """Returns int32 [E, 6], a column a field, for storage."""
        return np.stack([getattr(self, field.name) for field in fields(self)], axis=1)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Events:
        """Inverts `to_array`."""
        if array.ndim != 2 or array.shape[1] != len(fields(cls)):
            raise ValueError(f"events of shape {array.shape}; must be [E, {len(fields(cls))}]")
        return cls(*np.ascontiguousarray(array.T, np.int32))

    def with_programs(self, table: np.ndarray) -> Events:
        """Replaces program p of every pitched event by table[p]; order within a moment is made anew."""
        program = np.where(self.is_drum, self.program, table[self.program]).astype(np.int32)
        order = np.lexsort((self.pitch, program, self.is_drum, self.velocity > 0, self.moment))
        columns = {field.name: getattr(self, field.name) for field in fields(self)} | {"program": program}
        return Events(**{name: column[order] for name, column in columns.items()})

    @cached_property
    def sounding_until(self) -> np.ndarray:
        """int [E]: what event i begins sounds up to event sounding_until[i]; -1: it begins no pitched note.

        That is the next event of the same program and pitch. So of two overlapping notes of one pitch neither
        counts as sounding after the first note-off (docs/spec.md 3.6.4).
        """
        key = np.where(self.is_drum, -1, self.program * NUM_PITCHES + self.pitch).astype(np.int16)
        order = np.argsort(key, kind="stable")  # 16-bit integers: a radix sort
        until = np.full(len(self), len(self))
        same = key[order[1:]] == key[order[:-1]]
        until[order[:-1][same]] = order[1:][same]
        return np.where((self.velocity > 0) & (self.is_drum == 0), until, -1)


def _columns(notes: Sequence[Note]) -> tuple[np.ndarray, ...]:
    """pitch, velocity, program [E] int64, onset, offset [E] float64, is_drum [E] int64; checked."""
    columns = list(zip(*notes, strict=True)) or [()] * len(Note._fields)
    pitch, velocity, program, onset, offset, is_drum = (
        np.array(column, dtype) for column, dtype in zip(columns, "iiiddi", strict=False)
    )
    wrong = (pitch < 0) | (pitch >= NUM_PITCHES) | (program < 0) | (program >= NUM_PROGRAMS)
    wrong |= (velocity < 1) | (velocity > MAX_VELOCITY)
    wrong |= ~((onset >= 0) & (offset > onset) & (offset * seg.STEPS_PER_SECOND < 2**31))
    if wrong.any():
        raise ValueError(f"{notes[int(wrong.argmax())]}: out of range, or it does not end after it begins")
    return pitch, velocity, program, onset, offset, is_drum


@dataclass(frozen=True)
class Tokenizer:
    """Notes to tokens a segment at a time, and back.

    granularity: "full" keeps programs; "midi_class" keeps the first of each family of eight; "flat" leaves
    them out; "slakh" maps them to the 34 classes of Slakh2100 (docs/spec.md 3.9). Drums are drums in all of them.
    """

    velocity_bins: int = 1
    granularity: Granularity = "full"
    ties: bool = True  # begin a segment with the notes that sound on from the one before
    segment_frames: int = 256  # of 20 ms
    max_tokens: int = 2048  # of a segment, with EOS
    max_shift_steps: int = 1000  # of 10 ms
    timbres: tuple[str, ...] = ()  # names that a piece's timbre may have; see `Vocabulary`

    def __post_init__(self):
        if self.granularity not in get_args(Granularity):
            choices = ", ".join(get_args(Granularity))
            raise ValueError(f"granularity={self.granularity!r}: must be one of {choices}")
        check_range(self, 1, 2**17, "segment_frames")
        check_range(self, 2, 2**17, "max_tokens")  # tie and EOS at least
        self.vocabulary  # noqa: B018 - checks the rest

    def check_timbre(self, name: str) -> None:
        """Raises a UserError unless `name` is one of the timbres, or empty."""
        if name and name not in self.timbres:
            told = f"choose from {', '.join(self.timbres)}" if self.timbres else "this model has none"
            raise UserError(f"no timbre {name!r}: {told}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.velocity_bins, self.max_shift_steps, self.timbres)

    def encode(
        self,
        notes: Sequence[Note],
        num_frames: int | None = None,
        on_overflow: OnOverflow = "truncate",
        timbre: str = "",
    ) -> list[np.ndarray]:
        """Encodes every segment of a piece, each int32 [n <= max_tokens] with EOS, without padding.

        Args:
            num_frames: length of the piece; by default what its last event needs. Events after it belong to
                the last segment: to play only a beginning, leave the later notes out of `notes`.
            on_overflow: see `encode_window`.
            timbre: what every segment begins with; nothing if it is not in `timbres`.

        In trailing silence no notes are tied (the published preprocessing repeats there what sounded before
        the last event, docs/spec.md 3.6.3).
        """
        if num_frames is None:
            num_frames = seg.num_frames(max((note.offset for note in notes), default=0.0))
        count = seg.num_segments(num_frames, self.segment_frames)
        events = self._mapped(Events.from_notes(notes))
        segments = []
        for j in range(count):
            length = self.segment_frames if j < count - 1 else None
            segments.append(self._encode(events, j * self.segment_frames, length, on_overflow, timbre))
        return segments

    def encode_window(
        self,
        events: Events,
        start_frame: int,
        num_frames: int | None,
        on_overflow: OnOverflow = "truncate",
        timbre: str = "",
    ) -> np.ndarray:
        """Encodes `num_frames` frames (None: all) from `start_frame` on, int32 [n] with EOS.

        A window may begin before the piece and end after it; there is nothing there. What to do with more
        than `max_tokens` tokens: "truncate" keeps whole events from the start of the window and warns
        (`OverlongSegmentWarning`), "error" raises `SegmentTooLong`, "keep" returns them all.
        """
        return self._encode(self._mapped(events), start_frame, num_frames, on_overflow, timbre)

    def _mapped(self, events: Events) -> Events:
        return events.with_programs(_slakh_table()) if self.granularity == "slakh" else events

    def _encode(
        self, events: Events, start_frame: int, num_frames: int | None, on_overflow: OnOverflow, timbre: str
    ) -> np.ndarray:
        if on_overflow not in get_args(OnOverflow):
            raise ValueError(f"on_overflow={on_overflow!r}: must be one of {', '.join(get_args(OnOverflow))}")
        start = start_frame * seg.STEPS_PER_FRAME
        first = int(np.searchsorted(events.step, start))
        last = len(events)
        if num_frames is not None:
            last = int(np.searchsorted(events.step, start + num_frames * seg.STEPS_PER_FRAME))
        prefix, program = self._tie_section(events, first) if self.ties else (np.zeros(0, np.int32), -1)
        prefix = np.concatenate([np.array(self.vocabulary.timbre_ids(timbre), np.int32), prefix])
        window = slice(first, last)
        rows, kept = self._event_rows(events, window, start, program)
        length = len(prefix) + int(kept.sum()) + 1
        if length > self.max_tokens and on_overflow != "keep":
            if on_overflow == "error":
                raise seg.SegmentTooLong(f"frame {start_frame}: {length} tokens, at most {self.max_tokens} fit")
            fitting = self._fit_ties(prefix)
            room = self.max_tokens - 1 - len(fitting)
            num_rows = int(np.searchsorted(np.cumsum(kept.sum(axis=1)), room, side="right"))
            self._warn(events, slice(first + num_rows, last), prefix[len(fitting) :], start_frame, length)
            prefix, rows, kept = fitting, rows[:num_rows], kept[:num_rows]
        return np.concatenate([prefix, rows[kept], [EOS_ID]], dtype=np.int32)

    def _fit_ties(self, prefix: np.ndarray) -> np.ndarray:
        """The tie section, with whole entries taken from its end where it alone is too long."""
        if len(prefix) < self.max_tokens:
            return prefix
        entries = prefix[: self.max_tokens - 2]
        if len(entries) and entries[-1] >= self.vocabulary.program_id:  # a program without its pitch
            entries = entries[:-1]
        return np.append(entries, self.vocabulary.tie_id)

    def _warn(self, events: Events, left_out: slice, ties: np.ndarray, start_frame: int, length: int) -> None:
        """Says what is left out: the events `left_out`, and the end `ties` of the tie section."""
        begin = start_frame / seg.FRAME_RATE
        cut = events.step[left_out.start] / seg.STEPS_PER_SECOND if left_out.start < left_out.stop else begin
        notes = (events.velocity[left_out] > 0).sum() + (ties < self.vocabulary.tie_id).sum()
        warnings.warn(
            f"segment {start_frame / self.segment_frames:g} (at {begin:.2f} s) has {length} tokens, at most "
            f"{self.max_tokens} fit: {notes} notes from {cut:.2f} s on are left out",
            seg.OverlongSegmentWarning,
            stacklevel=4,
        )

    def _tie_section(self, events: Events, first: int) -> tuple[np.ndarray, int]:
        """Tokens of the notes that sound before event `first`, then tie; and the last program, or -1."""
        vocabulary = self.vocabulary
        sounding = np.flatnonzero(events.sounding_until[:first] >= first)
        key = np.sort(events.program[sounding] * NUM_PITCHES + events.pitch[sounding])
        program = self._program_value(key // NUM_PITCHES)
        rows = np.stack([vocabulary.program_id + program, vocabulary.pitch_id + key % NUM_PITCHES], axis=1)
        kept = np.stack([_changes(program, -1), np.ones(len(key), bool)], axis=1)
        if self.granularity == "flat":
            kept[:, 0] = False
        return np.append(rows[kept], vocabulary.tie_id), int(program[-1]) if len(key) else -1

    def _program_value(self, program: np.ndarray) -> np.ndarray:
        return program // 8 * 8 if self.granularity == "midi_class" else program

    def _event_rows(
        self, events: Events, window: slice, start: int, current_program: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, S + 3] of n events: S shifts, program, velocity, pitch; and bool, which are written."""
        vocabulary, longest = self.vocabulary, self.max_shift_steps
        step = events.step[window] - start  # [n]
        num_shifts = max(1, -(-int(step[-1]) // longest)) if len(step) else 1
        shift = np.clip(step[:, None] - longest * np.arange(num_shifts), 0, longest)  # [n, S]
        velocity = vocabulary.velocity_to_bin(events.velocity[window])
        is_drum = events.is_drum[window].astype(bool)
        program = self._program_value(events.program[window])
        new_program = np.zeros(len(step), bool)
        if self.granularity != "flat":
            new_program[~is_drum] = _changes(program[~is_drum], current_program)
        rows = np.concatenate(
            [
                vocabulary.shift_id + shift,
                (vocabulary.program_id + program)[:, None],
                (vocabulary.velocity_id + velocity)[:, None],
                (np.where(is_drum, vocabulary.drum_id, vocabulary.pitch_id) + events.pitch[window])[:, None],
            ],
            axis=1,
        )
        kept = np.ones(rows.shape, bool)
        kept[:, :num_shifts] = (shift > 0) & _changes(step, 0)[:, None]
        kept[:, num_shifts] = new_program
        kept[:, num_shifts + 1] = _changes(velocity, -1)
        return rows, kept

    def decode(self, segments: Sequence[np.ndarray]) -> Decoded:
        """Decodes the notes of consecutive segments (tokens up to EOS; padding may follow), in order of their ends.

        Velocities are those of the bins, times whole steps. Tokens that make no sense are passed over and
        counted (docs/spec.md 3.10).
        """
        decoder = NoteReader(self.vocabulary)
        segment_steps = self.segment_frames * seg.STEPS_PER_FRAME
        for j, tokens in enumerate(segments):
            end = (j + 1) * segment_steps if j < len(segments) - 1 else None
            decoder.decode_segment(tokens, j * segment_steps, end, self.ties)
        return decoder.finish()


def _changes(values: np.ndarray, before: int) -> np.ndarray:
    """bool [n]: values[i] differs from values[i - 1], or `before` at i = 0."""
    changes = np.empty(len(values), bool)  # np.diff with `prepend` takes six times as long
    changes[:1] = values[:1] != before
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _slakh_table() -> np.ndarray:
    """Slakh class of each program, int32 [128]: the largest class program that is not above it."""
    classes = np.array(SLAKH_PROGRAMS, np.int32)
    return classes[np.searchsorted(classes, np.arange(NUM_PROGRAMS), side="right") - 1]
