"""Writes small folders like those that MAESTRO's archives unpack into."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from music_synth.audio.io import resample

# Rows of the real list, with what makes it awkward: commas, quotes and letters beyond ASCII in titles, years and
# letter cases that differ, and splits in no order.
ROWS = [
    ("Alban Berg", "Sonata Op. 1", "train", 2018, "MIDI-Unprocessed_Chamber3_MID--AUDIO_10_R3_2018_wav--1"),
    (
        "Alexander Scriabin",
        "24 Preludes Op. 11, No. 13-24",
        "train",
        2004,
        "MIDI-Unprocessed_XP_21_R1_2004_01_ORIG_MID--AUDIO_21_R1_2004_01_Track01_wav",
    ),
    (
        "César Franck",
        "Prélude, chorale, et fugue, M. 21",
        "validation",
        2014,
        "MIDI-UNPROCESSED_16-18_R1_2014_MID--AUDIO_16_R1_2014_wav--3",
    ),
    (
        "Claude Debussy",
        'Etude "Pour les accords"',
        "test",
        2009,
        "MIDI-Unprocessed_11_R1_2009_01-05_ORIG_MID--AUDIO_11_R1_2009_11_R1_2009_04_WAV",
    ),
]
IDS = [f"{year}_{name}" for _, _, _, year, name in ROWS]
SPLITS = [split for _, _, split, _, _ in ROWS]
FIELDS = ["canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration"]
RATES = (44100, 48000)  # in turn
RIGHT = 0.5  # gain of the right channel; the left one has the audio as it is


def write_maestro(folder: Path, pieces: Sequence[tuple[bytes, np.ndarray]], version: str = "3.0.0") -> Path:
    """Writes `maestro-v3.0.0/` in `folder` and returns its path. The list is there as CSV and as JSON.

    Args:
      pieces: (MIDI bytes, audio float32 [S] at 16 kHz) of each recording, at most four: piece i is `IDS[i]`, in the
        split `SPLITS[i]`. The stereo file's mean is 0.75 times the audio.
    """
    root = folder / f"maestro-v{version}"
    root.mkdir(parents=True)
    records = []
    for i, ((midi, audio), (composer, title, split, year, name)) in enumerate(zip(pieces, ROWS, strict=False)):
        (root / str(year)).mkdir(exist_ok=True)
        files = [f"{year}/{name}.midi", f"{year}/{name}.wav"]
        (root / files[0]).write_bytes(midi)
        left = resample(audio, 16000, RATES[i % 2])
        soundfile.write(root / files[1], np.stack([left, RIGHT * left], 1), RATES[i % 2], subtype="PCM_16")
        records.append(dict(zip(FIELDS, [composer, title, split, year, *files, len(audio) / 16000], strict=True)))
    with open(root / f"maestro-v{version}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    by_column = {field: {str(i): record[field] for i, record in enumerate(records)} for field in FIELDS}
    table = by_column if version.startswith("3") else records
    (root / f"maestro-v{version}.json").write_text(json.dumps(table, ensure_ascii=False, indent=2), encoding="utf-8")
    for name in ("LICENSE", "README"):
        (root / name).write_text(name)
    return root
