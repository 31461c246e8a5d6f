"""What an instrument plays over a phrase: melody, bass, chords, broken chords, inner voices, drums.

Every player takes a generator, a phrase and a range of pitches, and returns tones. The same generator state
over another phrase gives the same idea over other chords.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from music_synth.data.composer.score import Tone
from music_synth.data.composer.theory import PHRASE_BARS, Chord, Phrase, nearest, pitches_in, voicings

# One bar of melody rhythm, lengths in beats; a negative length is a rest. By meter and mood.
RHYTHMS: dict[int, dict[str, tuple[tuple[float, ...], ...]]] = {
    4: {
        "calm": ((2, 2), (3, 1), (2, 1, 1), (1, 1, 2), (-1, 1, 2), (4,), (1.5, 0.5, 2)),
        "flowing": (
            (1, 1, 1, 1), (1.5, 0.5, 1, 1), (2, 1, 0.5, 0.5), (1, 0.5, 0.5, 2), (0.5, 0.5, 1, 0.5, 0.5, 1),
            (-0.5, 0.5, 1, 1, 1), (1, 0.5, 0.5, 1, 1), (1.5, 0.5, 1.5, 0.5), (1, -1, 1, 1),
        ),
        "lively": (
            (0.5, 0.5, 0.5, 0.5, 1, 1), (0.5,) * 8, (0.75, 0.25, 0.5, 0.5, 1, 1), (1, 0.5, 0.5, 0.5, 0.5, 1),
            (-0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1), (0.25, 0.25, 0.5, 0.25, 0.25, 0.5, 1, 1),
            (0.5, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1), (0.5, 1, 0.5, 0.5, 1, 0.5),
        ),
    },
    3: {
        "calm": ((3,), (2, 1), (1, 2), (-1, 2), (1.5, 1.5)),
        "flowing": ((1, 1, 1), (1.5, 0.5, 1), (2, 0.5, 0.5), (1, 0.5, 0.5, 1), (0.5, 0.5, 1, 1), (-1, 1, 1)),
        "lively": (
            (0.5,) * 6, (0.5, 0.5, 1, 0.5, 0.5), (0.75, 0.25, 1, 1), (-0.5, 0.5, 0.5, 0.5, 1),
            (0.25, 0.25, 0.5, 0.5, 0.5, 1),
        ),
    },
}  # fmt: skip
LAST_BARS: dict[int, tuple[tuple[float, ...], ...]] = {
    4: ((2, -2), (3, -1), (1, 2, -1), (2.5, -1.5)),
    3: ((2, -1), (1.5, -1.5), (1, 1, -1)),
}
MOODS = ("calm", "flowing", "flowing", "lively")  # as often as they stand here

# Beats of a bar on which a chord is struck, with lengths.
STRUMS = {
    4: {
        "held": ((0, 4),),
        "halves": ((0, 2), (2, 2)),
        "beats": ((0, 1), (1, 1), (2, 1), (3, 1)),
        "offbeats": ((0.5, 0.4), (1.5, 0.4), (2.5, 0.4), (3.5, 0.4)),
        "backbeat": ((1, 0.8), (3, 0.8)),
        "charleston": ((0, 1.2), (1.5, 0.6), (3, 0.8)),
        "folk": ((0, 1), (1, 0.5), (1.5, 0.5), (2.5, 0.5), (3, 0.5), (3.5, 0.5)),
        "push": ((0, 1.5), (1.5, 1.5), (3, 1)),
    },
    3: {
        "held": ((0, 3),),
        "waltz": ((1, 0.8), (2, 0.8)),
        "beats": ((0, 1), (1, 1), (2, 1)),
        "folk": ((0, 1), (1, 0.5), (1.5, 0.5), (2, 0.5), (2.5, 0.5)),
    },
}
# Meters of two, five, six and seven beats, the last three put together of shorter ones.
RHYTHMS[2] = {
    "calm": ((2,), (1, 1)),
    "flowing": ((1, 1), (1.5, 0.5), (1, 0.5, 0.5)),
    "lively": ((0.5,) * 4, (0.75, 0.25, 1)),
}
LAST_BARS[2] = ((1, -1), (1.5, -0.5))
STRUMS[2] = {
    "held": ((0, 2),), "beats": ((0, 1), (1, 1)), "folk": ((0, 1), (1, 0.5), (1.5, 0.5)), "waltz": ((1, 0.8),),
}  # fmt: skip
for _first, _second in ((3, 2), (3, 3), (4, 3)):
    _meter = _first + _second
    RHYTHMS[_meter] = {
        mood: tuple(a + b for a, b in itertools.product(bars, RHYTHMS[_second][mood]))
        for mood, bars in RHYTHMS[_first].items()
    }
    LAST_BARS[_meter] = tuple((_first, *bar) for bar in LAST_BARS[_second])
    STRUMS[_meter] = {
        name: (*STRUMS[_first].get(name, ((1, 0.8),)), *((_first + at, length) for at, length in hits))
        for name, hits in STRUMS[_second].items()
    } | {"held": ((0, _meter),)}
# Orders in which the tones of a chord are broken, as indices from the lowest (0 is the bass).
BROKEN = {
    "alberti": (0, 2, 1, 2),
    "up": (0, 1, 2, 3),
    "up and down": (0, 1, 2, 3, 2, 1),
    "rolling": (0, 2, 1, 3, 1, 2),
    "picking": (0, 3, 1, 2, 0, 3, 2, 1),
    "wide": (0, 2, 3, 1),
}

# Sixteen sixteenths of 4/4 (twelve of 3/4 and of swing, there as triplets): x struck, X accented.
GROOVES = {
    "rock": {36: "X.......X.x.....", 38: "....X.......X...", 42: "X.x.X.x.X.x.X.x."},
    "pop": {36: "X.....x.X.......", 38: "....X.......X...", 42: "X.x.x.x.X.x.x.x."},
    "disco": {36: "X...X...X...X...", 38: "....X.......X...", 42: "X...X...X...X...", 46: "..x...x...x...x."},
    "bossa": {36: "X..xX..xX..xX..x", 37: "x..x..x...x..x..", 42: "x.x.x.x.x.x.x.x."},
    "funk": {36: "X.x...x..x......", 38: "....X..x.x..X...", 42: "X.xxX.xxX.xxX.xx"},
    "ballad": {36: "X.........x.....", 37: "....X.......X...", 51: "X.x.x.x.X.x.x.x."},
    "latin": {36: "X.....x.X.....x.", 56: "X...x...X...x...", 63: "x..x..x..x..x.x.", 70: "x.x.x.x.x.x.x.x."},
    "march": {36: "X.......X.......", 38: "..x.X.xx..x.X.xx", 54: "....x.......x..."},
    "swing": {51: "X..X.xX..X.x", 44: "...x.....x..", 36: "x.....x....."},
    "waltz": {36: "X...........", 38: "....x...x...", 42: "x.x.x.x.x.x."},
    "two": {36: "X...x...", 38: "....X...", 42: "x.x.x.x."},
    "five": {36: "X...........x.......", 38: "....x...x.......X...", 51: "x...x...x...x...x..."},
    "six": {36: "X...........X.......x...", 38: "............X...........", 42: "X...x...x...X...x...x..."},
    "seven": {
        36: "X.......x.......X...........",
        38: "....X.......X.......X.......",
        42: "x.x.x.x.x.x.x.x.X...X...X...",
    },
}
CRASH, KICK, SNARE, TOMS = 49, 36, 38, (50, 48, 47, 45, 43, 41)


def _spread(rng: random.Random, candidates: Sequence[int], target: float, width: float, avoid: int | None) -> int:
    """A pitch drawn with weights that fall off from the target; the one to avoid is less likely."""
    weights = [math.exp(-(((c - target) / width) ** 2)) * (0.3 if c == avoid else 1.0) + 1e-6 for c in candidates]
    return rng.choices(candidates, weights)[0]


def melody_rhythm(rng: random.Random, phrase: Phrase, mood: str) -> list[tuple[float, float]]:
    """Chooses (beat, length) of the tones of a phrase: bars a b a' c, where c comes to rest."""
    bars = RHYTHMS[phrase.meter][mood]
    first, second = rng.choice(bars), rng.choice(bars)
    third = first if rng.random() < 0.7 else rng.choice(bars)
    onsets = []
    for bar, lengths in enumerate((first, second, third, rng.choice(LAST_BARS[phrase.meter]))):
        beat = phrase.start + bar * phrase.meter
        for length in lengths:
            if length > 0:
                onsets.append((beat, length))
            beat += abs(length)
    return onsets


