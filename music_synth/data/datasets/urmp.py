"""URMP: 44 pieces of chamber music, two to five players each, recorded one by one and mixed.

From labsites.rochester.edu/air/projects/URMP.html through a form, and at Dryad (doi.org/10.5061/dryad.ng3r749) as
`Dataset.tar.gz`, 12.5 GB with video, which unpacks to

    Dataset/01_Jupiter_vn_vc/          number, title, the instrument of each part
        AuMix_01_Jupiter_vn_vc.wav     the mix, 48 kHz, 24 bits
        Notes_1_vn_01_Jupiter.txt      of each part, a note a line: onset in s, frequency in Hz, duration in s
        AuSep_*, F0s_*, Sco_*, Vid_*   not read
    Dataset/Supplementary_Files/       not read

License: in the archive; CC0 by what others cite of the Dryad page (unchecked).

What we make of it:
- Notes come from `Notes_*` alone. The score MIDI (`Sco_*.mid`) keeps the score's time, not the players', and mostly
  lacks program changes. Labels follow the audio fairly, not closely (MT3's word is "fair").
- Frequencies are what was played, so pitches are rounded to semitones of 440 Hz. Instruments are PROGRAMS, as in MT3:
  saxes are 64, though other readers say 65. There are no velocities; all get VELOCITY. `instrument` is the part.
- A line with frequency 0 has no measured pitch, and one with duration 0 no sound: neither makes a note, and a
  warning counts them. Anything else that is not a note is an error.
- The folder names the instruments. In 15_Surprise_tpt_tpt_tbn the files of part 3, a trombone, are named `tpt`.
- Hidden files (`._*`, of the archive's macOS) are skipped.
- The split is MT3's, by piece number: VALIDATION, and all others train. There is no test split.
- Two players of one instrument may hold one pitch at a time. As published, training does not trim that.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

from music_synth.data.datasets.corpus import Found, ReaderOfOneFile, Recording, naming
from music_synth.errors import UserError
from music_synth.midi.notes import Note

PIECE = re.compile(r"(?P<number>\d\d)_(?P<title>[^_,\s]+)_(?P<instruments>[^,\s]+)")
PROGRAMS = {
    "vn": 40, "va": 41, "vc": 42, "db": 43, "tpt": 56, "tbn": 57, "tba": 58, "hn": 60, "sax": 64, "ob": 68, "bn": 70,
    "cl": 71, "fl": 73,
}  # fmt: skip
VALIDATION = frozenset({1, 2, 12, 13, 24, 25, 31, 38, 39})
MISNAMED = {("15_Surprise", 3): "tpt"}  # (piece, part) -> what its files say
VELOCITY = 100


class Urmp(ReaderOfOneFile):
    title = "URMP"
    archives = ("Dataset.tar.gz",)
    pieces = (44,)

    def recordings_in(self, root: Path) -> Found:
        recordings, missing = [], []
        for folder in _pieces(root):
            number, title, codes = _parse(folder)
            piece = f"{number}_{title}"
            files = [folder / f"AuMix_{folder.name}.wav"]
            for part, code in enumerate(codes, start=1):
                right_or_not = (code, MISNAMED.get((piece, part), code))
                names = [folder / f"Notes_{part}_{each}_{piece}.txt" for each in right_or_not]
                files.append(next((name for name in names if name.is_file()), names[0]))
            absent = [path.name for path in files if not path.is_file()]
            missing += [f"{folder.name}: no {name}" for name in absent]
            if not absent:
                split = "validation" if int(number) in VALIDATION else "train"
                recordings.append(Recording(folder.name, split, tuple(files)))
        return Found(recordings, missing)

    def read_notes(self, recording: Recording) -> list[Note]:
        audio, *parts = recording.files
        *_, codes = _parse(audio.parent)
        notes = []
        with naming(recording):
            for part, (path, code) in enumerate(zip(parts, codes, strict=True)):
                notes += _notes(recording.id, path, PROGRAMS[code], part)
        return notes


CORPUS = Urmp()


def _pieces(root: Path) -> list[Path]:
    """The pieces' folders, in `root` or the first folder of it that has any."""
    for folder in (root, *sorted(root.glob("*"))):
        pieces = sorted(path for path in folder.glob("[0-9][0-9]_*") if path.is_dir())
        if pieces:
            return pieces
    raise UserError(
        f"{root} does not hold URMP: no folder such as 01_Jupiter_vn_vc in it or in a folder of it; unpack "
        "Dataset.tar.gz there"
    )


def _parse(folder: Path) -> tuple[str, str, list[str]]:
    """Number, title and the instrument code of each part, as the folder's name gives them."""
    match = PIECE.fullmatch(folder.name)
    codes = match["instruments"].split("_") if match else []
    unknown = [code for code in codes if code not in PROGRAMS]
    if match is None or unknown:
        what = f"unknown instrument {unknown[0]!r}" if unknown else "not named like 01_Jupiter_vn_vc"
        raise UserError(f"{folder}: {what}; URMP has {', '.join(PROGRAMS)}: rename or remove the folder")
    return match["number"], match["title"], codes


def _notes(name: str, path: Path, program: int, part: int) -> list[Note]:
    """The notes of one part."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})") from error
    notes, silent = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            onset, frequency, duration = map(float, line.split())
            if not (math.isfinite(onset) and 0 <= frequency < math.inf and 0 <= duration < math.inf):
                raise ValueError
        except ValueError:
            said = f"{line.strip()[:40]!r}"
            raise UserError(f"line {number} of {path} is not onset, frequency and duration ({said})") from None
        if frequency > 0 and duration > 0:
            pitch = round(69 + 12 * math.log2(frequency / 440))
            notes.append(Note(pitch, VELOCITY, program, onset, onset + duration, instrument=part))
        else:
            silent += 1
    if not notes:  # else a part would sound without labels
        raise UserError(f"no notes in {path}")
    if silent:
        warnings.warn(f"{name}: {silent} lines of {path.name} without pitch or length make no notes", stacklevel=2)
    return notes
