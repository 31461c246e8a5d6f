"""What a player sounds: MIDI events to notes, as a General MIDI device turns them into sound.

The rules are those of "MIDI 1.0", "General MIDI" 1 and 2, RP-015, Roland GS and Yamaha XG; where these leave a
choice, FluidSynth's. State belongs to the channel, whichever track sets it, and events act in the order of the file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import numpy as np

from music_synth.midi import smf

BANK, VOLUME, EXPRESSION, SUSTAIN_CONTROL, SOSTENUTO = 0, 7, 11, 64, 66  # controllers
ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 120, 121, 123  # 124 to 127 turn notes off, too
PEDAL_DOWN = 64  # from this value on a pedal is down
DEFAULT_VOLUME, DEFAULT_EXPRESSION = 100, 127
GM2_DRUMS, GM2_MELODY, XG_EFFECTS, XG_DRUMS = 120, 121, 126, 127  # banks
SHORTEST = 0.01  # seconds; of a note that ends on the tick on which it begins. FluidSynth's shortest note
DRUM_RINGS = 0.1  # seconds; of a drum that nothing ends, or that ends at once

Sound = tuple[int, int, int, float, float, bool, int]  # the fields of `notes.Note`


def sounds(midi: smf.MidiFile) -> list[Sound]:
    """The notes that a player sounds, in order of their onsets.

    - A key sounds until it is let go, and on while a pedal holds it; until it is struck again; or until its channel
      is silenced. What nothing ends lasts to the end of its track, or of the piece if only the pedal holds it.
    - Notes of no length last `SHORTEST`; drums that nothing ends, or that end at once, `DRUM_RINGS`.
    - Program, drums and loudness are those of the onset.
    - Where channels of one program play one pitch at the same time, it sounds until the last of them ends.
    """
    synth = _Synth(midi.ends)
    for track, event in in_order(midi):
        synth.play(track, event)
    return _unisons(synth.notes(midi))


class Channel:
    """The state of one channel."""

    def __init__(self, number: int):
        self.number = number
        self.down: dict[int, int] = {}  # pitch -> note whose key is down
        self.held: dict[int, int] = {}  # pitch -> note whose key is up and that a pedal holds
        self.reset(smf.GM)

    def reset(self, device: int) -> None:
        """To what a device is when it is turned on, but for the notes."""
        self.device = device
        self.program = 0
        self.bank: int | None = None
        self.volume = DEFAULT_VOLUME
        self.set_rhythm_part(self.number == smf.DRUM_CHANNEL)
        self.reset_controllers()

    def reset_controllers(self) -> None:
        """As RP-015 has it: volume, bank and program stay."""
        self.expression = DEFAULT_EXPRESSION
        self.sustain = False
        self.sostenuto: dict[int, int] = {}  # pitch -> note that was down when that pedal went down
        self.sostenuto_down = False

    def set_rhythm_part(self, is_drum: bool) -> None:
        self.is_rhythm_part = self.is_drum = is_drum

    def change_program(self, program: int) -> None:
        """General MIDI 2 and XG choose drums by the bank; in GS such banks are variations of melodic sounds."""
        self.program = program
        if self.device == smf.GS or self.bank is None:
            return
        if self.bank in (GM2_DRUMS, XG_EFFECTS, XG_DRUMS):
            self.is_drum = True
        elif self.bank == GM2_MELODY or self.device == smf.XG:
            self.is_drum = False
        else:
            self.is_drum = self.is_rhythm_part

    def loudness(self, velocity: int) -> int:
        """The velocity, 1..127, that sounds as loud where volume and expression have their defaults.

        A SoundFont's default modulators (SoundFont 2.04, 8.4) attenuate by 40 log10(127 / value) dB for each of
        velocity, volume and expression, so their product counts.
        """
        scaled = velocity * self.volume * self.expression / (DEFAULT_VOLUME * DEFAULT_EXPRESSION)
        return min(127, max(1, round(scaled)))

    def sustains(self, pitch: int, note: int) -> bool:
        """Whether a pedal holds a note whose key is up. Drums ring as long as they do."""
        return not self.is_drum and (self.sustain or self.sostenuto.get(pitch) == note)


class _Synth:
    """Sixteen channels, and the notes that they have played."""

    def __init__(self, track_ends: list[int]):
        self.track_ends = track_ends
        self.channels = [Channel(number) for number in range(16)]
        self.heads: list[tuple[int, int, int, bool, int]] = []  # pitch, velocity, program, is_drum, instrument
        self.spans: list[list[int]] = []  # onset, offset; ticks
        self.open: dict[int, int] = {}  # note that nothing has ended yet -> its track
        self.instruments: dict[tuple[int, int, bool], int] = {}  # channel, program, is_drum -> number

    def play(self, track: int, event: smf.Event) -> None:
        tick, kind, number, a, b = event
        channel = self.channels[number]
        if kind == smf.NOTE_ON and b > 0:
            self._strike(channel, track, tick, a, b)
        elif kind in (smf.NOTE_OFF, smf.NOTE_ON):
            self._let_go(channel, tick, a)
        elif kind == smf.CONTROL_CHANGE:
            self._control(channel, tick, a, b)
        elif kind == smf.PROGRAM_CHANGE:
            channel.change_program(a)
        elif kind == smf.RHYTHM_PART:
            channel.set_rhythm_part(bool(a))
        elif kind == smf.RESET:
            for channel in self.channels:
                self._silence(channel, tick)
                channel.reset(a)

    def _strike(self, channel: Channel, track: int, tick: int, pitch: int, velocity: int) -> None:
        for sounding in (channel.down, channel.held):
            if pitch in sounding:
                self._end(sounding.pop(pitch), tick)
        key = (channel.number, channel.program, channel.is_drum)
        instrument = self.instruments.setdefault(key, len(self.instruments))
        note = channel.down[pitch] = len(self.heads)
        self.open[note] = track
        self.heads.append((pitch, channel.loudness(velocity), channel.program, channel.is_drum, instrument))
        self.spans.append([tick, tick])

    def _end(self, note: int, tick: int) -> None:
        self.spans[note][1] = tick
        del self.open[note]

    def _let_go(self, channel: Channel, tick: int, pitch: int) -> None:
        note = channel.down.pop(pitch, None)
        if note is None:
            return
        if channel.sustains(pitch, note):
            channel.held[pitch] = note
        else:
            self._end(note, tick)

    def _control(self, channel: Channel, tick: int, controller: int, value: int) -> None:
        if controller == VOLUME:
            channel.volume = value
        elif controller == EXPRESSION:
            channel.expression = value
        elif controller == BANK:
            channel.bank = value
        elif controller == SUSTAIN_CONTROL:
            channel.sustain = value >= PEDAL_DOWN
            if not channel.sustain:
                self._damp(channel, tick)
        elif controller == SOSTENUTO:
            was_down, channel.sostenuto_down = channel.sostenuto_down, value >= PEDAL_DOWN
            if channel.sostenuto_down != was_down:
                channel.sostenuto = dict(channel.down) if channel.sostenuto_down else {}
                if not (channel.sostenuto_down or channel.sustain):  # else nothing ends
                    self._damp(channel, tick)
        elif controller == RESET_CONTROLLERS:
            channel.reset_controllers()
            self._damp(channel, tick)
        elif controller == ALL_SOUND_OFF:
            self._silence(channel, tick)
        elif controller >= ALL_NOTES_OFF:
            for pitch in list(channel.down):
                self._let_go(channel, tick, pitch)

    def _damp(self, channel: Channel, tick: int) -> None:
        """Ends the notes that no pedal holds any more."""
        for pitch, note in list(channel.held.items()):
            if not channel.sustains(pitch, note):
                self._end(channel.held.pop(pitch), tick)

    def _silence(self, channel: Channel, tick: int) -> None:
        for sounding in (channel.down, channel.held):
            for note in sounding.values():
                self._end(note, tick)
            sounding.clear()

    def notes(self, midi: smf.MidiFile) -> list[Sound]:
        """All notes, at the end of the piece."""
        held = {note for channel in self.channels for note in channel.held.values()}
        for note, track in self.open.items():
            if not self.heads[note][3]:
                self.spans[note][1] = max(self.track_ends) if note in held else self.track_ends[track]
        times = smf.tick_times(midi, np.array(self.spans, np.int64).reshape(-1, 2)).tolist()
        result = []
        for (pitch, velocity, program, is_drum, instrument), (onset, offset) in zip(self.heads, times, strict=True):
            if offset <= onset:
                offset = onset + (DRUM_RINGS if is_drum else SHORTEST)
            result.append((pitch, velocity, program, onset, offset, is_drum, instrument))
        return result


def in_order(midi: smf.MidiFile) -> Iterator[tuple[int, smf.Event]]:
    """(track, event) by tick; at one tick in the order of the tracks, and of the file in each."""
    events = list(chain.from_iterable(midi.tracks))
    tracks = np.repeat(np.arange(len(midi.tracks)), [len(track) for track in midi.tracks])
    order = np.argsort(np.array([event.tick for event in events], np.int64), kind="stable")
    return zip(tracks[order].tolist(), map(events.__getitem__, order.tolist()), strict=True)


def _unisons(notes: list[Sound]) -> list[Sound]:
    """Makes notes of one pitch and program that sound together (on several channels) sound until the last ends.

    Tokens, and a single instrument, know no two of them: the first end would end both. So each ends where a later
    one begins or where the last of them ends, whichever is nearer to its own end.
    """
    offsets = [note[4] for note in notes]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (pitch, _, program, _, _, is_drum, _) in enumerate(notes):
        if not is_drum:
            groups[program, pitch].append(i)
    for group in groups.values():
        together: list[int] = []
        end = 0.0
        for i in group:
            if notes[i][3] >= end:
                _end_together(notes, offsets, together, end)
                together = []
            together.append(i)
            end = max(end, offsets[i])
        _end_together(notes, offsets, together, end)
    return [(*note[:4], offset, *note[5:]) for note, offset in zip(notes, offsets, strict=True)]


def _end_together(notes: list[Sound], offsets: list[float], together: list[int], end: float) -> None:
    if len(together) < 2:
        return
    ends = [*(notes[i][3] for i in together), end]  # onsets, ascending, and the last end
    for i in together:
        first = bisect_right(ends, notes[i][3])
        after = max(first, bisect_left(ends, offsets[i]))
        before = max(first, after - 1)
        offsets[i] = min(ends[before], ends[after], key=lambda time: abs(time - offsets[i]))