def melody(rng: random.Random, phrase: Phrase, low: int, high: int, mood: str, legato: float = 0.95) -> list[Tone]:
    """Writes a tune: chord tones on strong beats and long tones, steps of the scale between them."""
    center = (low + high) / 2
    if phrase.is_ending:
        return [Tone(phrase.start, phrase.end - phrase.start, nearest(phrase.chords[0].classes[:1], center, low, high))]
    tones, pitch = [], center + rng.uniform(-3, 3)
    direction = rng.choice((-1, 1))
    onsets = melody_rhythm(rng, phrase, mood)
    for index, (beat, length) in enumerate(onsets):
        chord = phrase.chord_at(beat)
        strong = (beat - phrase.start) % phrase.meter in (0, 2) or length >= 1.5
        if rng.random() < 0.3:
            direction = -direction
        last = index == len(onsets) - 1
        if last and phrase.closed:
            new = nearest(chord.classes[:1], pitch, low, high)
        elif strong:
            target = pitch + 2 * direction + 0.2 * (center - pitch)
            new = _spread(rng, pitches_in(chord.classes, low, high), target, 4.0, avoid=round(pitch))
        else:
            target = pitch + 2 * direction + 0.1 * (center - pitch)
            new = _spread(rng, pitches_in(chord.scale, low, high), target, 2.0, avoid=round(pitch))
        tones.append(Tone(beat, length * legato, new, accent=4 if strong else 0))
        pitch = new
    return tones


