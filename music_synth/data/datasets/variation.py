"""Varies a MIDI file before it is rendered, so that one piece is heard in many ways. Labels follow the change."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from music_synth.audio.soundfont import Room
from music_synth.errors import UserError
from music_synth.midi import players, smf

KINDS = ("programs", "transposition", "tempo", "gains", "tuning", "room", "equalizer", "vibrato")
FAMILY = 8  # programs of a General MIDI family
SAME_PROGRAM = 0.5  # chance that a program stays
MAX_TRANSPOSITION = 5  # semitones, up and down
MAX_TEMPO = 1.2  # times as fast or as slow
MAX_GAIN = 6.0  # dB, of a channel, louder or softer
MAX_TUNING = 15.0  # cents, up and down
DRY = 0.25  # chance of no room at all
MAX_EQUALIZER = 4.0  # dB, at each of EQUALIZER_BANDS
MAX_VIBRATO = 30.0  # cents, up and down, of a channel, where pitch bends reach over two semitones
VIBRATO = 0.3  # chance that a channel has some
BEND = 1 << 13  # of a pitch bend, the value that bends nothing; twice as much is 200 cents up
EQUALIZER_BANDS = (60, 250, 1000, 4000, 8000)  # Hz


@dataclass(frozen=True)
class Variation:
    """What is changed of a piece; the defaults change nothing."""

    programs: tuple[int, ...] = tuple(range(128))  # what each program becomes; drums stay
    transposition: int = 0  # semitones; drums stay
    tempo: float = 1.0  # times as fast
    gains: tuple[float, ...] = (0.0,) * 16  # dB, of each channel
    tuning: float = 0.0  # cents
    room: Room | bool = True
    equalizer: tuple[float, ...] = (0.0,) * len(EQUALIZER_BANDS)  # dB
    vibrato: tuple[float, ...] = (0.0,) * 16  # cents, of each channel; drums stay

    @classmethod
    def draw(cls, seed: str, kinds: Collection[str] = KINDS) -> Variation:
        """The variation of a seed; only what `kinds` names is changed. One kind more changes none of the others."""
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(f"unknown variation {unknown[0]!r}: choose from {', '.join(KINDS)}")
        return cls(**{kind: _draw(kind, random.Random(f"{seed}/{kind}")) for kind in KINDS if kind in kinds})


def _draw(kind: str, rng: random.Random):
    if kind == "programs":
        table = []
        for program in range(128):
            other = program // FAMILY * FAMILY + rng.randrange(FAMILY)
            table.append(program if rng.random() < SAME_PROGRAM else other)
        return tuple(table)
    if kind == "transposition":
        return rng.randint(-MAX_TRANSPOSITION, MAX_TRANSPOSITION)
    if kind == "tempo":
        return MAX_TEMPO ** rng.uniform(-1, 1)
    if kind == "gains":
        return tuple(rng.uniform(-MAX_GAIN, MAX_GAIN) for _ in range(16))
    if kind == "tuning":
        return rng.uniform(-MAX_TUNING, MAX_TUNING)
    if kind == "room":
        room = Room(rng.uniform(0.1, 0.9), rng.uniform(0.0, 0.8), rng.uniform(0.2, 1.0), rng.uniform(0.2, 0.9))
        return room if rng.random() >= DRY else False
    if kind == "vibrato":
        return tuple(rng.uniform(0, MAX_VIBRATO) if rng.random() < VIBRATO else 0.0 for _ in range(16))
    return tuple(rng.uniform(-MAX_EQUALIZER, MAX_EQUALIZER) for _ in EQUALIZER_BANDS)


def vary(midi: smf.MidiFile, variation: Variation) -> smf.MidiFile:
    """The file with what a variation changes of its events: programs, pitches, tempo, channel volumes and bends."""
    pitches = [pitch for pitch, _, _, _, _, is_drum, _ in players.sounds(midi) if not is_drum]
    shift = variation.transposition
    if pitches:  # the whole piece by so much that it stays within the keys
        shift = max(-min(pitches), min(127 - max(pitches), shift))
    channels = [players.Channel(number) for number in range(16)]
    first = [smf.Event(0, smf.TEMPO, 0, _tempo(smf.DEFAULT_TEMPO, variation), 0), *_start(0, channels, variation)]
    tracks: list[list[smf.Event]] = [[] for _ in midi.tracks]
    bends, wobble, points = [BEND] * 16, list[smf.Event](), 0
    step = max(1, midi.division // 24 or round(0.02 / midi.tick_seconds))  # ticks; 20 ms at 125 beats a minute
    for track, event in players.in_order(midi):
        tick, kind, number, a, b = event
        channel = channels[number]
        while any(variation.vibrato) and points * step < tick:
            wobble += _bent(points, step, channels, bends, variation)
            points += 1
        later: list[smf.Event] = []
        if kind in (smf.NOTE_ON, smf.NOTE_OFF) and not channel.is_drum:
            a += shift
            if not 0 <= a < 128:  # the end of no note
                continue
        elif kind == smf.CONTROL_CHANGE and a == players.BANK:
            channel.bank = b
        elif kind == smf.CONTROL_CHANGE and a == players.VOLUME:
            b = _volume(b, variation.gains[number])
        elif kind == smf.PROGRAM_CHANGE:
            channel.change_program(a)
            a = a if channel.is_drum else variation.programs[a]
        elif kind == smf.RHYTHM_PART:
            channel.set_rhythm_part(bool(a))
        elif kind == smf.PITCH_BEND:
            bends[number] = a | b << 7
        elif kind == smf.TEMPO:
            a = _tempo(a, variation)
        elif kind == smf.RESET:
            for every in channels:
                every.reset(a)
            bends = [BEND] * 16
            later = _start(tick, channels, variation)
        tracks[track] += [smf.Event(tick, kind, number, a, b), *later]
    tick_seconds = midi.tick_seconds / variation.tempo
    if wobble:
        tracks, ends = [wobble, *tracks], [wobble[-1].tick, *midi.ends]
    else:
        ends = midi.ends
    return midi._replace(tracks=[first, *tracks], ends=[0, *ends], tick_seconds=tick_seconds)


def _bent(
    point: int, step: int, channels: list[players.Channel], bends: list[int], variation: Variation
) -> list[smf.Event]:
    """Pitch bends of the channels at a point of their vibrato, ten of which are a cycle, on top of the piece's own."""
    events = []
    for channel, bend, cents in zip(channels, bends, variation.vibrato, strict=True):
        if cents and not channel.is_drum:
            value = bend + round(cents / 200 * BEND * math.sin(2 * math.pi * point / 10))
            value = min(max(value, 0), 2 * BEND - 1)
            events.append(smf.Event(point * step, smf.PITCH_BEND, channel.number, value & 127, value >> 7))
    return events


