"""Standard MIDI Files: bytes to timed channel events, and back.

Written from the "Standard MIDI Files 1.0" specification. Only what notes need is kept: note on and off,
program change, control change, pitch bend and tempo.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from music_synth.errors import UserError

NOTE_OFF, NOTE_ON, CONTROL_CHANGE, PROGRAM_CHANGE, PITCH_BEND = 0x80, 0x90, 0xB0, 0xC0, 0xE0
TEMPO = 0x51  # a meta event's type; below 0x80, so no channel status has this value
KEPT = (NOTE_OFF, NOTE_ON, CONTROL_CHANGE, PROGRAM_CHANGE, PITCH_BEND)
END_OF_TRACK, META = 0x2F, 0xFF
DATA_BYTES = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}  # by kind of channel event
SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1}  # other system events have none; none belongs in a file


class MidiError(UserError):
    """A MIDI file that cannot be read, or holds no music. The message names the file and what is wrong."""


class Event(NamedTuple):
    """`kind`: NOTE_ON ... PITCH_BEND, or TEMPO, where `a` is microseconds a beat, `channel` and `b` are 0."""

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


def parse(data: bytes) -> MidiFile:
    """The events of every track, in file order. Raises `MidiError` (without a file name) where it is no MIDI.

    Lenient where files in the wild need it: unknown chunks, a missing end of track and bytes after the last
    track are passed over, and running status lives on after meta and system exclusive events.
    """
    if not data:
        raise MidiError("empty (0 bytes)")
    if data[:4] != b"MThd":
        raise MidiError("not a MIDI file: it does not begin with 'MThd'")
    if len(data) < 14:
        raise MidiError(f"truncated MIDI file: the header needs 14 bytes, there are {len(data)}")
    header_length, file_format, num_tracks, division = struct.unpack(">IHHH", data[4:14])
    if header_length < 6:
        raise MidiError(f"damaged MIDI file: a header of {header_length} bytes, at least 6 are needed")
    if file_format > 1:
        raise MidiError(f"MIDI file of format {file_format}; only 0 and 1 can be read, export it as one of them")
    division, tick_seconds = _division(division)
    tracks, position = [], 8 + header_length
    while len(tracks) < num_tracks:
        if position + 8 > len(data):
            raise MidiError(f"truncated MIDI file: it announces {num_tracks} tracks and ends after {len(tracks)}")
        name, length = struct.unpack(">4sI", data[position : position + 8])
        chunk = data[position + 8 : position + 8 + length]
        if len(chunk) < length:
            raise MidiError(
                f"truncated MIDI file: track {len(tracks) + 1} of {num_tracks} announces {length} bytes, "
                f"{len(chunk)} are left"
            )
        if name == b"MTrk":
            try:
                tracks.append(_parse_track(chunk))
            except IndexError:
                raise MidiError(f"damaged MIDI file: track {len(tracks) + 1} ends inside an event") from None
            except MidiError as error:
                raise MidiError(f"damaged MIDI file: track {len(tracks) + 1}: {error}") from None
        position += 8 + length
    return MidiFile(tracks, division, tick_seconds)


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


def _parse_track(chunk: bytes) -> list[Event]:
    """Events of one MTrk chunk. Raises IndexError where the chunk ends inside an event."""
    events: list[Event] = []
    tick = status = i = 0
    while i < len(chunk):
        delta, i = _read_length(chunk, i)
        tick += delta
        if chunk[i] & 0x80:
            status_here = chunk[i]
            i += 1
            if status_here < 0xF0:
                status = status_here
        elif status:
            status_here = status
        else:
            raise MidiError(f"byte {i}: data with no event before it")
        if status_here < 0xF0:
            kind = status_here & 0xF0
            a, b = chunk[i], 0
            if DATA_BYTES[kind] == 2:
                b = chunk[i + 1]
            if (a | b) & 0x80:
                raise MidiError(f"byte {i}: a data byte above 127")
            i += DATA_BYTES[kind]
            if kind in KEPT:
                events.append(Event(tick, kind, status_here & 0x0F, a, b))
        elif status_here == META:
            meta = chunk[i]
            length, i = _read_length(chunk, i + 1)
            body = chunk[i : i + length]
            i += length
            if len(body) < length:
                raise IndexError
            if meta == TEMPO:
                microseconds = int.from_bytes(body, "big")
                if length != 3 or not microseconds:
                    raise MidiError(f"byte {i - length}: tempo of {length} bytes with value {microseconds}")
                events.append(Event(tick, TEMPO, 0, microseconds, 0))
            elif meta == END_OF_TRACK:
                break
        elif status_here in (0xF0, 0xF7):  # system exclusive
            length, i = _read_length(chunk, i)
            i += length
            if i > len(chunk):
                raise IndexError
        else:
            i += SYSTEM_DATA_BYTES.get(status_here, 0)
    return events


def _read_length(chunk: bytes, i: int) -> tuple[int, int]:
    """A variable-length quantity (7 bits a byte, at most 4 bytes) at `i`, and the position after it."""
    value = 0
    for j in range(i, i + 4):
        byte = chunk[j]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, j + 1
    raise MidiError(f"byte {i}: a number of more than 4 bytes")


def tick_times(midi: MidiFile, ticks: np.ndarray) -> np.ndarray:
    """Seconds (float64) of `ticks` (golden 3.1.1): tempo from the first track only, at first 120 a minute."""
    if midi.tick_seconds:
        return ticks * midi.tick_seconds
    starts, scales, times = [0], [60.0 / (120.0 * midi.division)], [0.0]
    for event in midi.tracks[0] if midi.tracks else []:
        if event.kind != TEMPO:
            continue
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
    """A format 1 file. Events of a track must be sorted by tick; ValueError where a value is out of range."""
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
