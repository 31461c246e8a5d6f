"""Writes Slakh2100 and BabySlakh as they come out of their archives, small, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import yaml

from music_synth.audio.io import resample
from music_synth.midi.notes import Note, midi_bytes

PEAK = 10 ** (-1 / 20)  # of the mix: "target_peak: -1.0" dB
Piece = tuple[bytes, np.ndarray]  # MIDI file, float32 [S] at 16 kHz


class RawStem(NamedTuple):
    """One stem. No file is written for what is None."""

    info: dict[str, Any]  # its entry in metadata.yaml
    midi: bytes | None
    audio: np.ndarray | None  # float32 [S], 16 kHz


def stem_info(family: str, program: int, name: str, plugin: str, there: bool = True) -> dict[str, Any]:
    """The entry of a stem in metadata.yaml; a stem that was not rendered has no plugin and no loudness."""
    loudness = {"integrated_loudness": -12.82074180245363} if there else {}
    return {
        "audio_rendered": there,
        "inst_class": family,
        **loudness,
        "is_drum": family == "Drums",
        "midi_program_name": name,
        "midi_saved": there,
        "plugin_name": plugin if there else "None",
        "program_num": program,
    }


BAND = (
    stem_info("Piano", 1, "Bright Acoustic Piano", "the_grandeur.nkm"),
    stem_info("Bass", 34, "Electric Bass (pick)", "classic_bass.nkm"),
    stem_info("Guitar", 30, "Distortion Guitar", "elektrik_guitar.nkm"),
    stem_info("Drums", 128, "Drums", "pop_kit.nkm"),
    stem_info("Strings (continued)", 49, "String Ensemble 2", "string_ensemble.nkm"),
)
NOT_RENDERED = stem_info("Sound Effects", 103, "FX 8 (sci-fi)", "None", there=False)


def write_track(
    folder: Path, stems: Mapping[str, RawStem], rate: int = 44100, suffix: str = ".flac", **metadata: Any
) -> None:
    """Writes the folder of one track, mono, 16 bits, with all stems turned down so that their sum does not clip.

    `metadata` replaces entries of metadata.yaml.
    """
    for name in ("MIDI", "stems"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sounds = {name: resample(stem.audio, 16000, rate) for name, stem in stems.items() if stem.audio is not None}
    length = max(map(len, sounds.values()))
    sounds = {name: np.pad(sound, (0, length - len(sound))) for name, sound in sounds.items()}
    gain = np.float32(PEAK / np.abs(sum(sounds.values())).max())
    sounds = {name: sound * gain for name, sound in sounds.items()}
    for name, sound in sounds.items():
        soundfile.write(folder / "stems" / (name + suffix), sound, rate, subtype="PCM_16")
    soundfile.write(folder / f"mix{suffix}", sum(sounds.values()), rate, subtype="PCM_16")
    for name, stem in stems.items():
        if stem.midi is not None:
            (folder / "MIDI" / f"{name}.mid").write_bytes(stem.midi)
    (folder / "all_src.mid").write_bytes(midi_bytes([Note(60, 99, 0, 0.0, 1.0)]))  # other than what is heard
    content = {
        "UUID": "1a81ae092884234f3264e2f45927f00a",
        "audio_dir": "stems",
        "lmd_midi_dir": "lmd_matched/O/O/H/TROOHTB128F931F9DF/1a81ae092884234f3264e2f45927f00a.mid",
        "midi_dir": "MIDI",
        "normalization_factor": -13.0,
        "normalized": True,
        "overall_gain": float(gain),
        "stems": {name: stem.info for name, stem in stems.items()},
        "target_peak": -1.0,
    } | metadata
    (folder / "metadata.yaml").write_text(yaml.safe_dump(content))
    (folder / "stems" / f"._S00{suffix}").write_bytes(b"\0\5\26\7")  # as macOS leaves them


def band(pieces: Sequence[Piece], rendered: bool = True) -> dict[str, RawStem]:
    """Stems S00, S01, ..., one of each piece, that play the parts of BAND in turn, and one that was not rendered.

    `rendered`: whether the metadata says that those that are there are there.
    """
    parts = [BAND[i % len(BAND)] | {"audio_rendered": rendered, "midi_saved": rendered} for i in range(len(pieces))]
    stems = [RawStem(info, *piece) for info, piece in zip(parts, pieces, strict=True)]
    return {f"S{i:02d}": stem for i, stem in enumerate([*stems, RawStem(NOT_RENDERED, None, None)])}


def write_slakh(folder: Path, pieces: Sequence[Piece]) -> Path:
    """Writes `slakh2100_flac_redux` into `folder`; returns its path.

    Two songs for training, one for validation, one for test and one that is omitted, each of all `pieces` at once (4 or
    more for sub-mixes, a piece a stem, each song in another order, so that other parts play them).
    """
    root = folder / "slakh2100_flac_redux"
    tracks = ("train/Track00001", "train/Track00002", "validation/Track01501", "test/Track01876", "omitted/Track01939")
    for i, track in enumerate(tracks):
        turn = i % len(pieces)
        write_track(root / track, band([*pieces[turn:], *pieces[:turn]]))
    (root / "train" / "._Track00001").write_bytes(b"\0\5\26\7")
    (root / ".DS_Store").write_bytes(b"\0")
    return root


def write_babyslakh(folder: Path, pieces: Sequence[Piece], tracks: Sequence[int] = (1, 2, 17, 18, 19, 20)) -> Path:
    """Writes `babyslakh_16k` into `folder`: `tracks` of all `pieces` at once, see `write_slakh`. Returns its path."""
    root = folder / "babyslakh_16k"
    for i in tracks:
        turn = i % len(pieces)
        stems = band([*pieces[turn:], *pieces[:turn]], rendered=False)  # so it says of what is there
        write_track(root / f"Track{i:05d}", stems, rate=16000, suffix=".wav")
    return root
