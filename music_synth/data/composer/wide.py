"""A wider composer: whatever the six kinds write is played louder, softer, thinner, by others, at changing speed.

Music that people put into MIDI files has the whole range of velocities, channel volumes and expression, long silences,
sparse and crowded passages, every program and drum, and tempi that change. `widened` gives a score that. Meters of five
to seven beats and long pauses come from the kinds themselves.
"""

from __future__ import annotations

import collections
import dataclasses
import random

from music_synth.data.composer.instruments import pitch_range
from music_synth.data.composer.score import Part, Score, Tone
from music_synth.midi.players import EXPRESSION, VOLUME

METERS = (4, 4, 4, 3, 3, 2, 5, 6, 7)
PAUSES = (0, 0, 0, 0, 1, 2, 4, 8, 12)  # beats between phrases
VELOCITIES = (4, 127)
PACES = (0.65, 1.5)  # of the tempo that a kind would choose
BLOCK = 16  # beats: about a phrase
SUSTAINED = frozenset([*range(16, 24), *range(40, 46), *range(48, 80), *range(80, 96), 109, 110, 111])
MOST_MELODIC = 15  # channels beside the drums'
KITS = (  # what strikes may be exchanged for one another: bass drums, snares, cymbals and high percussion, toms, hands
    (35, 36), (37, 38, 39, 40), (42, 44, 46, 51, 53, 54, 59, 69, 70, 73, 80, 81), (49, 52, 55, 57),
    (41, 43, 45, 47, 48, 50), (56, 58, 60, 61, 62, 63, 64, 65, 66, 67, 68, 71, 72, 74, 75, 76, 77, 78, 79),
)  # fmt: skip


def widened(score: Score, rng: random.Random, pace: float) -> Score:
    """Returns the score with a wider performance; its tempi are multiplied by `pace`."""
    end = max((tone.beat + tone.length for part in score.parts for tone in part.tones), default=0.0)
    parts = [part for part in score.parts if part.tones]
    density = rng.choice(("sparse", "as written", "as written", "crowded"))
    for part in parts:
        _recast(part, rng)
        if density == "sparse" or (density != "crowded" and len(parts) > 1 and rng.random() < 0.3):
            _thin(part, rng, end, rest=0.35 if len(parts) > 1 else 0.15)
    if density == "crowded":
        melodic = [part for part in parts if not part.is_drum]
        parts += [_doubled(part, rng) for part in melodic[: MOST_MELODIC - len(melodic)]]
        for part in parts:
            part.tones = _repeated(part.tones)
    for part in parts:
        _mix(part, rng, end)
    level, contrast = rng.uniform(34, 112), rng.uniform(0.5, 3.0)
    mean = sum(velocity for _, velocity in score.dynamics) / len(score.dynamics)
    dynamics = [(beat, level + contrast * (velocity - mean)) for beat, velocity in score.dynamics]
    return Score(_tempi(score, rng, pace), dynamics, parts, VELOCITIES)


def _tempi(score: Score, rng: random.Random, pace: float) -> list[tuple[float, float]]:
    """Multiplies the tempi by `pace`, and in half of the pieces lets a new section go slower or faster."""
    changing, tempi, factor, next_section = rng.random() < 0.5, [], 1.0, float(BLOCK)
    sections = [beat for beat, _ in score.dynamics[2::2]] if changing else []  # phrases begin there
    beats = sorted({beat for beat, _ in score.tempos} | set(sections))
    for beat in beats:
        if beat in sections and beat >= next_section and rng.random() < 0.6:
            factor, next_section = rng.uniform(0.75, 1.35), beat + BLOCK
        bpm = next(bpm for start, bpm in reversed(score.tempos) if start <= beat)
        tempi.append((beat, bpm * pace * factor))
    return tempi


def _recast(part: Part, rng: random.Random) -> None:
    """Gives many parts another program of their family, some any program; of drums, other strokes."""
    if part.is_drum:
        kits = [{stroke: rng.choice(group) for group in KITS for stroke in group} for _ in range(6)]
        kits += [{}] * 3  # as written
        of_section: dict[float, dict[int, int]] = collections.defaultdict(lambda: rng.choice(kits))
        part.tones = [
            tone._replace(pitch=of_section[tone.beat // (2 * BLOCK)].get(tone.pitch, tone.pitch)) for tone in part.tones
        ]
        return
    chance = rng.random()
    if chance < 0.4:
        part.program = part.program // 8 * 8 + rng.randrange(8)
    elif chance < 0.65:
        part.program = rng.randrange(128)
    part.tones = _within(part.tones, part.program)


def _within(tones: list[Tone], program: int) -> list[Tone]:
    """Moves tones by octaves into the range of a program."""
    low, high = pitch_range(program)

    def fitted(pitch: int) -> int:
        pitch += 12 * max(0, -(-(low - pitch) // 12))
        return pitch - 12 * max(0, -(-(pitch - high) // 12))

    return [tone._replace(pitch=fitted(tone.pitch)) for tone in tones]


def _thin(part: Part, rng: random.Random, end: float, rest: float) -> None:
    """Leaves out whole blocks, and of the others in part some tones; the last block stays."""
    silent = {block for block in range(int(end // BLOCK)) if rng.random() < rest}
    kept = rng.choice((1.0, 0.8, 0.5))
    part.tones = [
        tone for tone in part.tones if int(tone.beat // BLOCK) not in silent and rng.random() < kept
    ] or part.tones[:1]


def _doubled(part: Part, rng: random.Random) -> Part:
    """Makes another instrument play the same, an octave higher, lower, or at pitch."""
    other = dataclasses.replace(part, program=rng.randrange(128), pedals=list(part.pedals))
    shift = rng.choice((-12, 0, 12))
    other.tones = _within([tone._replace(pitch=tone.pitch + shift) for tone in part.tones], other.program)
    return other


def _repeated(tones: list[Tone]) -> list[Tone]:
    """Plays each tone of half a beat or more twice in its time."""
    halves = [tone._replace(length=tone.length / 2) if tone.length >= 0.5 else tone for tone in tones]
    return halves + [half._replace(beat=half.beat + half.length) for half in halves if half not in tones]


def _mix(part: Part, rng: random.Random, end: float) -> None:
    """Sets the channel's volume and expression; volume may change later, and expression swell and fade."""
    part.volume = rng.choice((100, rng.randint(40, 127), rng.randint(70, 127)))
    part.loudness += rng.randint(-12, 12)
    if rng.random() < 0.3:
        part.controls.append((rng.uniform(0, end), VOLUME, rng.randint(45, 127)))
    if rng.random() < (0.6 if part.program in SUSTAINED and not part.is_drum else 0.2):
        start = rng.randint(50, 127)
        beat = 0.0
        while beat < end:
            goal, length = rng.randint(35, 127), rng.choice((4, 8, 16))
            steps = length * 2 if rng.random() < 0.7 else 1  # or all at once
            part.controls += [
                (beat + length * step / steps, EXPRESSION, round(start + (goal - start) * (step + 1) / steps))
                for step in range(steps)
            ]
            start, beat = goal, beat + length
