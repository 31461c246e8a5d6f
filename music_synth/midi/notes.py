"""Notes, and how they come out of a MIDI file and go back into one.

There are two readings. Playing takes what a player sounds (`players`). Training data, and what is compared with
published models, take the notes of note_seq over pretty_midi: docs/spec.md 3.1 says which notes a file holds and
3.2 what the sustain pedal does; note times, order and instrument numbers are equal.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from music_synth.errors import UserError
from music_synth.midi import players, smf
from music_synth.midi.players import PEDAL_DOWN, SUSTAIN_CONTROL
from music_synth.midi.smf import DRUM_CHANNEL, MidiError, Source

MAX_HOURS = 24  # a longer piece is a damaged file
TICKS_PER_BEAT = 500  # of written files, which have 120 beats a minute: 1 tick = 1 ms


class Note(NamedTuple):
    """One note. `instrument` numbers the part of the file that it came from."""

    pitch: int  # 0..127
    velocity: int  # 1..127
    program: int  # General MIDI, 0..127
    onset: float  # seconds
    offset: float  # seconds, > onset
    is_drum: bool = False
    instrument: int = 0

    def since(self, origin: float) -> Note:
        """Counts the note's times from `origin`, in seconds."""
        return self._replace(onset=self.onset - origin, offset=self.offset - origin)


class Pedal(NamedTuple):
    """A sustain pedal movement of one instrument: down from value 64 on, else up."""

    time: float  # seconds
    instrument: int
    value: int  # 0..127


def hertz_of(pitch: Any) -> Any:
    """Computes the fundamental frequency of MIDI pitches, A4 (69) at 440 Hz."""
    return 440.0 * 2.0 ** ((pitch - 69) / 12)


def read_midi(source: Source, as_published: bool = False) -> list[Note]:
    """Reads the notes of a MIDI file (a path, or a file's bytes), as a player sounds them, in order of their onsets.

    The velocity of a note is the loudness that its channel's volume and expression leave of it: see
    `players.Channel.loudness`. Files that break the standard are read as far as they make sense, with a `MidiWarning`.

    Args:
        as_published: instead read as note_seq does, which training data need: by instrument and then in order of
            their ends, with the velocities of the keys. A damaged file is an error.

    Raises:
        MidiError: the file is missing, a folder, too large, not MIDI, or holds no notes.
    """
    if as_published:
        return apply_sustain(*parse_midi(source))
    midi = smf.load(source)
    notes = sounding(midi)
    _check(source, midi, notes)
    smf.warn_of_problems(midi, source)
    return notes


def sounding(midi: smf.MidiFile) -> list[Note]:
    """Gives the notes that a player sounds of a file, in order of their onsets; see `players.sounds`."""
    return [Note(*sound) for sound in players.sounds(midi)]


def parse_midi(source: Source) -> tuple[list[Note], list[Pedal]]:
    """Notes as the keys were held, and the pedal movements (docs/spec.md 3.1). Raises as `read_midi` does."""
    midi = smf.load(source, strict=True)
    notes, pedals = _collect(midi)
    _check(source, midi, notes)
    return notes, pedals


def from_pretty_midi(midi: Any) -> list[Note]:
    """Reads the notes of a pretty_midi object as note_seq takes them: exact times, lengthened by the sustain pedal.

    Raises UserError naming a note that no MIDI file can hold, and where there are none.
    """
    notes, pedals = [], []
    for number, part in enumerate(midi.instruments):
        for n in part.notes:
            notes.append(Note(n.pitch, n.velocity, part.program, n.start, n.end, bool(part.is_drum), number))
        for control in part.control_changes:
            if control.number == SUSTAIN_CONTROL:
                time, value = control.time, control.value
                if not (isinstance(time, Real) and 0 <= float(time) and isinstance(value, Real)):
                    raise UserError(f"a pedal at {time} s with value {value} is none")
                pedals.append(Pedal(float(time), number, int(float(value))))
    if not notes:
        raise UserError("no notes in this object of pretty_midi")
    return apply_sustain(check_notes(notes), pedals)


def check_notes(notes: Sequence[Note]) -> list[Note]:
    """Returns the notes, if a MIDI file can hold them; else UserError names the first that it cannot."""
    for note in notes:
        pitch, velocity, program, onset, offset = note[:5]
        try:
            whole = all(operator.index(value) in range(128) for value in (pitch, velocity, program))
            right = whole and velocity > 0 and 0 <= onset < offset < MAX_HOURS * 3600
        except (TypeError, ValueError):
            right = False
        if not right:
            raise UserError(
                f"pitch {pitch}, velocity {velocity}, program {program}, from {onset} to {offset} s is no note: "
                f"numbers must be 0..127, velocity at least 1, and it must end after it begins, within {MAX_HOURS} h"
            )
    return list(notes)


def _check(source: Source, midi: smf.MidiFile, notes: list[Note]) -> None:
    if not notes:
        damage = f" ({smf.first_of(midi.problems)})" if midi.problems else ""
        raise MidiError(f"{smf.source_name(source)}: no notes in this MIDI file{damage}")
    hours = max(note.offset for note in notes) / 3600
    if not hours < MAX_HOURS:
        raise MidiError(f"{smf.source_name(source)}: damaged MIDI file: its last note ends after {hours:.0f} hours")


