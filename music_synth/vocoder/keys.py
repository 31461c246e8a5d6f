"""Keys read off a mel: which of 88 sound in a frame, and how loud, where no notes say so.

Of a frame's magnitudes what rises above their lower envelope is fitted by tones of each key and bands of noise: a
non-negative factorization with fixed templates under the Kullback-Leibler divergence (Lee and Seung 2001). Tones of
the keys that run on from the first sample give the phases that notes would give. Levels are smoothed in time: what
flickers warbles.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter1d

from music_synth.audio.mel import FRAME_LENGTH, HOP_LENGTH, NUM_MELS, SAMPLE_RATE, log_mel
from music_synth.threads import one_blas_thread
from music_synth.vocoder.source import hz, partials, read_table, scattered, wave_table

LOWEST, NUM_KEYS = 21, 88  # of the piano
TILTS = (1.0, 0.5, 2.0, 3.0)  # partial k of a tone has amplitude 1 / k^tilt; tones are played with the first
NOISE_BANDS = 12
ENVELOPE = 15  # filters under which the lower envelope runs
STEPS = 30  # of the factorization
AT_ONCE = 32  # frames that it is made of: a product of one size rounds alike, however many frames come
SHARPNESS = 1.5  # power of a key's share of its frame: what is unsure counts less
LEAST = 0.05  # of a frame's loudest key, under which a key is silent
FLOOR = 1e-5  # under which all keys are
SMOOTHED = 11  # frames
GAIN = 8.0  # over the mel's levels: notes are as much louder in the source, and the two must weigh alike
AHEAD = SMOOTHED // 2  # frames after one that its levels wait for


@functools.cache
def period(pitch: int, tilt: float) -> np.ndarray:
    """A period of a key's tone, its partials out of phase: in phase they would be pulses. As of `wave_table`."""
    k = partials(pitch)
    return wave_table(k**-tilt * scattered(k, pitch))


@functools.cache
def templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tones of each tilt and key, then bands of noise.

    Returns:
      What rises above their envelopes, float32 [4 * 88 + 12, 128], the sum of each row 1; the sum of the whole mel of a
      tone, where that of its row is 1, [4 * 88]; and that of the tone that is played, at full scale, [88].
    """
    t = 1.0 + np.arange(FRAME_LENGTH) / SAMPLE_RATE
    pitches = range(LOWEST, LOWEST + NUM_KEYS)
    waves = np.stack([read_table(period(pitch, tilt), hz(pitch) * t) for tilt in TILTS for pitch in pitches])
    mels = np.exp(log_mel(waves, np)[:, 0])
    centers = np.linspace(0, NUM_MELS - 1, NOISE_BANDS)
    bands = np.maximum(0, 1 - np.abs(np.arange(NUM_MELS) - centers[:, None]) / centers[1])
    rows = np.concatenate([above_envelope(mels), bands])
    sums = rows.sum(axis=1, keepdims=True) + 1e-9
    masses = mels.sum(axis=1)
    return (rows / sums).astype(np.float32), masses / sums[: len(masses), 0], masses[:NUM_KEYS]


def above_envelope(magnitude: np.ndarray) -> np.ndarray:
    """What rises above the lower envelope over frequency, of [T, 128]: tones do, noise and drums hardly."""
    opened = maximum_filter(minimum_filter(magnitude, (1, ENVELOPE)), (1, ENVELOPE))
    return np.maximum(magnitude - uniform_filter1d(opened, ENVELOPE, axis=-1), 0.0)


def fit(wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Finds how much of each row is in each frame: [AT_ONCE, 128] and [R, 128] to [AT_ONCE, R], float32."""
    weights = np.full((len(wanted), len(rows)), wanted.sum(axis=1, keepdims=True) / len(rows), np.float32)
    for _ in range(STEPS):
        weights *= (wanted / (weights @ rows + 1e-8)) @ rows.T
    return weights


def key_levels(mel: np.ndarray) -> np.ndarray:
    """Reads how loud each key's tone is in the source, frame by frame: log-mel [T, 128] to float32 [T, 88]."""
    magnitude = np.exp(mel).astype(np.float32)
    wanted = above_envelope(magnitude) + 1e-6
    rows, masses, played = templates()
    count = -(-len(mel) // AT_ONCE)
    padded = np.pad(wanted, ((0, count * AT_ONCE - len(mel)), (0, 0)), constant_values=1e-6)
    with one_blas_thread():
        weights = np.concatenate([fit(block, rows) for block in padded.reshape(count, AT_ONCE, -1)])[: len(mel)]
    found = (weights[:, : len(masses)] * masses).reshape(len(mel), len(TILTS), NUM_KEYS).sum(axis=1)
    whole = np.maximum(magnitude.sum(axis=1), found.sum(axis=1))[:, None]
    levels = GAIN * whole * (found / whole) ** SHARPNESS / played
    heard = levels > np.maximum(LEAST * levels.max(axis=1, keepdims=True), FLOOR)
    return np.where(heard, levels, 0.0).astype(np.float32)


def tones(levels: np.ndarray, clock: np.ndarray) -> np.ndarray:
    """Plays keys that run on.

    Args:
      levels: float32 [n + 1, 88], at the beginning of each hop and at the end of the last.
      clock: seconds that their tuning makes of those that have passed, at the same times, float64 [n + 1].

    Returns:
      float32 [320 n]
    """
    made = np.zeros((len(levels) - 1, HOP_LENGTH), np.float32)
    way = np.arange(HOP_LENGTH) / HOP_LENGTH
    for key in np.flatnonzero(levels.any(axis=0)):
        level = levels[:, key].astype(np.float64)
        hops = np.flatnonzero(level[:-1] + level[1:])
        time = clock[hops, None] + (clock[hops + 1] - clock[hops])[:, None] * way
        gain = level[hops, None] + (level[hops + 1] - level[hops])[:, None] * way
        wave = read_table(period(LOWEST + int(key), TILTS[0]), hz(LOWEST + int(key)) * time)
        made[hops] += wave * gain.astype(np.float32)
    return made.reshape(-1)
