"""Keys, chords, progressions and voicings: what the lines of a piece agree on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PHRASE_BARS = 4
TONIC, SUPERTONIC, SUBDOMINANT, DOMINANT = 0, 1, 3, 4

# Four bars each, as scale degrees counted from 0. An open phrase is played as it stands; a closed one ends
# with a cadence in its place.
PROGRESSIONS = {
    "major": (
        (0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4), (5, 3, 0, 4), (0, 2, 3, 4), (0, 5, 1, 4), (3, 4, 2, 5),
        (0, 3, 1, 4), (0, 1, 3, 4), (5, 1, 4, 0), (0, 4, 3, 4), (3, 0, 1, 4),
    ),
    "minor": (
        (0, 5, 2, 6), (0, 3, 0, 4), (0, 6, 5, 4), (0, 5, 3, 4), (0, 2, 5, 4), (0, 3, 6, 2), (5, 6, 0, 4),
        (0, 0, 3, 4), (0, 6, 5, 6), (3, 0, 5, 4),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    tonic: int  # pitch class, 0 = C
    mode: str  # "major" or "minor"

    def chord(self, degree: int, start: float, length: float, seventh: bool = False) -> Chord:
        """Returns the diatonic chord on a degree; in minor the dominant gets its leading tone."""
        scale = list(SCALES[self.mode])
        if self.mode == "minor" and degree == DOMINANT:
            scale[6] = 11
        classes = [(step + self.tonic) % 12 for step in scale]
        stacked_thirds = [classes[(degree + third) % 7] for third in (0, 2, 4, 6)]
        return Chord(start, length, tuple(stacked_thirds[: 3 + seventh]), frozenset(classes))

    def relative(self) -> Key:
        """Returns the relative minor of a major key, relative major of a minor one: where the middle part goes."""
        if self.mode == "major":
            return Key((self.tonic + 9) % 12, "minor")
        return Key((self.tonic + 3) % 12, "major")


class Chord(NamedTuple):
    start: float  # beats from the start of the piece
    length: float  # beats
    classes: tuple[int, ...]  # pitch classes, root first
    scale: frozenset[int]  # pitch classes that melodies use over it

    @property
    def end(self) -> float:
        return self.start + self.length


@dataclass(frozen=True)
class Phrase:
    """Four bars with one idea. The ending is one long chord, a phrase of its own."""

    letter: str  # phrases of one letter share their melody
    start: float  # beats
    meter: int  # beats in a bar
    chords: tuple[Chord, ...]
    closed: bool  # ends at rest on the tonic
    is_ending: bool = False

    @property
    def end(self) -> float:
        return self.chords[-1].end

    def chord_at(self, beat: float) -> Chord:
        return next((c for c in self.chords if c.start - 1e-6 <= beat < c.end - 1e-6), self.chords[-1])


def harmonize(
    rng: random.Random, key: Key, letter: str, start: float, meter: int, closed: bool, sevenths: float
) -> Phrase:
    """Writes a phrase over one of `PROGRESSIONS`, some bars split in two; a closed one ends with a cadence."""
    degrees: list[tuple[int, ...]] = [(d,) for d in rng.choice(PROGRESSIONS[key.mode])]
    if rng.random() < 0.4 and meter == 4:
        bar = rng.choice((1, 2))
        degrees[bar] = (degrees[bar][0], rng.choice((SUPERTONIC, SUBDOMINANT, 5)))
    if closed:
        approach = (rng.choice((SUPERTONIC, SUBDOMINANT)), DOMINANT) if meter == 4 else (DOMINANT,)
        degrees[2:] = [approach, (TONIC,)]
    chords = []
    for bar, bar_degrees in enumerate(degrees):
        length = meter / len(bar_degrees)
        for i, degree in enumerate(bar_degrees):
            at = start + bar * meter + i * length
            resting = closed and bar == PHRASE_BARS - 1
            chords.append(key.chord(degree, at, length, seventh=not resting and rng.random() < sevenths))
    return Phrase(letter, start, meter, tuple(chords), closed)


def pitches_in(classes: Sequence[int] | frozenset[int], low: int, high: int) -> list[int]:
    """Lists all MIDI pitches from low to high, both included, of these pitch classes."""
    return [pitch for pitch in range(low, high + 1) if pitch % 12 in classes]


def nearest(classes: Sequence[int] | frozenset[int], target: float, low: int, high: int) -> int:
    """Returns the pitch of these classes in [low, high] closest to the target (the lower one of two)."""
    return min(pitches_in(classes, low, high), key=lambda pitch: (abs(pitch - target), pitch))


def voicings(chords: Sequence[Chord], low: int, high: int, voices: int) -> list[tuple[int, ...]]:
    """Chooses close chords of `voices` pitches in [low, high], ascending, each near the one before it.

    The cheapest of all choices: movement from the chord before (from the middle of the range for the first),
    a price for missing chord tones, for gaps over an octave and for clusters.
    """
    result: list[tuple[int, ...]] = []
    center = (low + high) / 2
    for chord in chords:
        previous = result[-1] if result else [center + 4 * (i - (voices - 1) / 2) for i in range(voices)]

        def cost(pitches: tuple[int, ...], chord=chord, previous=previous) -> float:
            movement = sum(abs(p - q) for p, q in zip(pitches, previous, strict=True))
            missing = len(set(chord.classes[:voices]) - {p % 12 for p in pitches})
            gaps = [b - a for a, b in itertools.pairwise(pitches)]
            spacing = sum(4 * (gap > 12) + 3 * (gap < 3) for gap in gaps)
            return movement + 12 * missing + spacing + 0.1 * abs(sum(pitches) / voices - center)

        result.append(min(itertools.combinations(pitches_in(chord.classes, low, high), voices), key=cost))
    return result
