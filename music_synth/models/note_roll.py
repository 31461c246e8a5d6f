"""What sounds when, read off the note tokens, so that the decoder need not learn to find it by attention.

A token stream leaves out what does not change, and an end lies many tokens after its beginning. Attention has to learn
to put that together, and in a few hundred updates it does not (docs/evaluate.md). But the stream's grammar is
known (`midi/tokenizer.py`), so `read_notes` resolves it exactly, and `NoteRoll` lays the encoded notes out over the
frames they sound in: a piano roll of learned spectra instead of zeros and ones (piano rolls as conditioning: Hawthorne
et al. 2019, MAESTRO). The decoder starts from this guess. It is computed once a segment. Published networks have none
of it: `NetworkConfig.note_roll` = False.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import FFT_SIZE, FRAME_LENGTH, MIN_LOG_MEL, SAMPLE_RATE, hann_window, mel_matrix, scale_mel
from music_synth.midi.notes import hertz_of
from music_synth.midi.segments import STEPS_PER_FRAME
from music_synth.midi.vocabulary import NUM_PITCHES, NUM_PROGRAMS, Vocabulary
from music_synth.models.layers import Dense, NetworkConfig, partitioned

Array = jax.Array
constant = nn.initializers.constant
TIED_AGE = 20.0  # frames that a tied note, whose beginning the segment does not tell, is taken to have sounded
DECAY_FRAMES = (2.0, 8.0, 32.0, 128.0)  # time constants after the onset, to begin with: they are learned
RELEASE_FRAMES = (4.0, 16.0, 64.0)  # and after the offset
MEAN_LOG_MEL, STD_LOG_MEL = -5.0, 2.0  # of the spectra of untrained notes
HARMONIC_LOG_MEL = -5.0  # of an untrained note's first harmonic; harmonic k has 1 / k of it
VELOCITY_EXPONENT = 2.0  # of a SoundFont's default attenuation, 40 log10(127 / velocity) dB; to begin with
TIED_VELOCITY = 0.6  # of 1, as tied notes are taken to have
KINDS = (NUM_PROGRAMS + 1) * NUM_PITCHES  # of notes: each pitch of each program, and each drum
NUM_ENVELOPES = 2 + len(DECAY_FRAMES) + len(RELEASE_FRAMES)


class TimedNotes(NamedTuple):
    """What each note token stands for; [B, N] each. Only rows with `is_note` mean a note that begins or is tied."""

    is_note: Array  # bool
    is_drum: Array  # bool
    program: Array  # int32, token id of the program in force
    velocity: Array  # int32, token id of the velocity in force; of bin 0 where a note is tied, which does not tell it
    pitch: Array  # int32, of a drum that of its key
    onset: Array  # float32, frames since the start of the segment
    offset: Array  # float32; `end` where the segment does not tell it
    timbre: Array  # int32 [B, 1], token id of the segment's timbre; 0 where it is unknown


def read_notes(tokens: Array, vocabulary: Vocabulary, end: float) -> TimedNotes:
    """Resolves note tokens [B, N] of segments of `end` frames. A note ends with the next event of its kind."""
    v, positions = vocabulary, jnp.arange(tokens.shape[1])[None]

    def among(first: int, last: int) -> Array:
        return (tokens >= first) & (tokens < last)

    def latest(chosen: Array, default: int) -> Array:
        index = jax.lax.cummax(jnp.where(chosen, positions, -1), axis=1)
        return jnp.where(index < 0, default, jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1))

    is_pitch, is_drum = among(v.pitch_id, v.velocity_id), among(v.drum_id, v.end_id)
    # Shifts count from the start of the segment, so they only grow.
    steps = jax.lax.cummax(jnp.where(among(v.shift_id, v.pitch_id), tokens - v.shift_id, 0), axis=1)
    time = steps.astype(jnp.float32) / STEPS_PER_FRAME
    tied = jax.lax.cummax((tokens == v.tie_id).astype(jnp.int32), axis=1, reverse=True) > 0
    program = latest(among(v.program_id, v.drum_id), v.program_id)
    velocity = latest(among(v.velocity_id, v.tie_id), v.velocity_id + v.velocity_bins)
    is_note = (is_pitch & ((velocity > v.velocity_id) | tied)) | is_drum
    velocity = jnp.where(tied, v.velocity_id, velocity)  # bin 0, which no note that begins has
    kind = jnp.where(is_pitch, (program - v.program_id) * NUM_PITCHES + tokens - v.pitch_id, -1)
    ends = (kind[:, :, None] == kind[:, None, :]) & (positions[:, None, :] > positions[:, :, None])  # [B, N, N]
    offset = jnp.min(jnp.where(ends, time[:, None, :], float(end)), axis=2)
    timbre = jnp.max(jnp.where(v.is_timbre(tokens), tokens, 0), axis=1, keepdims=True)
    pitch = jnp.clip(tokens - jnp.where(is_drum, v.drum_id, v.pitch_id), 0, NUM_PITCHES - 1)
    return TimedNotes(is_note, is_drum, program, velocity, pitch, jnp.where(tied, -TIED_AGE, time), offset, timbre)


class Roll(NamedTuple):
    """A first guess at the mel, and what each note has in it."""

    mel: Array  # [B, T, M] in the model's range, silence = 0
    magnitude: Array  # [B, T, M], of which that is the logarithm
    weights: Array  # [B, T, E, N], of each note's spectra in each frame
    spectra: Array  # [B, E, N, M]


class NoteRoll(nn.Module):
    """Encoded notes [B, N, D] -> `Roll`.

    Each note has a learned spectrum for each envelope of its age: while it sounds, decaying from its onset, decaying
    from its offset, and in the frame before its onset, which the analysis window of the mel already overlaps. With
    `NetworkConfig.roll_harmonics` a pitched note's spectrum also has so many harmonics of its pitch, whose magnitudes
    are learned and whose places are known (additive synthesis; Engel et al. 2020, DDSP).
    Magnitudes add up; the logarithm comes last, as in a mel.
    """

    config: NetworkConfig

    @nn.compact
    def __call__(
        self, encoded: Array, notes: TimedNotes, tail: Array | None = None, latents: Array | None = None
    ) -> Roll:
        """tail [B, M]: magnitudes of the frame before the segment, which fade into it; latents [B, N, L]: None as 0."""
        c = self.config
        if c.roll_table:
            table = self.param("table", partitioned(nn.initializers.zeros_init(), None, "embed"), (KINDS, c.model_dim))
            encoded = encoded + jnp.take(table, kinds(notes, c.vocabulary), axis=0)
        if latents is not None:
            small = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
            encoded = encoded + Dense(c.model_dim, ("latent", "embed"), init=small, name="latents")(latents)
        tau = self.param("log_frames", partitioned(log_frames_init, "envelope"), (NUM_ENVELOPES - 2,))
        weights = envelopes(notes, c.target_frames, jnp.exp(tau))  # [B, T, E, N]
        spectra = Dense(NUM_ENVELOPES * c.num_mels, ("embed", "mel"), name="spectra")(encoded)
        spectra = jnp.exp(MEAN_LOG_MEL + STD_LOG_MEL * jnp.clip(spectra.astype(jnp.float32), -10.0, 10.0))
        spectra = spectra.reshape(*spectra.shape[:2], NUM_ENVELOPES, c.num_mels).swapaxes(1, 2)  # [B, E, N, M]
        if c.roll_harmonics:
            spectra = spectra + self._partials(encoded, notes)
        if c.vocabulary.velocity_bins > 1:
            init = partitioned(constant(VELOCITY_EXPONENT), "envelope")
            exponents = self.param("velocity_exponent", init, (NUM_ENVELOPES,))
            weights = weights * gains(notes, exponents, c.vocabulary)[:, None]
        rows, frames = weights.shape[:2]
        magnitude = weights.reshape(rows, frames, -1) @ spectra.reshape(rows, -1, c.num_mels)  # [B, T, M]
        if tail is not None:
            magnitude = magnitude + self._fading(frames, c.num_mels) * tail[:, None]
        magnitude = magnitude + np.exp(MIN_LOG_MEL)
        return Roll(scale_mel(jnp.log(magnitude)) + 1.0, magnitude, weights, spectra)

    def _partials(self, encoded: Array, notes: TimedNotes) -> Array:
        """[B, E, N, M]: what the harmonics of each note's pitch bring, each of them with a learned magnitude."""
        count = self.config.roll_harmonics
        small = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        levels = Dense(NUM_ENVELOPES * count, ("embed", "mel"), init=small, name="harmonics")(encoded)
        levels = jnp.clip(levels.astype(jnp.float32), -10.0, 10.0).reshape(*levels.shape[:2], NUM_ENVELOPES, count)
        first = HARMONIC_LOG_MEL - np.log(np.arange(1, count + 1, dtype=np.float32))[None, None, None]
        magnitudes = jnp.exp(first + STD_LOG_MEL * levels)
        magnitudes = jnp.where(notes.is_drum[..., None, None], 0.0, magnitudes)
        return jnp.einsum("bnek,bnkm->benm", magnitudes, jnp.take(harmonic_mels(count), notes.pitch, axis=0))

    def _fading(self, num_frames: int, num_mels: int) -> Array:
        """[1, T, M]: how much of each bin of the frame before the segment is left in frame t."""
        shares = self.param("tail_log_shares", partitioned(constant(np.log(0.2)), "envelope", "mel"), (3, num_mels))
        tau = self.param("tail_log_frames", partitioned(release_init, "envelope"), (len(RELEASE_FRAMES),))
        age = jnp.arange(1.0, num_frames + 1.0)[:, None]
        decays = jnp.exp(-age / jnp.exp(tau)[None])  # [T, 3]
        return (decays @ jnp.exp(shares))[None]


