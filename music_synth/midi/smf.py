"""Standard MIDI Files: bytes to timed events, and back.

Written from the texts "Standard MIDI Files 1.0", "MIDI 1.0", RP-015 (reset all controllers) and RP-029 (RMID).
Only what notes need is kept: note on and off, program and control changes, pitch bend, tempo, and of system
exclusive messages those that reset a device or say which channels are drums.
"""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from music_synth.errors import UserError

Source = str | os.PathLike[str] | bytes  # a path, or the bytes of a file
SUFFIXES = (".mid", ".midi", ".kar", ".rmi", ".smf")  # of files that `load` reads, in lower case

NOTE_OFF, NOTE_ON, CONTROL_CHANGE, PROGRAM_CHANGE, PITCH_BEND = 0x80, 0x90, 0xB0, 0xC0, 0xE0
# Below 0x80, so that no channel status has these values. TEMPO is also a meta event's type.
TEMPO, RESET, RHYTHM_PART = 0x51, 0x01, 0x02
GM, GS, XG, GM2 = range(4)  # what a device is reset to
KEPT = (NOTE_OFF, NOTE_ON, CONTROL_CHANGE, PROGRAM_CHANGE, PITCH_BEND)
END_OF_TRACK, META, SYSTEM_EXCLUSIVE, ESCAPE = 0x2F, 0xFF, 0xF0, 0xF7
DATA_BYTES = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}  # by kind of channel event
SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1}  # other system events have none; none belongs in a file
DEFAULT_TEMPO = 500_000  # microseconds a beat
DRUM_CHANNEL = 9  # "channel 10" to musicians

MAX_BYTES = 1 << 24  # 16 MiB; the longest piano recordings have 1 MiB
MAX_EVENTS = 1_000_000  # kept ones; 270 a second for an hour
MAX_TRACKS = 0xFFFF  # that a header can announce
MAX_NUMBER_BYTES = 8  # of a variable-length quantity; the standard allows 4, some programs write more
MAX_PROBLEMS = 20  # that are put down of one file


class MidiError(UserError):
    """A MIDI file that cannot be read, or holds no music. The message names the file and what is wrong."""


class MidiWarning(UserWarning):
    """A MIDI file that breaks the standard and was read nevertheless. The message names the file, track and byte."""


class Event(NamedTuple):
    """What happens at a tick.

    `kind` is NOTE_ON ... PITCH_BEND; or, with b = 0: TEMPO, a = microseconds a beat; RESET, a = GM, GS, XG or GM2;
    RHYTHM_PART, a = whether `channel` is drums from now on.
    """

    tick: int
    kind: int
    channel: int
    a: int
    b: int


class MidiFile(NamedTuple):
    """`division`: ticks a beat; 0 where `tick_seconds` fixes the length of a tick (SMPTE)."""

    tracks: list[list[Event]]
    division: int
    tick_seconds: float
    ends: list[int]  # the tick at which each track ends
    problems: list[str]  # what breaks the standard and was passed over


def load(source: Source, strict: bool = False) -> MidiFile:
    """Reads the events of a MIDI file. `MidiError`: it is not there, cannot be read, or as of `parse`."""
    try:
        return parse(source if isinstance(source, bytes) else _read_bytes(Path(source)), strict)
    except MidiError as error:
        raise MidiError(f"{source_name(source)}: {error}") from None


def warn_of_problems(midi: MidiFile, source: Source) -> None:
    """Warns (`MidiWarning`), in one line, of what was passed over while reading."""
    if midi.problems:
        told = f"{source_name(source)} breaks the MIDI standard, read nevertheless: {first_of(midi.problems)}"
        warnings.warn(told, MidiWarning, stacklevel=3)


def first_of(problems: list[str]) -> str:
    """Names the first problems of a file."""
    return "; ".join(problems[:3]) + "; and more" * (len(problems) > 3)


def source_name(source: Source) -> str:
    """Returns how messages call a source."""
    return "MIDI data" if isinstance(source, bytes) else str(source)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device or a pipe may have no end
    except FileNotFoundError:
        raise MidiError("no such MIDI file") from None
    except IsADirectoryError:
        raise MidiError("a folder, not a MIDI file") from None
    except (OSError, ValueError) as error:  # no permission, a null character in the name, ...
        raise MidiError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return data


