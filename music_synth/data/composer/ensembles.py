"""The six kinds of pieces: who plays what in each phrase."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from music_synth.data.composer import lines, wide
from music_synth.data.composer.instruments import (
    ARPEGGIO,
    BASS,
    CHORDS,
    COLOR,
    MELODY,
    PAD,
    STROKES,
    pitch_range,
    tessitura,
)
from music_synth.data.composer.score import Part, Score, Tone
from music_synth.data.composer.theory import Key, Phrase, harmonize

FORM = "ABACABDAEC"  # the letters of a piece's phrases; the last one is always A
LEAST_PHRASES = 1


@dataclass(frozen=True)
class Plan:
    """What all parts agree on."""

    bpm: float
    meter: int
    phrases: tuple[Phrase, ...]  # with the ending as the last
    melody_seeds: dict[str, float]  # by letter: phrases of a letter share their tune

    def tune(
        self, phrase: Phrase, low: int, high: int, moods: Sequence[str] = lines.MOODS, legato: float = 0.95
    ) -> list[Tone]:
        """Writes the melody of a phrase, the same whenever its letter comes back (in another key or range: adapted)."""
        rng = random.Random(self.melody_seeds[phrase.letter])
        return lines.melody(rng, phrase, low, high, rng.choice(moods), legato)

    @property
    def end(self) -> float:
        return self.phrases[-1].end


def make_plan(
    rng: random.Random,
    seconds: float,
    bpm: tuple[float, float],
    meters: Sequence[int] = (4, 4, 3),
    sevenths: float = 0.1,
    wider: bool = False,
) -> Plan:
    """Chooses key, tempo, form and harmony of a piece of about `seconds` (whole phrases of four bars).

    wider: with any meter, and with long pauses.
    """
    meters, pauses = (wide.METERS, wide.PAUSES) if wider else (meters, (0, 0, 0, 1, 2))
    key = Key(rng.randrange(12), rng.choice(("major", "major", "minor")))
    tempo, meter = rng.uniform(*bpm), rng.choice(meters)
    beats = seconds * tempo / 60
    phrase_beats, ending_beats = 4 * meter + 0.5, float(meter)
    count = max(LEAST_PHRASES, round((beats - ending_beats) / phrase_beats))
    letters = (FORM * (count // len(FORM) + 1))[: count - 1] + "A"
    seeds = {letter: rng.random() for letter in "ABCDE-"}
    phrases, start = [], float(rng.choice((0, 1)))
    for index, letter in enumerate(letters):
        closed = index % 2 == 1 or index == count - 1
        local_key = key.relative() if letter in "BD" else key
        harmony_rng = random.Random(seeds[letter])
        phrases.append(harmonize(harmony_rng, local_key, letter, start, meter, closed, sevenths))
        start = phrases[-1].end + rng.choice(pauses) * (index < count - 1)
    phrases.append(Phrase("-", start, meter, (key.chord(0, start, ending_beats),), True, is_ending=True))
    return Plan(tempo, meter, tuple(phrases), seeds)


def make_score(rng: random.Random, plan: Plan, parts: list[Part], rubato: float) -> Score:
    """Sets tempo (with `rubato`, a share of it, and a slower end) and dynamics for the parts of a plan."""
    tempos, beat = [], 0.0
    while beat < plan.end:
        slowing = max(0.0, 1 - (plan.phrases[-1].start - beat) / (2 * plan.meter)) if rubato else 0.0
        slowing = min(1.0, slowing) * 0.22
        tempos.append((beat, plan.bpm * (1 + rng.uniform(-rubato, rubato) - slowing)))
        beat += plan.meter if rubato else plan.end
    level, dynamics = rng.uniform(74, 88), []
    for phrase in plan.phrases:
        level = min(96.0, max(66.0, level + rng.uniform(-8, 8)))
        middle = (phrase.start + phrase.end) / 2
        dynamics += [(phrase.start, level), (middle, level + rng.uniform(0, 7))]
    for part in parts:
        part.tones = [tone for tone in part.tones if tone.length > 0]
    return Score(tempos, dynamics, parts)


def piano(rng: random.Random, programs: Sequence[int], seconds: float, wider: bool) -> Score:
    """Writes a melody over broken or struck chords, both hands on one instrument, with pedal."""
    plan = make_plan(rng, seconds, (66, 126), sevenths=0.15, wider=wider)
    part = Part(programs[0], volume=112, spread=0.007)
    pedalled = programs[0] not in (6, 7) and rng.random() < 0.85
    for phrase in plan.phrases:
        shift = rng.choice((0, 0, 0, 12, -5)) if phrase.letter != "A" else 0
        low, high = 62 + shift, 81 + shift
        tune = plan.tune(phrase, low, min(high, 91))
        part.tones += [tone._replace(accent=tone.accent + 8) for tone in tune]
        if rng.random() < 0.45:
            part.tones += lines.harmonized(phrase, tune, 55)
        part.tones += _left_hand(rng, phrase)
        if pedalled:
            part.pedals += _pedalling(rng, phrase)
    if part.pedals:
        part.pedals.append((plan.end, 0))
    return make_score(rng, plan, [part], rubato=0.04)


def _left_hand(rng: random.Random, phrase: Phrase) -> list[Tone]:
    texture = rng.choice(("broken", "broken", "wide", "chords", "stride"))
    if texture == "broken":
        order = rng.choice(("alberti", "up", "up and down", "rolling"))
        return lines.broken(phrase, 43, 62, order, 0.5, ring=False)
    if texture == "wide":
        order = rng.choice(("wide", "up and down", "up"))
        return lines.broken(phrase, 48, 64, order, 0.5, ring=False, bass_low=33)
    if texture == "chords":
        pattern = rng.choice([name for name in lines.STRUMS[phrase.meter] if name in ("held", "halves", "beats")])
        chords = lines.strummed(phrase, 46, 64, 3, pattern)
        return chords + [t for t in lines.bass(rng, phrase, 33, 47, "roots") if rng.random() < 0.9]
    pattern = "backbeat" if phrase.meter == 4 else "waltz"
    return lines.strummed(phrase, 50, 66, 3, pattern) + lines.bass(rng, phrase, 33, 48, "fifths")


def _pedalling(rng: random.Random, phrase: Phrase) -> list[tuple[float, int]]:
    """Legato pedal: up just after a chord comes in, down again soon."""
    events = []
    for chord in phrase.chords:
        up = chord.start + rng.uniform(0.02, 0.08)
        events += [(up, 0), (up + rng.uniform(0.1, 0.25), rng.choice((127, 127, 100, 90)))]
    if not phrase.is_ending:
        events.append((phrase.end - 0.1, 0))
    return events


def guitar(rng: random.Random, programs: Sequence[int], seconds: float, wider: bool) -> Score:
    """Writes finger picking, strumming, or a tune over a bass."""
    plan = make_plan(rng, seconds, (76, 132), sevenths=0.25, wider=wider)
    part = Part(programs[0], volume=110, spread=0.007)
    for phrase in plan.phrases:
        texture = rng.choice(("picked", "picked", "tune", "strummed"))
        if texture == "strummed":
            pattern = rng.choice(("folk", "beats", "held"))
            part.tones += lines.strummed(phrase, 45, 69, 4, pattern, roll=rng.uniform(0.015, 0.035))
            part.tones += lines.bass(rng, phrase, 40, 52, "roots")
        elif texture == "picked":
            step = 0.5 if plan.bpm > 92 or rng.random() < 0.6 else 0.25
            order = rng.choice(("picking", "rolling", "up and down", "up"))
            part.tones += lines.broken(phrase, 52, 71, order, step, ring=True, bass_low=40)
            if rng.random() < 0.5:
                tune = plan.tune(phrase, 62, 76, ("calm", "flowing"))
                part.tones += [tone._replace(accent=tone.accent + 8) for tone in tune]
        else:
            tune = plan.tune(phrase, 59, 76)
            part.tones += [tone._replace(accent=tone.accent + 6) for tone in tune]
            part.tones += lines.harmonized(phrase, tune, 50)
            part.tones += lines.bass(rng, phrase, 40, 52, rng.choice(("roots", "fifths")))
    return make_score(rng, plan, [part], rubato=0.03)


def chamber(
    rng: random.Random, programs: Sequence[int], seconds: float, wider: bool, bpm: tuple[float, float]
) -> Score:
    """Writes for single voices, highest first: one has the tune, the last the bass, the others fill in."""
    plan = make_plan(rng, seconds, bpm, wider=wider)
    count = len(programs)
    parts = [
        Part(program, volume=104, pan=_pan(i, count), loudness=-6, spread=0.009) for i, program in enumerate(programs)
    ]
    spans = [tessitura(program, 14, 0.75 - 0.6 * i / max(1, count - 1)) for i, program in enumerate(programs)]
    for phrase in plan.phrases:
        singer = 0 if phrase.letter in "A-" else rng.randrange(count - 1)
        low, high = tessitura(programs[singer])
        tune = plan.tune(phrase, low, high)
        parts[singer].tones += [tone._replace(accent=tone.accent + 10) for tone in tune]
        style = rng.choice(lines.INNER_STYLES)
        bass_style = rng.choice(("roots", "fifths", "walking")) if style in ("held", "halves") else "fifths"
        bass_low, bass_high = tessitura(programs[-1], 17, 0.2)
        parts[-1].tones += lines.bass(rng, phrase, bass_low, bass_high, bass_style)
        others = [i for i in range(count - 1) if i != singer]
        resting = rng.choice(others) if len(others) > 1 and rng.random() < 0.25 else None
        for i, voice in zip(others, lines.inner_voices(phrase, [spans[i] for i in others]), strict=True):
            if i != resting or phrase.is_ending:
                parts[i].tones += lines.in_rhythm(phrase, voice, style, tune)
    return make_score(rng, plan, parts, rubato=0.03)


def _pan(index: int, count: int) -> int:
    return 64 if count == 1 else round(34 + 60 * index / (count - 1))


@dataclass(frozen=True)
class Style:
    """How a band plays."""

    bpm: tuple[float, float]
    grooves: tuple[str, ...]
    bass: tuple[str, ...]
    strums: tuple[str, ...]
    moods: tuple[str, ...]
    meter: int = 4
    swing: bool = False


STYLES = {
    "rock": Style((104, 140), ("rock", "pop"), ("eighths", "roots"), ("push", "beats"), ("flowing", "lively")),
    "pop": Style((88, 120), ("pop", "rock"), ("syncopated", "eighths"), ("push", "folk"), ("flowing",)),
    "disco": Style((108, 124), ("disco",), ("octaves",), ("offbeats", "charleston"), ("flowing", "calm")),
    "bossa": Style((100, 128), ("bossa", "latin"), ("syncopated",), ("charleston", "offbeats"), ("calm", "flowing")),
    "funk": Style((90, 106), ("funk",), ("syncopated", "eighths"), ("offbeats", "backbeat"), ("lively", "flowing")),
    "ballad": Style((66, 84), ("ballad", "pop"), ("fifths", "roots"), ("halves", "held"), ("flowing", "calm")),
    "swing": Style((112, 148), ("swing",), ("walking",), ("charleston", "backbeat"), ("flowing", "lively"), swing=True),
    "waltz": Style((110, 150), ("waltz",), ("roots", "fifths"), ("waltz",), ("flowing", "calm"), meter=3),
}  # fmt: skip


GROOVES = {  # of each meter, where the style does not say
    2: ("two",), 3: ("waltz",), 4: ("pop", "bossa", "march", "ballad"), 5: ("five",), 6: ("six",), 7: ("seven",),
}  # fmt: skip


def band(rng: random.Random, programs: Sequence[int], seconds: float, wider: bool) -> Score:
    """Drums, bass, chords, pad and lead; programs are (lead, chords, pad, bass)."""
    style = STYLES[rng.choice(sorted(STYLES))]
    plan = make_plan(rng, seconds, style.bpm, (style.meter,), 0.4 if style.swing else 0.15, wider)
    lead, chords, pad, bass = (Part(p, pan=x) for p, x in zip(programs, (70, 44, 84, 64), strict=True))
    kit = Part(0, is_drum=True, volume=92, spread=0.004)
    lead.volume, lead.loudness, chords.volume, pad.volume, pad.loudness = 104, 8, 88, 78, -10
    groove, bass_style, strum = (rng.choice(x) for x in (style.grooves, style.bass, style.strums))
    if plan.meter != style.meter:
        groove, strum = rng.choice(GROOVES[plan.meter]), rng.choice(sorted(lines.STRUMS[plan.meter]))
    intro = rng.random() < 0.4
    for index, phrase in enumerate(plan.phrases):
        full = index > 0 or not intro
        kit.tones += lines.drums(rng, phrase, groove, crash=index > 0 and rng.random() < 0.6)
        bass.tones += lines.bass(rng, phrase, *pitch_range(programs[3]), bass_style)
        low, high = _middle(programs[1])
        roll = 0.02 if 24 <= programs[1] < 32 else 0.0
        if full or rng.random() < 0.5:
            chords.tones += lines.strummed(phrase, low, high, 3, strum, roll)
        if full and rng.random() < 0.55:
            low, high = _middle(programs[2])
            pad.tones += lines.strummed(phrase, low, high, 3, "held")
        if full:
            tune = plan.tune(phrase, *tessitura(programs[0]), style.moods, legato=0.9)
            lead.tones += tune
            if rng.random() < 0.2:
                lead.tones += lines.harmonized(phrase, tune, pitch_range(programs[0])[0])
    parts = [lead, chords, pad, bass, kit]
    if style.swing:
        for part in parts[:-1]:
            part.tones = lines.swung(part.tones)
    return make_score(rng, plan, parts, rubato=0.0)


def _middle(program: int) -> tuple[int, int]:
    """Two octaves for chords, around middle C where the instrument has them."""
    low, high = pitch_range(program)
    low = max(low, min(52, high - 22))
    return low, min(high, low + 22)


def mixed(rng: random.Random, programs: Sequence[int], seconds: float, wider: bool) -> Score:
    """Instruments of many families take turns in the roles they are good for; some pieces have drums."""
    plan = make_plan(rng, seconds, (72, 128), sevenths=0.2, wider=wider)
    parts = [Part(p, volume=100, pan=_pan(i, len(programs)), spread=0.008) for i, p in enumerate(programs)]
    kit = Part(0, is_drum=True, volume=84, spread=0.004)
    groove = rng.choice(GROOVES[plan.meter]) if plan.meter == 4 else GROOVES[plan.meter][0]
    drummed = rng.random() < 0.35
    turns = {role: _Turns(rng, [p for p in parts if p.program in able]) for role, able in ROLES.items()}
    for phrase in plan.phrases:
        busy: list[Part] = []
        tune: list[Tone] = []
        roles = ["melody", "bass", *_accompaniment(rng)]
        if phrase.is_ending:
            roles = list(ROLES)
        for role in roles:
            part = turns[role].take(busy)
            if part is None:
                continue
            busy.append(part)
            if role == "melody":
                tune = plan.tune(phrase, *tessitura(part.program))
                part.tones += [tone._replace(accent=tone.accent + 8) for tone in tune]
            else:
                part.tones += _accompany(role, rng, phrase, part.program)
        if drummed and (phrase.letter != "B" or phrase.is_ending):
            kit.tones += lines.drums(rng, phrase, groove, crash=False)
    return make_score(rng, plan, [*parts, kit], rubato=0.0 if drummed else 0.03)


def _accompaniment(rng: random.Random) -> list[str]:
    roles = rng.choice((["pad", "arpeggio"], ["chords", "pad"], ["chords", "arpeggio"], ["chords", "counter"]))
    extra = [role for role, chance in (("counter", 0.35), ("strokes", 0.5), ("color", 0.3)) if rng.random() < chance]
    return roles + [role for role in extra if role not in roles]


class _Turns:
    """Gives a role to the able part that has waited longest."""

    def __init__(self, rng: random.Random, parts: list[Part]):
        self.parts = list(parts)
        rng.shuffle(self.parts)

    def take(self, busy: list[Part]) -> Part | None:
        free = [part for part in self.parts if not any(part is other for other in busy)]
        free.sort(key=lambda part: bool(part.tones))  # first those that have not been heard at all
        if not free:
            return None
        self.parts.remove(free[0])
        self.parts.append(free[0])
        return free[0]


ROLES = {
    "melody": MELODY, "bass": BASS, "strokes": STROKES, "color": COLOR, "pad": PAD, "arpeggio": ARPEGGIO,
    "chords": CHORDS, "counter": MELODY,
}  # fmt: skip


def _accompany(role: str, rng: random.Random, phrase: Phrase, program: int) -> list[Tone]:
    """Writes what an instrument plays over a phrase in a role of ROLES other than the melody."""
    if role == "bass":
        low, high = tessitura(program, 19, 0.1)
        return lines.bass(rng, phrase, low, high, rng.choice(("roots", "fifths", "walking", "eighths", "syncopated")))
    if role == "chords":
        pattern = rng.choice(sorted(lines.STRUMS[phrase.meter]))
        return lines.strummed(phrase, *_middle(program), 3, pattern, roll=0.02 if 24 <= program < 32 else 0.0)
    if role == "pad":
        return [tone._replace(accent=-8) for tone in lines.strummed(phrase, *_middle(program), 3, "held")]
    if role == "arpeggio":
        low, high = tessitura(program, 24, 0.5)
        order, step = rng.choice(sorted(lines.BROKEN)), rng.choice((0.5, 0.5, 1.0))
        return lines.broken(phrase, low, high, order, step, ring=False)
    if role == "counter":
        return lines.melody(rng, phrase, *tessitura(program, 14, 0.4), "calm")
    write = lines.strokes if role == "strokes" else lines.color
    return write(rng, phrase, *tessitura(program, 12, 0.5))


ENSEMBLES: dict[str, Callable[[random.Random, Sequence[int], float, bool], Score]] = {
    "piano": piano, "guitar": guitar,
    "strings": functools.partial(chamber, bpm=(60, 120)),
    "winds": functools.partial(chamber, bpm=(72, 132)), "band": band, "mixed": mixed,
}  # fmt: skip