@functools.cache
def harmonic_mels(count: int) -> np.ndarray:
    """Computes the mel of each pitch's first `count` harmonics, float32 [128, count, M]; the loudest bin of each is 1.

    Those beyond 8 kHz are 0.
    """
    hz = hertz_of(np.arange(NUM_PITCHES))[:, None] * np.arange(1, count + 1)  # [P, count]
    audible = hz < SAMPLE_RATE / 2
    seconds, filters = np.arange(FRAME_LENGTH) / SAMPLE_RATE, mel_matrix()
    sines = np.exp(2j * np.pi * hz[audible, None] * seconds) * hann_window()
    mels = np.zeros((*hz.shape, filters.shape[1]), np.float32)
    mels[audible] = np.abs(np.fft.fft(sines, FFT_SIZE)[:, : len(filters)]) @ filters
    return mels / np.maximum(mels.max(axis=2, keepdims=True), 1e-6)


def kinds(notes: TimedNotes, vocabulary: Vocabulary) -> Array:
    """Numbers [B, N] in [0, KINDS), which tell notes apart by program and pitch, and drums from both."""
    program = jnp.clip(notes.program - vocabulary.program_id, 0, NUM_PROGRAMS - 1)
    return jnp.where(notes.is_drum, NUM_PROGRAMS, program) * NUM_PITCHES + notes.pitch


