"""From a score in beats to a performance in ticks: humanized timing and velocity, written as MIDI bytes."""

from __future__ import annotations

import bisect
import itertools
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from music_synth.midi import players, smf
from music_synth.midi.smf import DRUM_CHANNEL

TICKS_PER_BEAT = 480
MELODIC_CHANNELS = tuple(channel for channel in range(16) if channel != DRUM_CHANNEL)
MIN_SECONDS = 0.05  # of a note, and between two onsets of one pitch
GAP_SECONDS = 0.01  # between a note and the next of its pitch
VELOCITIES = (25, 120)  # the softest and the loudest note
VELOCITY_SPREAD = 3.0  # standard deviation
PAN = 10  # a controller


class Tone(NamedTuple):
    beat: float
    length: float  # beats
    pitch: int
    accent: int = 0  # added to the velocity


@dataclass
class Part:
    """One instrument: a track of its own on a channel of its own."""

    program: int
    is_drum: bool = False
    volume: int = 100  # CC7
    pan: int = 64  # CC10
    loudness: int = 0  # added to the velocity of every tone: a melody above its accompaniment
    spread: float = 0.006  # standard deviation of onsets, seconds
    tones: list[Tone] = field(default_factory=list)
    pedals: list[tuple[float, int]] = field(default_factory=list)  # (beat, CC64 value)
    controls: list[tuple[float, int, int]] = field(default_factory=list)  # (beat, controller, value)


@dataclass
class Score:
    tempos: list[tuple[float, float]]  # (beat, beats a minute), the first at beat 0
    dynamics: list[tuple[float, float]]  # (beat, velocity), interpolated
    parts: list[Part]
    velocities: tuple[int, int] = VELOCITIES

    def dynamic(self, beat: float) -> float:
        index = bisect.bisect_right(self.dynamics, (beat, 1e9)) - 1
        start, level = self.dynamics[max(index, 0)]
        if index < 0 or index + 1 == len(self.dynamics):
            return level
        end, next_level = self.dynamics[index + 1]
        return level + (next_level - level) * (beat - start) / (end - start)

    def ticks_per_second(self, beat: float) -> float:
        index = max(bisect.bisect_right(self.tempos, (beat, 1e9)) - 1, 0)
        return TICKS_PER_BEAT * self.tempos[index][1] / 60


class Played(NamedTuple):
    start: int  # ticks
    end: int
    pitch: int
    velocity: int
    part: int  # index into the score's parts


def perform(score: Score, rng: random.Random) -> list[Played]:
    """Humanizes every tone. Notes of one program and pitch never overlap: tokens could not tell them apart."""
    played = []
    for index, part in enumerate(score.parts):
        lag = rng.gauss(0.0, part.spread / 2)
        for beat, length, pitch, accent in part.tones:
            rate = score.ticks_per_second(beat)
            late = lag + max(-2.5, min(2.5, rng.gauss(0.0, 1.0))) * part.spread
            start = max(0, round(beat * TICKS_PER_BEAT + late * rate))
            end = start + round(max(length * TICKS_PER_BEAT, MIN_SECONDS * rate))
            velocity = score.dynamic(beat) + part.loudness + accent + rng.gauss(0.0, VELOCITY_SPREAD)
            softest, loudest = score.velocities
            velocity = round(max(softest, min(loudest, velocity)))
            played.append(Played(start, end, pitch, velocity, index))
    return _without_overlaps(score, played)


def _without_overlaps(score: Score, played: list[Played]) -> list[Played]:
    def voice(note: Played) -> tuple:
        part = score.parts[note.part]
        return (part.is_drum, part.program, note.pitch)

    kept = []
    for _, group in itertools.groupby(sorted(played, key=lambda n: (voice(n), n)), key=voice):
        last, *later = group
        for note in later:
            rate = score.ticks_per_second(note.start / TICKS_PER_BEAT)
            if note.start < last.start + MIN_SECONDS * rate:
                continue  # a unison, or too soon to be heard as a second stroke
            kept.append(last._replace(end=min(last.end, note.start - max(1, round(GAP_SECONDS * rate)))))
            last = note
        kept.append(last)
    return kept


def to_midi(score: Score, rng: random.Random) -> bytes:
    """Performs the score and writes it as a MIDI file: tempi in the first track, then one track a part.

    The same score and generator state give the same bytes.
    """
    tempi = [(round(beat * TICKS_PER_BEAT), round(60e6 / bpm)) for beat, bpm in score.tempos]
    tracks = [[smf.Event(tick, smf.TEMPO, 0, microseconds, 0) for tick, microseconds in tempi]]
    channels = iter(MELODIC_CHANNELS)
    played = perform(score, rng)
    for index, part in enumerate(score.parts):
        notes = [note for note in played if note.part == index]
        if notes:
            channel = DRUM_CHANNEL if part.is_drum else next(channels)
            tracks.append(_track(part, channel, notes))
    return smf.build(tracks, TICKS_PER_BEAT)


def _track(part: Part, channel: int, notes: list[Played]) -> list[smf.Event]:
    """Program, volume and place, then notes, pedal and other controls in order of time."""
    setup = [
        smf.Event(0, smf.PROGRAM_CHANGE, channel, part.program, 0),
        smf.Event(0, smf.CONTROL_CHANGE, channel, players.VOLUME, part.volume),
        smf.Event(0, smf.CONTROL_CHANGE, channel, PAN, part.pan),
    ]
    events = [
        smf.Event(round(beat * TICKS_PER_BEAT), smf.CONTROL_CHANGE, channel, players.SUSTAIN_CONTROL, value)
        for beat, value in part.pedals
    ]
    events += [
        smf.Event(round(beat * TICKS_PER_BEAT), smf.CONTROL_CHANGE, channel, controller, value)
        for beat, controller, value in part.controls
    ]
    for start, end, pitch, velocity, _ in notes:
        events.append(smf.Event(start, smf.NOTE_ON, channel, pitch, velocity))
        events.append(smf.Event(end, smf.NOTE_OFF, channel, pitch, 64))
    order = {smf.NOTE_OFF: 0, smf.CONTROL_CHANGE: 1, smf.NOTE_ON: 2}  # within a tick
    return setup + sorted(events, key=lambda event: (event.tick, order[event.kind], event))
