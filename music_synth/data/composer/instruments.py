"""The General MIDI programs: comfortable ranges, and what an instrument is good for."""

from __future__ import annotations

FAMILY_RANGES = (  # eight programs each; MIDI pitches from, to
    (36, 88),  # 0 piano
    (60, 88),  # 8 chromatic percussion
    (43, 79),  # 16 organ
    (40, 76),  # 24 guitar
    (28, 50),  # 32 bass
    (40, 84),  # 40 strings
    (43, 81),  # 48 ensemble
    (46, 77),  # 56 brass
    (50, 81),  # 64 reed
    (60, 86),  # 72 pipe
    (50, 81),  # 80 synth lead
    (46, 77),  # 88 synth pad
    (50, 81),  # 96 synth effects
    (50, 79),  # 104 ethnic
    (50, 74),  # 112 percussive
    (50, 70),  # 120 sound effects
)
RANGES = {
    9: (72, 96), 10: (64, 91), 11: (53, 84), 12: (48, 81), 13: (65, 91), 14: (60, 77), 15: (50, 81),
    40: (57, 88), 41: (50, 77), 42: (38, 67), 43: (29, 52), 46: (43, 88), 47: (41, 55),
    52: (50, 76), 53: (50, 76), 54: (50, 76), 55: (50, 70),
    56: (56, 80), 57: (41, 67), 58: (30, 53), 59: (56, 80), 60: (43, 72),
    64: (58, 82), 65: (51, 78), 66: (45, 72), 67: (38, 65), 68: (59, 84), 69: (53, 77), 70: (36, 65), 71: (52, 82),
    72: (74, 96), 73: (61, 88), 76: (56, 80), 77: (56, 80),
    112: (62, 84), 113: (60, 77), 114: (53, 81), 115: (60, 77), 116: (40, 57), 117: (41, 60), 118: (40, 57),
    119: (55, 65),
}  # fmt: skip

MELODY = frozenset(
    [0, 4, 9, 11, 12, 13, 16, 18, 21, 22, 23, 26, 27, 29, 30, 31, 40, 41, 42, 52, 53, 56, 57, 59, 60, 61]
    + [*range(64, 88), 106, 107, 109, 110, 111, 114]
)
PAD = frozenset(
    [16, 17, 19, 20, 21, 23, 44, 48, 49, 50, 51, 52, 53, 54, 60, 61, 62, 63, *range(88, 96), 97, 99, 101, 102]
)
CHORDS = frozenset([*range(0, 8), 11, 16, 17, 18, 21, *range(24, 31), 45, 62, 63, 90, 98, 100, 103, 105])
ARPEGGIO = frozenset([*range(0, 16), *range(24, 28), 45, 46, *range(96, 109), 112, 114])
BASS = frozenset([*range(32, 40), 42, 43, 57, 58, 67, 70, 87])
STROKES = frozenset([47, 55, 113, 115, 116, 117, 118])
COLOR = frozenset(range(119, 128))


def pitch_range(program: int) -> tuple[int, int]:
    """Returns the lowest and highest MIDI pitch to write for a program."""
    return RANGES.get(program, FAMILY_RANGES[program // 8])


def tessitura(program: int, width: int = 17, height: float = 0.7) -> tuple[int, int]:
    """Returns a part of the range `width` semitones wide, at a height from 0 (bottom) to 1 (top): where a tune lies."""
    low, high = pitch_range(program)
    width = min(width, high - low)
    start = low + round((high - low - width) * height)
    return start, start + width
