"""The source of a piece as its mel comes: of its notes as far as the mel bears them out, and of keys read off it.

A list of notes that is right fits the mel better than the same list half a second to a second and a half away, by a
fifth at least; one that is late by a second, transposed or another piece's does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.vocoder import keys
from music_synth.vocoder.source import SOURCE_HOPS, source_of_frames
from music_synth.vocoder.tuning import Tuning, levels_of

LAGS = (-75, -50, -25, 25, 50, 75)  # frames by which a list is shifted, to be held against
SOUNDS = 1e-3  # level of a note in a list
MEMORY = 300  # frames in which what was heard counts for 1/e
PRIOR = (15.0, 10.0)  # added to what was found in the list and in it shifted: music that no reader reads tells little
BELIEVED = (1.04, 1.16)  # how much better than shifted it must be: not believed, believed


class Excitation:
    """Makes the source of frames; the same however the mel arrives, up to `keys.AHEAD` frames before what has come.

    Args:
      notes: times in seconds from frame 0; none: keys alone.

    Raises:
      UserError: a pitch that no MIDI file can hold.
    """

    def __init__(self, notes: Sequence[Note]):
        self.notes = list(notes)
        if wrong := [note.pitch for note in self.notes if note.pitch not in range(128)]:
            raise UserError(f"a note of pitch {wrong[0]}: pitches are 0..127")
        self._tuning, self._keys_tuning = Tuning(self.notes), Tuning(())
        self._levels, self._first = np.zeros((0, keys.NUM_KEYS), np.float32), 0  # of frames from the first one kept on
        self._belief, self._clock = np.zeros(0), np.zeros(0)  # by frame; the clock is that of `keys.tones`
        self._sums = np.zeros(2)  # of the shares of what sounds that are in the list, and in it shifted

    def hear(self, mel: np.ndarray) -> None:
        """Takes the next frames of the mel, [t, 128]."""
        if not len(mel):
            return
        heard, around = len(self._clock), max(LAGS)
        listed = levels_of(self._tuning.pitched, heard - around, len(mel) + 2 * around)
        self._tuning.hear(mel, listed[around:-around])
        levels = keys.key_levels(mel)
        belief = self._believe(levels, in_keys(listed) > SOUNDS) if self.notes else np.zeros(len(mel))
        self._belief = np.append(self._belief, belief)
        pitches = np.zeros((len(mel), 128), np.float32)
        in_keys(pitches)[:] = levels
        self._keys_tuning.hear(mel, pitches)
        seconds = 2 ** (self._keys_tuning.cents[heard:] / 1200) / FRAME_RATE
        self._clock = np.append(self._clock, np.cumsum([*self._clock[-1:], *seconds])[min(heard, 1) :])
        self._levels = np.concatenate([self._levels, levels])

    def _believe(self, levels: np.ndarray, listed: np.ndarray) -> np.ndarray:
        """How far the list, given with `max(LAGS)` frames on either side, is believed in the next frames, 0 to 1."""
        around, lags = max(LAGS), [0, *LAGS]
        found = np.array([(levels * listed[around + lag :][: len(levels)]).sum(axis=1) for lag in lags])
        found /= levels.sum(axis=1) + 1e-9
        better = np.empty(len(levels))
        for t, (own, others) in enumerate(zip(found[0], found[1:].mean(axis=0), strict=True)):
            self._sums = self._sums * np.exp(-1 / MEMORY) + (own, others)
            own, others = self._sums + PRIOR
            better[t] = own / others
        low, high = BELIEVED
        return np.clip((better - low) / (high - low), 0.0, 1.0)

    def of_frames(self, first_frame: int, num_frames: int) -> np.ndarray:
        """Makes the source as `source_of_frames`. Frames must be asked for in order: earlier ones are forgotten."""
        times = np.arange(first_frame - 2, first_frame + num_frames + SOURCE_HOPS - 1)  # frames whose middles hops join
        belief = self._at(self._belief, times)
        made = np.zeros((num_frames + SOURCE_HOPS) * HOP_LENGTH, np.float32)
        if belief.any():
            made += source_of_frames(self.notes, first_frame, num_frames, self._tuning.of(self.notes))
            if (belief < 1).any():
                at = np.arange(len(made)) / HOP_LENGTH
                made *= np.interp(at, np.arange(len(belief)), belief).astype(np.float32)
        wanted = np.arange(times[0] - keys.AHEAD, times[-1] + keys.AHEAD + 1) - self._first
        inside = (wanted >= 0) & (wanted < len(self._levels))
        near = np.zeros((len(wanted), keys.NUM_KEYS), np.float32)
        near[inside] = self._levels[wanted[inside]]
        levels = np.lib.stride_tricks.sliding_window_view(near, keys.SMOOTHED, axis=0).mean(axis=-1)
        listed = in_keys(levels_of(self._tuning.pitched, times[0], len(times))) > SOUNDS
        levels *= 1 - belief[:, None] * listed
        outside = np.maximum(times - len(self._clock) + 1, 0) + np.minimum(times, 0)
        made += keys.tones(levels, self._at(self._clock, times) + outside / FRAME_RATE)
        forgotten = max(0, min(times[0] - keys.SMOOTHED - self._first, len(self._levels)))
        self._levels, self._first = self._levels[forgotten:], self._first + forgotten
        return made

    @staticmethod
    def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Values at places, at the nearest where there is none; 0 where there are none at all."""
        if not len(values):
            return np.zeros((len(places), *values.shape[1:]))
        return values[places.clip(0, len(values) - 1)]


def in_keys(pitches: np.ndarray) -> np.ndarray:
    """Takes the keys' part of arrays over pitches, [T, 128] to [T, 88]."""
    return pitches[:, keys.LOWEST :][:, : keys.NUM_KEYS]