def harmonized(phrase: Phrase, tones: Sequence[Tone], low: int) -> list[Tone]:
    """Writes a second voice a chord tone (three to nine semitones) below the long tones of a melody."""
    below = []
    for beat, length, pitch, accent in tones:
        candidates = [p for p in pitches_in(phrase.chord_at(beat).classes, low, pitch - 3) if p >= pitch - 9]
        if length >= 0.9 and candidates:
            below.append(Tone(beat, length, candidates[-1], accent - 4))
    return below


def bass(rng: random.Random, phrase: Phrase, low: int, high: int, style: str) -> list[Tone]:
    """Writes a bass line: roots, fifths, walking, eighths, syncopated or octaves; the root where the chord changes."""
    tones, pitch = [], (low + high) / 2 - 2
    for chord, following in itertools.zip_longest(phrase.chords, phrase.chords[1:]):
        root = nearest(chord.classes[:1], pitch, low, high)
        fifth = nearest(chord.classes[2:3], root + 1, low, high)
        octave = root + 12 if root + 12 <= high else root
        start, length = chord.start, chord.length
        if phrase.is_ending or style == "roots" or length < 2:
            tones.append(Tone(start, length * 0.95, root, 3))
        elif style == "fifths":
            half = 2 if length == 4 else length - 1
            tones += [Tone(start, half * 0.9, root, 3), Tone(start + half, (length - half) * 0.9, fifth)]
        elif style == "walking":
            target = nearest(following.classes[:1], root, low, high) if following else root
            walk = [root, *(nearest(chord.classes, root + rng.choice((-5, -3, 3, 4, 7)), low, high) for _ in range(9))]
            walk[int(length) - 1] = nearest(chord.scale, target + rng.choice((-2, -1, 1, 2)), low, high)
            tones += [Tone(start + i, 0.9, walk[i], 3 * (i == 0)) for i in range(int(length))]
        elif style == "eighths":
            for i in range(int(2 * length)):
                tones.append(
                    Tone(start + i / 2, 0.45, fifth if i == 6 and rng.random() < 0.3 else root, 3 * (i % 2 == 0))
                )
        elif style == "octaves":
            for i in range(int(2 * length)):
                tones.append(Tone(start + i / 2, 0.4, octave if i % 2 else root, 3 * (i % 2 == 0)))
        else:
            cut = 1.5 if length >= 2 else length
            tones += [Tone(start, cut * 0.9, root, 3), Tone(start + cut, (2 - cut) * 0.9, root)]
            if length > 2:
                tones += [Tone(start + 2.5, 0.45, fifth), Tone(start + 3, 0.9, octave)][: 1 + (length > 3)]
        pitch = 0.7 * root + 0.3 * ((low + high) / 2 - 2)
    return tones


