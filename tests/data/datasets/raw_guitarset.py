"""GuitarSet as a user has it after unpacking, small: made from pieces of our own.

The quirks of the download are in it: labels of 04_BN3-154-E_comp and 04_Jazz1-200-B_comp that come late, a pluck of
02_Funk2-119-G_comp that is labelled twice, fractional pitches, hidden files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from music_synth.audio.io import resample
from music_synth.midi.notes import Note, read_midi

EXCERPTS = (  # from the real list; a short prefix of it has both splits
    "00_BN1-129-Eb_comp",
    "03_Rock3-117-Bb_solo",
    "04_BN3-154-E_comp",
    "04_Jazz1-200-B_comp",
    "02_Funk2-119-G_comp",
    "05_SS2-107-Ab_solo",
)
SECONDS_LATE = {"04_BN3-154-E_comp": 0.409, "04_Jazz1-200-B_comp": 0.309}
MIX_LEVEL = 0.5  # of the pickup mix, so that it is not the recording of the microphone
DETUNE = (0.064, -0.31, 0.0, 0.45, -0.08, -0.4999)  # semitones off, by string


def write_guitarset(
    folder: Path,
    pieces: Sequence[tuple[bytes | list[Note], np.ndarray]],
    excerpts: Sequence[str] = EXCERPTS,
    in_folders: bool = True,
) -> dict[str, tuple[list[Note], np.ndarray]]:
    """Writes one excerpt a piece: JAMS, microphone and pickup mix (44.1 kHz, 16 bits, mono) and both hex files.

    Args:
        pieces: (bytes of a MIDI file, or notes; float32 [S], mono, 16 kHz). Programs and velocities are not kept.
        excerpts: their names, in order.
        in_folders: each archive in a folder of its name; else all files side by side.

    Returns:
        excerpt -> its notes as they sound, each with its string as `instrument`, and the audio [S] of the microphone.
    """
    made = {}
    for excerpt, (notes, audio) in zip(excerpts, pieces, strict=False):
        notes = _on_strings(read_midi(notes, as_published=True) if isinstance(notes, bytes) else notes)
        made[excerpt] = notes, audio
        contents = {
            "annotation": (f"{excerpt}.jams", _jams(excerpt, notes, audio)),
            "audio_mono-mic": (f"{excerpt}_mic.wav", resample(audio, 16000, 44100)),
            "audio_mono-pickup_mix": (f"{excerpt}_mix.wav", resample(audio * MIX_LEVEL, 16000, 44100)),
            # Six channels; nobody opens them, so they are short.
            "audio_hex-pickup_original": (f"{excerpt}_hex.wav", np.zeros((441, 6), np.float32)),
            "audio_hex-pickup_debleeded": (f"{excerpt}_hex_cln.wav", np.zeros((441, 6), np.float32)),
        }
        for archive, (name, content) in contents.items():
            place = folder / archive if in_folders else folder
            for parent in (place, folder / "__MACOSX"):
                parent.mkdir(parents=True, exist_ok=True)
                (parent / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
            if isinstance(content, str):
                (place / name).write_text(content, encoding="utf-8")
            else:
                soundfile.write(place / name, content, 44100, subtype="PCM_16")
    return made


def _on_strings(notes: list[Note]) -> list[Note]:
    """The notes as guitar notes, each on the first of six strings that is free, else on the last."""
    busy_until, result = [0.0] * 6, []
    for note in sorted(notes, key=lambda note: (note.onset, note.pitch)):
        string = next((s for s in range(6) if busy_until[s] <= note.onset), 5)
        busy_until[string] = note.offset
        result.append(note._replace(program=24, velocity=100, is_drum=False, instrument=string))
    return result


def _jams(excerpt: str, notes: list[Note], audio: np.ndarray) -> str:
    late = SECONDS_LATE.get(excerpt, 0.0)
    seconds = len(audio) / 16000
    annotations = []
    for string in range(6):
        rows = [
            _row(note.onset + late, note.offset - note.onset, note.pitch + DETUNE[string])
            for note in notes
            if note.instrument == string
        ]
        if excerpt == "02_Funk2-119-G_comp" and string == 2:  # as in GuitarSet issue 4: later, shorter, not as low
            first = rows[0]
            rows.insert(1, _row(first["time"] + 0.000181, first["duration"] / 3.5, first["value"] + 0.0228))
        contour = {
            "time": [row["time"] for row in rows],
            "duration": [0.0] * len(rows),
            "value": [{"voiced": True, "index": 0, "frequency": 440 * 2 ** (row["value"] / 12 - 5.75)} for row in rows],
            "confidence": [None] * len(rows),
        }
        annotations += [
            _annotation("pitch_contour", contour, seconds, str(string)),
            _annotation("note_midi", rows, seconds, str(string)),
        ]
    tempo = int(excerpt.split("-")[1])
    beat = {"position": 1, "measure": 1, "num_beats": 4, "beat_units": 4}
    annotations += [
        _annotation("beat_position", [_row(0.0, 0.0, beat)], seconds),
        _annotation("tempo", [_row(0.0, seconds, tempo) | {"confidence": 1.0}], seconds),
        _annotation("chord", [_row(0.0, seconds, "D#:maj7")], seconds),
        _annotation("chord", [_row(0.0, seconds, "D#:maj7/1")], seconds),
        _annotation("key_mode", [_row(0.0, seconds, "D#:major")], seconds),
    ]
    metadata = {"title": excerpt, "artist": "", "release": "", "duration": seconds, "jams_version": "0.3.1"}
    return json.dumps({"annotations": annotations, "file_metadata": metadata, "sandbox": {}}, indent=2)


def _row(time: float, duration: float, value: object) -> dict:
    return {"time": time, "duration": duration, "value": value, "confidence": None}


def _annotation(namespace: str, data: object, seconds: float, source: str = "") -> dict:
    return {
        "annotation_metadata": {
            "curator": {"name": "", "email": ""},
            "annotator": {},
            "version": "",
            "corpus": "",
            "annotation_tools": "",
            "annotation_rules": "",
            "validation": "",
            "data_source": source,
        },
        "namespace": namespace,
        "data": data,
        "sandbox": {},
        "time": 0,
        "duration": seconds,
    }