def _collect(midi: smf.MidiFile) -> tuple[list[Note], list[Pedal]]:
    """Matches note-ons with note-offs, gives every instrument its pedal movements (docs/spec.md 3.1.2 to 3.1.4)."""
    # By instrument:
    rows: list[list[tuple[int, int, int, int]]] = []  # (pitch, velocity, onset tick, offset tick)
    heads: list[tuple[int, bool]] = []  # (program, is_drum)
    pedal_lists: list[list[tuple[int, int]]] = []  # (tick, value)
    for track in midi.tracks:
        program = [0] * 16
        instruments: dict[tuple[int, int], int] = {}  # (program, channel) -> instrument
        # Movements before a channel's first note wait here. The waiting list is handed over, not copied, so
        # all instruments of the channel that begin later share it, with what is still to come.
        waiting: dict[int, list[tuple[int, int]]] = {}
        sounding: dict[tuple[int, int], list[tuple[int, int]]] = {}  # channel, pitch -> (tick, velocity)
        for tick, kind, channel, a, b in track:
            if kind == smf.NOTE_ON and b > 0:
                sounding.setdefault((channel, a), []).append((tick, b))
            elif kind in (smf.NOTE_OFF, smf.NOTE_ON):
                started = sounding.pop((channel, a), [])
                ended = [(onset, velocity) for onset, velocity in started if onset != tick]
                if not ended:
                    continue
                if len(ended) < len(started):
                    sounding[channel, a] = [note for note in started if note[0] == tick]
                key = (program[channel], channel)
                if key not in instruments:
                    instruments[key] = len(rows)
                    rows.append([])
                    heads.append((program[channel], channel == DRUM_CHANNEL))
                    pedal_lists.append(waiting.get(channel, []))
                rows[instruments[key]] += [(a, velocity, onset, tick) for onset, velocity in ended]
            elif kind == smf.PROGRAM_CHANGE:
                program[channel] = a
            elif kind in (smf.CONTROL_CHANGE, smf.PITCH_BEND):
                instrument = instruments.get((program[channel], channel))
                pedal = waiting.setdefault(channel, []) if instrument is None else pedal_lists[instrument]
                if kind == smf.CONTROL_CHANGE and a == SUSTAIN_CONTROL:
                    pedal.append((tick, b))
    return _notes_of(midi, rows, heads), _pedals_of(midi, pedal_lists)


def _notes_of(midi: smf.MidiFile, rows, heads) -> list[Note]:
    ticks = np.array([row[2:] for part in rows for row in part], np.int64).reshape(-1, 2)
    times = iter(smf.tick_times(midi, ticks, first_track_only=True).tolist())
    return [
        Note(pitch, velocity, program, onset, offset, is_drum, instrument)
        for instrument, ((program, is_drum), part) in enumerate(zip(heads, rows, strict=True))
        for (pitch, velocity, _, _), (onset, offset) in zip(part, times, strict=False)
    ]


def _pedals_of(midi: smf.MidiFile, pedal_lists) -> list[Pedal]:
    if sum(map(len, pedal_lists)) > smf.MAX_EVENTS:  # instruments share what came before their first note
        raise MidiError(f"damaged MIDI file: more than {smf.MAX_EVENTS:,} pedal movements")
    ticks = np.array([tick for part in pedal_lists for tick, _ in part], np.int64)
    times = iter(smf.tick_times(midi, ticks, first_track_only=True).tolist())
    return [Pedal(next(times), i, value) for i, part in enumerate(pedal_lists) for _, value in part]


def apply_sustain(notes: Sequence[Note], pedals: Iterable[Pedal]) -> list[Note]:
    """Returns the notes as they sound with the pedal, in the same order (docs/spec.md 3.2). Drums are untouched.

    Under the pedal a note lasts until the pedal goes up or its pitch is struck again; of two that are struck
    together one is dropped. A pedal that never goes up holds until the last event.
    """
    pedal_down, pedal_up, note_on, note_off = range(4)  # the order of events at equal times
    pedals = list(pedals)
    events = [(note.onset, note_on, i) for i, note in enumerate(notes) if not note.is_drum]
    events += [(note.offset, note_off, i) for i, note in enumerate(notes) if not note.is_drum]
    events += [(p.time, pedal_down if p.value >= PEDAL_DOWN else pedal_up, i) for i, p in enumerate(pedals)]
    events.sort()
    offsets = [note.offset for note in notes]
    # (instrument, pitch) -> its notes held by key or pedal; instrument -> those that only the pedal holds
    active: dict[tuple[int, int], set[int]] = defaultdict(set)
    ringing: dict[int, set[int]] = defaultdict(set)
    held: set[int] = set()  # instruments with the pedal down
    dropped: set[int] = set()
    time = 0.0
    for time, kind, i in events:
        instrument = pedals[i].instrument if kind < note_on else notes[i].instrument
        if kind == pedal_down:
            held.add(instrument)
        elif kind == pedal_up:
            held.discard(instrument)
            for j in ringing.pop(instrument, ()):
                offsets[j] = time
                active[instrument, notes[j].pitch].discard(j)
        elif kind == note_on:
            mine = active[instrument, notes[i].pitch]
            if instrument in held:
                for j in mine:
                    offsets[j] = time
                    ringing[instrument].discard(j)
                    if notes[j].onset == time:
                        dropped.add(j)
                mine.clear()
            mine.add(i)
        elif i in (mine := active[instrument, notes[i].pitch]):
            if instrument in held:
                ringing[instrument].add(i)
            else:
                mine.discard(i)
    for mine in active.values():
        for j in mine:
            offsets[j] = time
    return [note._replace(offset=offsets[i]) for i, note in enumerate(notes) if i not in dropped]