def gains(notes: TimedNotes, exponents: Array, vocabulary: Vocabulary) -> Array:
    """What the velocity does to each envelope's magnitude: [B, E, N], 1 at full velocity."""
    bins = vocabulary.velocity_bins
    velocity = (notes.velocity - vocabulary.velocity_id).astype(jnp.float32) / bins
    velocity = jnp.clip(jnp.where(velocity > 0, velocity, TIED_VELOCITY), 1.0 / bins, 1.0)
    return jnp.exp(exponents[None, :, None] * jnp.log(velocity)[:, None, :])


def release_init(rng: Array, shape: tuple[int, ...]) -> Array:
    return jnp.log(jnp.asarray(RELEASE_FRAMES, jnp.float32)).reshape(shape)


def log_frames_init(rng: Array, shape: tuple[int, ...]) -> Array:
    return jnp.log(jnp.asarray(DECAY_FRAMES + RELEASE_FRAMES, jnp.float32)).reshape(shape)


def envelopes(notes: TimedNotes, num_frames: int, time_constants: Array) -> Array:
    """How much frame t hears of note n through each envelope: [B, T, E, N] in [0, 1], 0 where there is no note."""
    t = jnp.arange(num_frames, dtype=jnp.float32)[None, :, None]
    onset, offset, is_drum = (a[:, None, :] for a in (notes.onset, notes.offset, notes.is_drum))
    begun = jnp.clip(t + 1.0 - onset, 0.0, 1.0)  # of frame t, the share after the onset
    over = jnp.where(is_drum, 0.0, jnp.clip(t + 1.0 - offset, 0.0, 1.0))  # a drum's end is not known
    sounds = begun * (1.0 - over)  # [B, T, N]
    age, since = jnp.maximum(t - onset, 0.0), jnp.maximum(t - offset, 0.0)
    decay, release = time_constants[: len(DECAY_FRAMES)], time_constants[len(DECAY_FRAMES) :]
    parts = [jnp.where(is_drum, 0.0, sounds)]
    parts += [sounds * jnp.exp(-age / frames) for frames in decay]
    parts += [over * jnp.exp(-since / frames) for frames in release]
    parts += [(1.0 - begun) * jnp.clip(t + 2.0 - onset, 0.0, 1.0)]
    return jnp.where(notes.is_note[:, None, None, :], jnp.stack(parts, axis=2), 0.0)