def _tempo(microseconds: int, variation: Variation) -> int:
    return max(1, round(microseconds / variation.tempo))


def _start(tick: int, channels: list[players.Channel], variation: Variation) -> list[smf.Event]:
    """Programs and volumes of a device that was turned on."""
    events = []
    for channel in channels:
        volume = _volume(players.DEFAULT_VOLUME, variation.gains[channel.number])
        events.append(smf.Event(tick, smf.CONTROL_CHANGE, channel.number, players.VOLUME, volume))
        if not channel.is_drum:
            events.append(smf.Event(tick, smf.PROGRAM_CHANGE, channel.number, variation.programs[0], 0))
    return events


def _volume(value: int, gain: float) -> int:
    """A channel volume made louder by `gain` dB: volume attenuates by 40 log10(127 / value) dB."""
    return min(127, round(value * 10 ** (gain / 40)))


def equalize(audio: np.ndarray, sample_rate: int, gains: tuple[float, ...]) -> np.ndarray:
    """float32 [S] with `gains` in dB at EQUALIZER_BANDS and straight lines over log frequency between; zero phase."""
    if not any(gains):
        return audio
    size = 1 << (len(audio) - 1).bit_length()
    spectrum = np.fft.rfft(audio, size)
    frequency = np.fft.rfftfreq(size, 1 / sample_rate)
    decibels = np.interp(np.log(np.maximum(frequency, 1.0)), np.log(EQUALIZER_BANDS), gains)
    return np.fft.irfft(spectrum * 10 ** (decibels / 20), size)[: len(audio)].astype(np.float32)