def trim_overlaps(notes: Sequence[Note]) -> list[Note]:
    """Cuts a note where the next of the same pitch, program and drum flag begins (docs/spec.md 3.11.1).

    Notes with nothing left are gone; the order stays.
    """
    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for i, note in enumerate(notes):
        groups[note.pitch, note.program, note.is_drum].append(i)
    offsets = [note.offset for note in notes]
    for group in groups.values():
        group.sort(key=lambda i: notes[i].onset)
        for earlier, later in pairwise(group):
            offsets[earlier] = min(offsets[earlier], notes[later].onset)
    return [note._replace(offset=end) for note, end in zip(notes, offsets, strict=True) if note.onset < end]


def write_midi(notes: Sequence[Note], path: str | Path, pedals: Iterable[Pedal] = ()) -> None:
    """Writes a MIDI file that `read_midi` reads back to the millisecond. See `midi_bytes`."""
    Path(path).write_bytes(midi_bytes(notes, pedals))


def midi_bytes(notes: Sequence[Note], pedals: Iterable[Pedal] = ()) -> bytes:
    """Makes a format 1 MIDI file, 1 tick = 1 ms: a tempo track, then one for each (instrument, drum flag, program).

    Where an instrument plays one pitch twice at a time, the earlier note ends where the later begins (a MIDI
    track can hold nothing else), and of two that begin together the last in `notes` stays. `pedals` go to the
    non-drum tracks of their instrument. With more than 15 non-drum tracks, tracks share a channel; each note
    is then preceded by its program.
    """
    parts: dict[tuple[int, bool, int], list[Note]] = defaultdict(list)
    for note in notes:
        parts[note.instrument, note.is_drum, note.program].append(note)
    order = sorted(parts)
    pitched = [key for key in order if not key[1]]
    channels = [channel for channel in range(16) if channel != DRUM_CHANNEL]
    channel_of = {key: channels[i % len(channels)] for i, key in enumerate(pitched)}
    shared = len(pitched) > len(channels)
    pedals = list(pedals)
    tracks = [[smf.Event(0, smf.TEMPO, 0, smf.DEFAULT_TEMPO, 0)]]
    for instrument, is_drum, program in order:
        channel = channel_of.get((instrument, is_drum, program), DRUM_CHANNEL)
        events = [smf.Event(0, smf.PROGRAM_CHANGE, channel, program, 0)]
        for pitch, velocity, onset, offset in _tick_notes(parts[instrument, is_drum, program]):
            if shared and not is_drum:
                events.append(smf.Event(onset, smf.PROGRAM_CHANGE, channel, program, 0))
            events.append(smf.Event(onset, smf.NOTE_ON, channel, pitch, velocity))
            events.append(smf.Event(offset, smf.NOTE_OFF, channel, pitch, 0))
        for pedal in pedals:
            if pedal.instrument == instrument and not is_drum:
                tick = _tick(pedal.time)
                events.append(smf.Event(tick, smf.CONTROL_CHANGE, channel, SUSTAIN_CONTROL, pedal.value))
        # At one tick: ends first (so that a repeated note is not cut), then pedal and program, then onsets.
        rank = {smf.NOTE_OFF: 0, smf.CONTROL_CHANGE: 1, smf.PROGRAM_CHANGE: 1, smf.NOTE_ON: 2}
        tracks.append(sorted(events, key=lambda event: (event.tick, rank[event.kind])))
    return smf.build(tracks, TICKS_PER_BEAT)


def _tick(seconds: float) -> int:
    return round(seconds * TICKS_PER_BEAT * 1e6 / smf.DEFAULT_TEMPO)


def _tick_notes(notes: Sequence[Note]) -> list[tuple[int, int, int, int]]:
    """(pitch, velocity, onset tick, offset tick), at least a tick long, without overlap of equal pitches."""
    newest: dict[tuple[int, int], Note] = {(note.pitch, _tick(note.onset)): note for note in notes}
    result = []
    next_onset: dict[int, int] = {}  # by pitch
    for (pitch, onset), note in sorted(newest.items(), reverse=True):
        offset = max(_tick(note.offset), onset + 1)
        result.append((pitch, note.velocity, onset, min(offset, next_onset.get(pitch, offset))))
        next_onset[pitch] = onset
    return sorted(result, key=lambda row: (row[2], row[0]))