def _bars(phrase: Phrase) -> list[float]:
    return [phrase.start + bar * phrase.meter for bar in range(PHRASE_BARS)]


def strummed(phrase: Phrase, low: int, high: int, voices: int, pattern: str, roll: float = 0.0) -> list[Tone]:
    """Chords in a pattern of `STRUMS`; `roll` is the delay from string to string in beats."""
    chosen = dict(zip((c.start for c in phrase.chords), voicings(phrase.chords, low, high, voices), strict=True))
    if phrase.is_ending:
        hits = [(phrase.start, phrase.end - phrase.start)]
    elif pattern == "held":
        hits = [(c.start, c.length * 0.97) for c in phrase.chords]
    else:
        hits = [(bar + at, length) for bar in _bars(phrase) for at, length in STRUMS[phrase.meter][pattern]]
    tones = []
    for stroke, (beat, length) in enumerate(hits):
        chord = phrase.chord_at(beat)
        pitches = chosen[chord.start]
        upstroke = roll > 0 and (beat * 2) % 2 == 1
        for i, pitch in enumerate(reversed(pitches) if upstroke else pitches):
            end = min(beat + length * 0.95, max(chord.end, beat + 0.3))
            tones.append(Tone(beat + i * roll, end - beat - i * roll, pitch, 3 * (stroke % 2 == 0) - 4 * upstroke))
    return tones


def broken(
    phrase: Phrase, low: int, high: int, order: str, step: float, ring: bool, bass_low: int | None = None
) -> list[Tone]:
    """Writes a chord tone every `step` beats in an order of `BROKEN`; with `ring` each sounds until the chord changes.

    With `bass_low`, index 0 is the root in the octave from there; else the lowest tone of the chord.
    """
    chosen = voicings(phrase.chords, low, high, 3 if bass_low is not None else 4)
    tones = []
    for chord, pitches in zip(phrase.chords, chosen, strict=True):
        if bass_low is not None:
            pitches = (nearest(chord.classes[:1], bass_low + 6, bass_low, bass_low + 11), *pitches)
        if phrase.is_ending:
            tones += [Tone(chord.start + 0.12 * i, chord.length - 0.12 * i, p) for i, p in enumerate(pitches)]
            continue
        pattern = BROKEN[order]
        for i in range(round(chord.length / step)):
            beat, pitch = chord.start + i * step, pitches[pattern[i % len(pattern)]]
            length = chord.end - beat - 0.05 if ring else step * 0.95
            tones.append(Tone(beat, length, pitch, 4 * (i == 0)))
    return tones


def inner_voices(phrase: Phrase, ranges: Sequence[tuple[int, int]]) -> list[list[tuple[Chord, int]]]:
    """Writes for each range (from high to low) a pitch for every chord: small steps, no doubled tone, no crossing."""
    voices: list[list[tuple[Chord, int]]] = [[] for _ in ranges]
    for chord in phrase.chords:
        taken: list[int] = []
        for voice, (low, high) in zip(voices, ranges, strict=True):
            before = voice[-1][1] if voice else (low + high) / 2

            def cost(pitch: int, before=before, taken=taken) -> float:
                doubled = sum(pitch % 12 == other % 12 for other in taken)
                crossing = sum(pitch >= other for other in taken)
                return abs(pitch - before) + 5 * doubled + 8 * crossing

            pitch = min(pitches_in(chord.classes, low, high), key=cost)
            taken.append(pitch)
            voice.append((chord, pitch))
    return voices


