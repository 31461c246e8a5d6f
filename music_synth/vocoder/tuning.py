"""How far music is out of tune with its notes, read off the mel as it comes.

Partials that lie elsewhere than the source's lift the filters next to those that the source lifts. So the mel of the
source is told for a few tunings, and the one that has the fine structure of the mel is right: on tones 20 cents sharp
the correlation peaks within 2 cents of the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from music_synth.audio.mel import FRAME_LENGTH, FRAME_RATE, MIN_LOG_MEL, NUM_MELS, SAMPLE_RATE, log_mel
from music_synth.midi.notes import Note
from music_synth.vocoder.source import RELEASE, RELEASE_SECONDS, SOURCE_FLOOR, tone

TRIED = (-30.0, -15.0, 0.0, 15.0, 30.0)  # cents
MEMORY = 400  # frames in which what was heard counts for 1/e
LEAD = 4  # frames of a note that are heard before its tuning is fixed: streams need not wait for more
# Samples of one instrument are 10 cents apart, and notes a few cents apart beat where in truth they are in tune: to
# follow those cents, too, costs a tenth of the notes that a transcriber hears (docs/inverter_log.md).
MARGIN = 0.05  # of correlation, by which another tuning must win over the notes as they are written
SMOOTHED = 7  # filters whose mean is taken off, which leaves the fine structure


class Tuning:
    """Follows the tuning of a piece frame by frame; a note keeps, to its end, the tuning of its beginning.

    What a note gets depends on the mel up to `LEAD` frames after its onset alone, however the mel arrives.
    """

    def __init__(self, notes: Sequence[Note]):
        self.pitched = [note for note in notes if not note.is_drum]
        self.heard = 0  # frames
        self.cents = np.zeros(0)  # by frame
        self._sums = np.zeros((len(TRIED), 3))

    def hear(self, mel: np.ndarray, levels: np.ndarray | None = None) -> None:
        """Takes the next frames of the mel, [t, 128], and how loud each pitch is, [t, 128], if the notes do not say."""
        if not len(mel):
            return
        if levels is None:
            levels = levels_of(self.pitched, self.heard, len(mel))
        expected = [np.log(levels @ tone_mels(cents) + SOURCE_FLOOR) for cents in TRIED]
        loudness = np.exp(0.5 * np.maximum(mel, MIN_LOG_MEL))
        fine = mel @ FINE
        curves = [other @ FINE for other in expected]
        products = np.array(
            [[(loudness * a * b).sum(axis=1) for a, b in ((fine, c), (fine, fine), (c, c))] for c in curves]
        )  # [tunings, 3, t]
        estimates = np.empty(len(mel))
        for t in range(len(mel)):
            self._sums = self._sums * np.exp(-1 / MEMORY) + products[..., t]
            estimates[t] = best_tuning(self._sums)
        self.cents = np.append(self.cents, estimates)
        self.heard += len(mel)

    def of(self, notes: Sequence[Note]) -> list[float]:
        """Gives the cents of each note; 0 where nothing has been heard."""
        if not len(self.cents):
            return [0.0] * len(notes)
        frames = np.array([note.onset for note in notes], np.float64) * FRAME_RATE
        places = np.nan_to_num(frames).clip(0, len(self.cents)).astype(np.int64) + LEAD
        return self.cents[np.minimum(places, len(self.cents) - 1)].tolist()


def levels_of(notes: Sequence[Note], first_frame: int, num_frames: int) -> np.ndarray:
    """How loud the source plays each pitch in the middle of each frame, float32 [num_frames, 128]."""
    middles = (first_frame + np.arange(num_frames)) / FRAME_RATE + 0.5 * FRAME_LENGTH / SAMPLE_RATE
    levels = np.zeros((num_frames, 128), np.float32)
    for note in notes:
        if np.isfinite((note.onset, note.offset)).all():
            end = max(note.offset, note.onset)
            first, last = np.searchsorted(middles, (note.onset, end + RELEASE_SECONDS))
            decay = np.exp(np.minimum((end - middles[first:last]) / RELEASE, 0.0))
            levels[first:last, note.pitch] += (note.velocity / 127) ** 2 * decay
    return levels


@functools.cache
def tone_mels(cents: float) -> np.ndarray:
    """The mel of the source's tone of each pitch at full level, so far out of tune: float32 [128, 128]."""
    t = 1.0 + np.arange(FRAME_LENGTH) / SAMPLE_RATE  # long after the attack
    tones = np.stack([tone(Note(pitch, 127, 0, 0.0, 10.0), t, cents) for pitch in range(128)])
    return np.exp(log_mel(tones, np)[:, 0])


def best_tuning(sums: np.ndarray) -> float:
    """The top of a parabola through the best correlation and its neighbors; sums [tunings, 3] of products."""
    correlation = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2] + 1e-6)
    if correlation.max() < correlation[TRIED.index(0.0)] + MARGIN:
        return 0.0
    best = int(np.clip(np.argmax(correlation), 1, len(TRIED) - 2))
    before, top, after = correlation[best - 1 : best + 2]
    bend = before - 2 * top + after
    step = TRIED[1] - TRIED[0]
    cents = TRIED[best] + (np.clip(0.5 * (before - after) / bend, -1, 1) * step if bend < 0 else 0.0)
    return float(round(cents))  # whole cents, as the last bit of a product goes by how much of the mel came at once


def _fine_structure() -> np.ndarray:
    distance = np.abs(np.subtract.outer(np.arange(NUM_MELS), np.arange(NUM_MELS)))
    return (np.eye(NUM_MELS) - (distance <= SMOOTHED // 2) / SMOOTHED).astype(np.float32)


FINE = _fine_structure()  # [128, 128]
