"""The excitation of a note-informed inverter: a plain signal made of the notes, whose phases hold.

Each note is the sum over k of sin(2 pi k f t) / k up to 8 kHz at its exact frequency f, from its onset on, in a low
note with other phases, as its partials would be pulses; a drum hit is a burst of noise. What it lacks (spectra, decays,
vibrato, rooms) is the inverter's part, which reads them off the mel: a harmonic source before a learned filter, as in
DDSP (Engel et al. 2020) and in neural source-filter models (Wang et al. 2019), for all notes of all instruments in one
signal.

A sample depends on its number and the notes alone, so pieces of a stream are those of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from music_synth.audio.mel import HOP_LENGTH, SAMPLE_RATE
from music_synth.midi.notes import Note, hertz_of

SOURCE_HOPS = 3  # beyond the frames: one before, two after, as far as synthesis frames reach
SOURCE_FLOOR = 1e-2  # magnitude that counts as silence; a partial of the softest note is ten times louder
MAX_HZ = SAMPLE_RATE / 2
TABLE = 8192  # samples of a period; a line between two of them is within 0.3 % of a sine of 200 periods a table
SCATTERED = 40  # pitches under E2 have a period in which the ear, and a window of 16 ms, hears pulses
ATTACK = 0.002  # seconds
RELEASE = 0.1  # seconds in which a note falls to 1/e once it is let go
RELEASE_SECONDS = 0.7  # then it is 61 dB down, and ends
DRUM_SECONDS = 0.4
DRUM_BANDS = {  # pitches of General MIDI's kit: (lowest, highest Hz, seconds to 1/e); others as the last
    (35, 36): (30.0, 300.0, 0.08),
    (41, 43, 45, 47, 48, 50): (60.0, 1000.0, 0.1),
    (42, 44, 46, 49, 51, 52, 53, 54, 55, 57, 59, 69, 70, 80, 81): (2000.0, MAX_HZ, 0.1),
    (): (150.0, MAX_HZ, 0.06),
}


def render(notes: Sequence[Note], start: int, count: int, cents: Sequence[float] | float = 0.0) -> np.ndarray:
    """Makes samples start .. start + count - 1 of the source of `notes`, float32 [count], at 16 kHz.

    Args:
      notes: times in seconds from sample 0.
      cents: how far above A4 = 440 Hz they are tuned, each of them or all.
    """
    source = np.zeros(count, np.float32)
    tunings = [cents] * len(notes) if isinstance(cents, float) else cents
    for note, tuning in zip(notes, tunings, strict=True):
        if not np.isfinite((note.onset, note.offset)).all():
            continue
        length = DRUM_SECONDS if note.is_drum else max(note.offset - note.onset, 0.0) + RELEASE_SECONDS
        onset = note.onset * SAMPLE_RATE
        first, last = max(start, int(np.ceil(onset))), min(start + count, int(onset + length * SAMPLE_RATE))
        if first < last:
            t = (np.arange(first, last) - onset) / SAMPLE_RATE  # float64: phases stay exact for hours
            source[first - start : last - start] += burst(note, t) if note.is_drum else tone(note, t, tuning)
    return source


def source_of_frames(
    notes: Sequence[Note], first_frame: int, num_frames: int, cents: Sequence[float] | float = 0.0
) -> np.ndarray:
    """Makes the source for `num_frames` frames of mel, as generators take it: from a hop before the first to two after.

    float32 [320 (num_frames + 3)]
    """
    return render(notes, (first_frame - 1) * HOP_LENGTH, (num_frames + SOURCE_HOPS) * HOP_LENGTH, cents)


def tone(note: Note, t: np.ndarray, cents: float = 0.0) -> np.ndarray:
    """A note t seconds after its onset, float32."""
    wave = read_table(period(note.pitch), hz(note.pitch, cents) * t)
    t = t.astype(np.float32)
    level = np.minimum(t / np.float32(ATTACK), 1.0) * np.float32((note.velocity / 127) ** 2)
    held = note.offset - note.onset
    if t[-1] > held:
        level *= np.exp(np.minimum((held - t) / np.float32(RELEASE), 0.0))
    return wave * level


def burst(note: Note, t: np.ndarray) -> np.ndarray:
    """A drum hit t seconds after its onset, float32: the same noise at each hit."""
    noise = drum_noise(next((band for pitches, band in DRUM_BANDS.items() if note.pitch in pitches), DRUM_BANDS[()]))
    index = np.minimum(np.rint(t * SAMPLE_RATE).astype(np.int32), len(noise) - 1)
    return noise[index] * np.float32((note.velocity / 127) ** 2)


def hz(pitch: int, cents: float = 0.0) -> float:
    return hertz_of(pitch + cents / 100)


@functools.cache
def period(pitch: int) -> np.ndarray:
    """A period of the harmonics of a pitch below 8 kHz, float32 [TABLE + 1]; those of a low one out of phase."""
    k = partials(pitch)
    return wave_table(scattered(k, pitch) / k if pitch < SCATTERED else 1 / k)


def scattered(values: np.ndarray, seed: int) -> np.ndarray:
    """Complex numbers of magnitude 1 and random phase, as many as there are values: the same for one seed."""
    return np.exp(2j * np.pi * np.random.default_rng(seed).random(len(values)))


def partials(pitch: int) -> np.ndarray:
    """Numbers of a pitch's partials below 8 kHz: 1, 2, ..."""
    return np.arange(1, int(np.ceil(MAX_HZ / hz(pitch))))


def wave_table(amplitudes: np.ndarray) -> np.ndarray:
    """A period of a sum of sines, the first once in it, float32 [TABLE + 1]; complex amplitudes turn their phases."""
    spectrum = np.zeros(TABLE // 2 + 1, np.complex128)
    spectrum[1 : len(amplitudes) + 1] = -0.5j * TABLE * amplitudes
    wave = np.fft.irfft(spectrum, TABLE)
    return np.append(wave, wave[0]).astype(np.float32)


def read_table(table: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """The wave after so many periods, float64 so that phases stay exact for hours; float32, of the same shape."""
    position = ((periods - np.floor(periods)) * TABLE).astype(np.float32)  # floor is ten times faster than %
    index = np.minimum(position.astype(np.int32), TABLE - 1)  # float32 may round up to TABLE
    wave = table[index]
    return wave + (table[index + 1] - wave) * (position - index)


@functools.cache
def drum_noise(band: tuple[float, float, float]) -> np.ndarray:
    """Noise between two frequencies that decays: (lowest, highest Hz, seconds to 1/e), float32 [DRUM_SECONDS]."""
    lowest, highest, decay = band
    size = round(DRUM_SECONDS * SAMPLE_RATE)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(size))
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * ((hz >= lowest) & (hz <= highest)), size)
    noise *= np.exp(-np.arange(size) / (decay * SAMPLE_RATE))
    return (noise / np.abs(noise).max()).astype(np.float32)