def parse(data: bytes, strict: bool = False) -> MidiFile:
    """Reads the events of every track, in file order.

    Files in the wild break the standard. What can be read is read: bytes before the header (MacBinary, RMID),
    unknown chunks, a missing end of track, wrong track counts and lengths, running status across meta events,
    numbers that are too long. Events that make no sense are passed over, one by one; a track ends where its bytes
    do. Of format 2 the tracks are played one after the other, each at first with 120 beats a minute.

    Args:
        strict: raise where something breaks the standard so that notes may be wrong.

    Raises:
        MidiError: (without a file name) this is no MIDI file, or more than `MAX_BYTES` or `MAX_EVENTS`.
    """
    problems = _Problems(strict)
    if not data:
        raise MidiError("empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise MidiError(f"larger than {MAX_BYTES >> 20} MiB, which no MIDI file of a piece is")
    start = data.find(b"MThd")
    junk = start > 0 and not (data[:4] == b"RIFF" and data[8:12] == b"RMID")
    if start < 0 or (strict and junk):
        raise MidiError("not a MIDI file: it does not begin with 'MThd'")
    if junk:
        problems.add(f"{start} byte{'s' * (start > 1)} before the header")
    if len(data) < start + 14:
        raise MidiError(f"truncated MIDI file: the header needs 14 bytes, there are {len(data) - start}")
    header_length, file_format, num_tracks, division = struct.unpack_from(">IHHH", data, start + 4)
    if header_length < 6:
        raise MidiError(f"damaged MIDI file: a header of {header_length} bytes, at least 6 are needed")
    division, tick_seconds = _division(division)
    tracks = _tracks(data, start + 14, num_tracks, problems)
    if len(tracks) < num_tracks:
        problems.add(f"the header announces {num_tracks} tracks, there are {len(tracks)}", "truncated")
    if len(tracks) > num_tracks:
        problems.add(f"the header announces {num_tracks} tracks, there are {len(tracks)}: all are played")
    if file_format > 1 and len(tracks) > 1:
        if strict:
            raise MidiError(f"MIDI file of format {file_format}; only 0 and 1 can be read, export it as one of them")
        if file_format == 2:
            tracks = _one_after_the_other(tracks)
        else:
            problems.add(f"format {file_format} is unknown: taken for format 1")
    ends = [track.end for track in tracks]
    return MidiFile([track.events for track in tracks], division, tick_seconds, ends, problems.found)


class _Problems:
    """What breaks the standard, in words, `MAX_PROBLEMS` times at most; or an error, where reading is strict."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.found: list[str] = []

    def add(self, problem: str, kind: str = "damaged") -> None:
        if self.strict:
            raise MidiError(f"{kind} MIDI file: {problem}")
        if len(self.found) < MAX_PROBLEMS:
            self.found.append(problem)


def _division(division: int) -> tuple[int, float]:
    """Ticks a beat; for SMPTE time (top bit: minus frames a second, then ticks a frame) seconds a tick."""
    if division & 0x8000:
        frames_per_second, ticks_per_frame = 256 - (division >> 8), division & 0xFF
        if frames_per_second not in (24, 25, 29, 30) or not ticks_per_frame:
            raise MidiError(f"damaged MIDI file: SMPTE division {frames_per_second} x {ticks_per_frame}")
        rate = 30000 / 1001 if frames_per_second == 29 else frames_per_second  # 29 is "30 drop frame"
        return 0, 1 / (rate * ticks_per_frame)
    if not division:
        raise MidiError("damaged MIDI file: it has 0 ticks a beat")
    return division, 0.0


class _Track(NamedTuple):
    events: list[Event]
    end: int  # tick
    position: int  # of the byte after its last
    ended: bool  # by an end-of-track event
    broken: bool  # off before its end
    problems: list[str]


def _tracks(data: bytes, position: int, num_tracks: int, problems: _Problems) -> list[_Track]:
    """Every MTrk chunk. Lengths are believed where the next chunk, or the end of the data, is where they say."""
    tracks: list[_Track] = []
    room = MAX_EVENTS
    while len(tracks) < (num_tracks if problems.strict else MAX_TRACKS):
        position = data.find(b"MTrk", position)  # passes over unknown chunks
        if position < 0 or position + 8 > len(data):
            break
        name, begin = f"track {len(tracks) + 1}", position + 8
        length = int.from_bytes(data[position + 4 : begin], "big")
        end = begin + length
        cut = end > len(data)
        if cut:
            problems.add(f"{name} of {num_tracks} announces {length} bytes, {len(data) - begin} are left", "truncated")
        if end == len(data) or data.startswith(b"MTrk", end):
            track = _parse_track(data, begin, end, room)
            position = end
        else:
            following = data.find(b"MTrk", begin)
            limit = len(data) if following < 0 else following
            track = _parse_track(data, begin, min(end, limit), room)
            if not track.ended and end < limit:  # its length is too short, or other bytes come after it
                longer = _parse_track(data, begin, limit, room)
                track = longer if longer.ended else track
            if track.position > end or limit < end <= len(data):
                problems.add(f"{name} announces {length} bytes, it has {track.position - begin}")
            position = track.position
        for problem in track.problems:
            problems.add(f"{name}: {problem}")
        if track.broken or (cut and not track.ended):
            track = track._replace(events=_without_unfinished_notes(track.events))
        room -= len(track.events)
        tracks.append(track)
    return tracks


def _without_unfinished_notes(events: list[Event]) -> list[Event]:
    """Without the note-ons (of no drum) that nothing ends: where a track is cut off, their length is unknown."""
    finished: set[tuple[int, int]] = set()
    kept = []
    for event in reversed(events):
        if event.kind in (NOTE_ON, NOTE_OFF) and event.channel != DRUM_CHANNEL:
            key = (event.channel, event.a)
            if event.kind == NOTE_ON and event.b > 0 and key not in finished:
                continue
            finished.add(key)
        kept.append(event)
    return kept[::-1]


def _one_after_the_other(tracks: list[_Track]) -> list[_Track]:
    result, start = [], 0
    for track in tracks:
        events = [Event(start, TEMPO, 0, DEFAULT_TEMPO, 0)]
        events += [event._replace(tick=event.tick + start) for event in track.events]
        start += track.end
        result.append(track._replace(events=events, end=start))
    return result


def _parse_track(data: bytes, begin: int, limit: int, room: int) -> _Track:
    """The events from byte `begin` to the end-of-track event, to byte `limit`, or to where they make no sense."""
    i, tick, status, ended, broken = begin, 0, 0, False, False
    events: list[Event] = []
    problems: list[str] = []

    def pass_over(at: int, problem: str) -> None:
        if len(problems) < MAX_PROBLEMS:
            problems.append(f"byte {at - begin}: {problem}")

    def number(i: int) -> tuple[int, int]:
        """A variable-length quantity (7 bits a byte) at `i`, and the position after it."""
        value = 0
        for j in range(i, min(i + MAX_NUMBER_BYTES, limit)):
            value = (value << 7 | data[j] & 0x7F) & 0xFFFFFFFF
            if data[j] < 0x80:
                if j > i + 3:
                    pass_over(i, "a number of more than 4 bytes")
                return value, j + 1
        raise IndexError

    try:
        while i < limit and not ended:
            delta, i = number(i)
            tick += delta
            if i >= limit:
                raise IndexError
            here = data[i]
            if here & 0x80:
                i += 1
                if here < SYSTEM_EXCLUSIVE:
                    status = here
            elif status:
                here = status
            else:
                pass_over(i, "data with no event before it")
                broken = True
                break
            if here < SYSTEM_EXCLUSIVE:
                kind, at = here & 0xF0, i
                i += DATA_BYTES[kind]
                if i > limit:
                    raise IndexError
                a, b = data[at], data[at + 1] if i > at + 1 else 0
                if b > 127 and kind in (NOTE_OFF, NOTE_ON):
                    pass_over(at + 1, "a velocity above 127")  # what the note is, is plain
                    b = 127
                if (a | b) & 0x80:
                    pass_over(at, "a data byte above 127")
                elif kind in KEPT:
                    events.append(Event(tick, kind, here & 0x0F, a, b))
            elif here in (META, SYSTEM_EXCLUSIVE, ESCAPE):
                kind = here
                if here == META:
                    kind, i = data[i], i + 1
                length, i = number(i)
                body = data[i : min(i + length, limit)]
                if len(body) < length and kind != END_OF_TRACK:
                    raise IndexError
                if here == SYSTEM_EXCLUSIVE:
                    events += _of_system_exclusive(tick, body)
                elif here == META and kind == TEMPO:
                    microseconds = int.from_bytes(body[:4], "big")
                    if length == 3 and microseconds:
                        events.append(Event(tick, TEMPO, 0, microseconds, 0))
                    else:
                        pass_over(i, f"tempo of {length} bytes with value {microseconds}")
                ended = here == META and kind == END_OF_TRACK
                i += len(body)
            else:
                i += SYSTEM_DATA_BYTES.get(here, 0)
            if len(events) > room:
                raise MidiError(f"more than {MAX_EVENTS:,} notes and controls, which no piece has")
    except IndexError:
        problems.append("ends inside an event")
        i, broken = limit, True
    return _Track(events, tick, i, ended, broken, problems)


def _of_system_exclusive(tick: int, body: bytes) -> list[Event]:
    """The RESET or RHYTHM_PART that a system exclusive message (the bytes after F0) is, if it is one."""
    match list(body.removesuffix(b"\xf7")):
        case [0x7E, _, 0x09, mode] if mode in (1, 3):
            return [Event(tick, RESET, 0, GM if mode == 1 else GM2, 0)]
        case [0x43, device, 0x4C, 0, 0, 0x7E, 0] if device & 0xF0 == 0x10:
            return [Event(tick, RESET, 0, XG, 0)]
        case [0x43, device, 0x4C, 0x08, part, 0x07, mode] if device & 0xF0 == 0x10 and part < 16:
            return [Event(tick, RHYTHM_PART, part, int(mode > 0), 0)]
        case [0x41, _, 0x42, 0x12, *address_and_value, check] if (sum(address_and_value) + check) % 128 == 0:
            match address_and_value:
                case [0x40, 0x00, 0x7F, 0]:
                    return [Event(tick, RESET, 0, GS, 0)]
                case [0x40, part, 0x15, mode] if part & 0xF0 == 0x10:
                    part &= 0x0F  # 0 is channel 10, 1 to 9 are channels 1 to 9, 10 to 15 channels 11 to 16
                    channel = part - (part < 10) if part else DRUM_CHANNEL
                    return [Event(tick, RHYTHM_PART, channel, int(mode > 0), 0)]
    return []


def tick_times(midi: MidiFile, ticks: np.ndarray, first_track_only: bool = False) -> np.ndarray:
    """Seconds (float64) of `ticks`: 120 beats a minute until a track sets another tempo.

    `first_track_only`: pass over the tempo events of other tracks, as pretty_midi does (docs/spec.md 3.1.1).
    """
    if midi.tick_seconds:
        return ticks * midi.tick_seconds
    tracks = midi.tracks[:1] if first_track_only else midi.tracks
    tempos = sorted((event for track in tracks for event in track if event.kind == TEMPO), key=lambda event: event.tick)
    starts, scales, times = [0], [60.0 / (120.0 * midi.division)], [0.0]
    for event in tempos:
        scale = 60.0 / (6e7 / event.a * midi.division)  # seconds a tick
        if event.tick == 0:
            scales = [scale]
        elif scale != scales[-1]:
            times.append(times[-1] + scales[-1] * (event.tick - starts[-1]))
            starts.append(event.tick)
            scales.append(scale)
    interval = np.searchsorted(starts, ticks, side="right") - 1
    return np.asarray(times)[interval] + np.asarray(scales)[interval] * (ticks - np.asarray(starts)[interval])


def build(tracks: list[list[Event]], division: int) -> bytes:
    """Makes a format 1 file. Events of a track must be sorted by tick; ValueError where a value is out of range."""
    chunks = [struct.pack(">4sIHHH", b"MThd", 6, 1, len(tracks), division)]
    for track in tracks:
        body, tick = bytearray(), 0
        for event in track:
            body += _length_bytes(event.tick - tick)
            tick = event.tick
            if event.kind == TEMPO:
                body += bytes((META, TEMPO, 3)) + event.a.to_bytes(3, "big")
            elif (event.a | event.b) & ~0x7F:
                raise ValueError(f"{event}: values must be 0..127")
            else:
                body += bytes((event.kind | event.channel, event.a, event.b)[: 1 + DATA_BYTES[event.kind]])
        body += bytes((0, META, END_OF_TRACK, 0))
        chunks.append(struct.pack(">4sI", b"MTrk", len(body)) + body)
    return b"".join(chunks)


def _length_bytes(value: int) -> bytes:
    if not 0 <= value < 1 << 28:
        raise ValueError(f"{value} ticks from one event to the next; must be 0..{(1 << 28) - 1}")
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))
