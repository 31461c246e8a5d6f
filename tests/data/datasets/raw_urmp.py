"""URMP as a user has it after unpacking, small: made from pieces of our own.

The quirks of the download are in it: score MIDI in another time than the audio, the misnamed part of piece 15,
`Supplementary_Files`, hidden files, frequencies that are off their semitones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from music_synth.audio.io import resample
from music_synth.midi.notes import Note, read_midi, write_midi

CODES = {
    40: "vn", 41: "va", 42: "vc", 43: "db", 56: "tpt", 57: "tbn", 58: "tba", 60: "hn", 64: "sax", 68: "ob", 70: "bn",
    71: "cl", 73: "fl",
}  # fmt: skip
TITLES = {3: "Dance", 1: "Jupiter", 40: "Miserere", 39: "Jerusalem"}  # number -> title; train and validation in turn
DETUNE = (0.31, -0.44, 0.02, 0.4999, -0.2)  # semitones off, by part
SCORE_TEMPO = 0.7  # of the performance
HIDDEN = b"\0\5\x16\7\0\2\0\0Mac OS X"


def write_urmp(
    folder: Path,
    pieces: Sequence[tuple[bytes | list[Note], np.ndarray]],
    titles: dict[int, str] = TITLES,
) -> dict[str, tuple[list[Note], np.ndarray]]:
    """Writes `Dataset/` with a folder a piece. Mixes are 48 kHz, 24 bits; every other one is stereo.

    Args:
        folder: where `Dataset` goes.
        pieces: (bytes of a MIDI file, or notes; float32 [S], mono, 16 kHz). Every `Note.instrument` is a part, of an
            instrument that URMP has (a key of CODES). Velocities are not kept.
        titles: number -> title of each piece, in order.

    Returns:
        folder's name -> its notes, each with its part (from 0) as `instrument`, and the audio [S].
    """
    made = {}
    dataset = folder / "Dataset"
    extra = dataset / "Supplementary_Files"
    extra.mkdir(parents=True)
    (extra / "Notes_1_vn_01_Jupiter.txt").write_text("not a note\n")
    (dataset / "._Supplementary_Files").write_bytes(HIDDEN)
    for index, ((number, title), (notes, audio)) in enumerate(zip(titles.items(), pieces, strict=False)):
        notes = read_midi(notes, as_published=True) if isinstance(notes, bytes) else notes
        numbers = sorted({note.instrument for note in notes})
        notes = [note._replace(velocity=100, instrument=numbers.index(note.instrument)) for note in notes]
        parts = [[note for note in notes if note.instrument == part] for part in range(len(numbers))]
        codes = [CODES[part[0].program] for part in parts]
        piece = f"{number:02}_{title}"
        name = "_".join([piece, *codes])
        made[name] = notes, audio
        here = dataset / name
        here.mkdir()
        sound = resample(audio, 16000, 48000)
        if index % 2:  # different channels, whose mean is the sound
            side = 0.005 * np.sin(np.arange(len(sound), dtype=np.float32) / 20)
            sound = np.stack([sound + side, sound - side], axis=1)
        soundfile.write(here / f"AuMix_{name}.wav", sound, 48000, subtype="PCM_24")
        write_midi([_in_score(note) for note in notes], here / f"Sco_{name}.mid")
        (here / f"Sco_{name}.pdf").write_bytes(b"%PDF-1.4")
        (here / f"Vid_{name}.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
        for part, (code, rows) in enumerate(zip(codes, parts, strict=True), start=1):
            if name == "15_Surprise_tpt_tpt_tbn" and part == 3:
                code = "tpt"
            end = f"{part}_{code}_{piece}"
            lines = [
                f"{note.onset:.9f}\t{_frequency(note.pitch + DETUNE[part - 1]):.3f}\t{note.offset - note.onset:.9f}\n"
                for note in sorted(rows, key=lambda note: note.onset)
            ]
            (here / f"Notes_{end}.txt").write_text("".join(lines))
            (here / f"F0s_{end}.txt").write_text("0.000\t0.000\n0.010\t440.000\n")
            soundfile.write(here / f"AuSep_{end}.wav", np.zeros(480), 48000, subtype="PCM_24")
        for path in list(here.iterdir()):
            (here / f"._{path.name}").write_bytes(HIDDEN)
        (dataset / f"._{name}").write_bytes(HIDDEN)
    return made


def _frequency(pitch: float) -> float:
    return 440 * 2 ** ((pitch - 69) / 12)


def _in_score(note: Note) -> Note:
    """In the score's time, and without its program, as most of URMP's scores are."""
    return note._replace(onset=note.onset / SCORE_TEMPO, offset=note.offset / SCORE_TEMPO, program=0)
