"""The record that every data set of this package stores: id, audio, notes, programs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from music_synth.audio.io import audio_to_int16
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.data.note_sequences import write_note_sequence
from music_synth.data.quiet_tensorflow import tfds
from music_synth.midi.notes import Note


def features() -> tfds.features.FeaturesDict:
    """Describes a record: `id`, `audio`, `sequence` and `programs`.

    Audio is 16-bit, 16 kHz, mono; the sequence a serialized NoteSequence whose notes last as long as the pedal lets
    them sound; programs are the General MIDI programs heard besides drums, ascending.
    """
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            # As bytes: tfds.features.Audio would store every sample as an integer of up to ten bytes.
            "audio": tfds.features.Tensor(
                shape=(None,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES, doc=f"{SAMPLE_RATE} Hz, mono"
            ),
            "sequence": tfds.features.Tensor(shape=(), dtype=np.bytes_),
            "programs": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        }
    )


def make_record(name: str, notes: Sequence[Note], audio: np.ndarray, timbre: str = "") -> dict:
    """Makes a record of notes and audio, float [S] in [-1, 1] at 16 kHz. The timbre is kept with the notes."""
    return {
        "id": name,
        "audio": audio_to_int16(audio),
        "sequence": write_note_sequence(name, notes, timbre),
        "programs": np.array(sorted({note.program for note in notes if not note.is_drum}), np.int64),
    }