def in_rhythm(phrase: Phrase, voice: Sequence[tuple[Chord, int]], style: str, onsets: Sequence[Tone]) -> list[Tone]:
    """Writes an inner voice held, in halves, pulsing, off the beat, or moving with the melody's onsets."""
    tones = []
    for chord, pitch in voice:
        start, length = chord.start, chord.length
        if phrase.is_ending or style == "held":
            tones.append(Tone(start, length * 0.97, pitch))
        elif style == "together":
            for onset in onsets:
                if start - 1e-6 <= onset.beat < chord.end - 1e-6:
                    tones.append(Tone(onset.beat, min(onset.length, chord.end - onset.beat), pitch))
        elif style == "pulse":
            tones += [Tone(start + i / 2, 0.35, pitch, 3 * (i % 2 == 0)) for i in range(int(2 * length))]
        elif style == "off the beat":
            tones += [Tone(start + i + 0.5, 0.4, pitch) for i in range(int(length))]
        else:
            tones += [Tone(start + i, min(2.0, length - i) * 0.95, pitch) for i in range(0, int(length), 2)]
    return tones


INNER_STYLES = ("held", "together", "pulse", "off the beat", "halves")


def strokes(rng: random.Random, phrase: Phrase, low: int, high: int) -> list[Tone]:
    """Writes for timpani, taiko, wood block: a rhythm of their own on the root and the fifth."""
    if phrase.is_ending:
        return [Tone(phrase.start, 1.0, nearest(phrase.chords[0].classes[:1], low, low, high), 6)]
    pattern = rng.choice(((0,), (0, 2), (0, 1.5, 2), (0, 2, 2.5), (0, 0.5, 1)))
    tones = []
    for bar in _bars(phrase):
        for at in pattern:
            if at < phrase.meter:
                chord = phrase.chord_at(bar + at)
                pitch = nearest(chord.classes[: 1 + 2 * (at > 0) : 2], (low + high) / 2, low, high)
                tones.append(Tone(bar + at, 0.6, pitch, 4 * (at == 0)))
    return tones


def color(rng: random.Random, phrase: Phrase, low: int, high: int) -> list[Tone]:
    """Writes a sound effect: one or two long tones in a phrase."""
    bars = rng.sample(_bars(phrase), 1 if phrase.is_ending else rng.choice((1, 2)))
    if phrase.is_ending:
        bars = [phrase.start]
    return [Tone(bar, 2.0, rng.choice(pitches_in(phrase.chord_at(bar).classes, low, high))) for bar in bars]


def drums(rng: random.Random, phrase: Phrase, groove: str, crash: bool) -> list[Tone]:
    """Writes a groove of `GROOVES` for four bars; the last may end in a fill, the first begin with a crash."""
    if phrase.is_ending:
        return [Tone(phrase.start, 0.2, KICK, 6), Tone(phrase.start, 0.2, CRASH, 6)]
    tones = []
    if crash:
        tones.append(Tone(phrase.start, 0.2, CRASH, 5))
    fill = rng.random() < 0.5
    for bar in range(PHRASE_BARS):
        start = phrase.start + bar * phrase.meter
        filled = phrase.meter - 1 if fill and bar == PHRASE_BARS - 1 else phrase.meter
        for pitch, line in GROOVES[groove].items():
            for i, stroke in enumerate(line):
                at = i * phrase.meter / len(line)
                if stroke != "." and at < filled:
                    tones.append(Tone(start + at, 0.2, pitch, 6 if stroke == "X" else -4))
        if filled < phrase.meter:
            toms = rng.choice(((SNARE,) * 4, TOMS[:4], TOMS[1:5], (SNARE, SNARE, TOMS[2], TOMS[4])))
            tones += [Tone(start + filled + i / 4, 0.2, pitch, 2 * i) for i, pitch in enumerate(toms)]
    return tones


def swung(tones: Sequence[Tone]) -> list[Tone]:
    """Turns straight eighths into swing: what falls on the half of a beat comes at two thirds."""
    return [tone._replace(beat=tone.beat + 1 / 6) if abs(tone.beat % 1 - 0.5) < 1e-6 else tone for tone in tones]
