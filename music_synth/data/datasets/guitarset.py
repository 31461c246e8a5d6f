"""GuitarSet 1.1.0: 360 excerpts of about 30 s for one acoustic guitar, 44.1 kHz, from zenodo.org/records/3371780.

Download `annotation.zip`, `audio_mono-mic.zip` and `audio_mono-pickup_mix.zip` and unpack them into one folder, side
by side or each in a folder of its own name:

    annotation/            00_BN1-129-Eb_comp.jams          player_StyleN-tempo-key_{comp,solo}, N a progression
    audio_mono-mic/        00_BN1-129-Eb_comp_mic.wav       a microphone in front of the guitar
    audio_mono-pickup_mix/ 00_BN1-129-Eb_comp_mix.wav       the six strings of the pickup, mixed

The two zips named `audio_hex-pickup_*` (one channel a string) may lie there and are not read. License:
CC BY 4.0 by what others cite of the Zenodo page (unchecked; mirdata says MIT).

What we make of it:
- An item is an excerpt with one of its two recordings, 720 in all. Progressions 1 and 2 of each style are the
  training split and 3 is validation, as in MT3; there is no test split. MT3 counts 478 + 238 items where this gives
  480 + 240, and does not say which four it leaves out.
- Notes are the six `note_midi` annotations of the JAMS file, one a string. Their pitch is fractional, as measured,
  and is rounded. All get General MIDI program 24, as upstream, though the guitar had steel strings (25); JAMS knows
  no velocity, so all get VELOCITY. Their `instrument` is the string, 0 for the lowest.
- Two annotations are late: the first note is labelled where the second sounds (GuitarSet issue 5, which mends them by
  subtracting 0.409 s and 0.309 s from all times). We subtract: labels move earlier, audio stays.
- 02_Funk2-119-G_comp labels one pluck twice, 0.2 ms apart (issue 4). The shorter label is dropped.
- Two strings may sound one pitch at a time, which tokens cannot express: training trims the earlier note.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

from music_synth.data.datasets.corpus import Found, ReaderOfOneFile, Recording, naming
from music_synth.errors import UserError
from music_synth.midi.notes import Note

EXCERPT = re.compile(r"\d\d_(?:BN|Funk|Jazz|Rock|SS)(?P<progression>[123])-\d+-[A-G][#b]?_(?:comp|solo)")
FILE = re.compile(rf"(?P<excerpt>{EXCERPT.pattern})(?:\.jams|_(?:mic|mix)\.wav)")
ARCHIVES = {"mic": "audio_mono-mic.zip", "mix": "audio_mono-pickup_mix.zip"}
PROGRAM = 24
VELOCITY = 100
NUM_STRINGS = 6
LATE_SECONDS = {"04_BN3-154-E_comp": 0.409, "04_Jazz1-200-B_comp": 0.309}
TWICE_LABELLED = "02_Funk2-119-G_comp"
SAME_PLUCK_SECONDS = 0.001  # the two labels are 0.18 ms apart; nobody plucks a string twice in a millisecond


class GuitarSet(ReaderOfOneFile):
    title = "GuitarSet 1.1.0"
    archives = ("annotation.zip", *ARCHIVES.values())
    pieces = (360,)
    trim = True
    audio_file = 1

    def recordings_in(self, root: Path) -> Found:
        files = _files(root)
        if not any(name.endswith(".jams") for name in files):
            raise UserError(
                f"{root} does not hold {self.title}: no annotation such as 00_BN1-129-Eb_comp.jams in it or two "
                f"folders down; unpack {', '.join(self.archives)} there"
            )
        recordings, missing = [], []
        for excerpt in sorted({match["excerpt"] for match in map(FILE.fullmatch, files) if match}):
            parts = EXCERPT.fullmatch(excerpt)
            split = "validation" if parts and parts["progression"] == "3" else "train"
            labels = f"{excerpt}.jams"
            if labels not in files:
                missing.append(f"{excerpt}: no {labels} (from annotation.zip)")
                continue
            for kind, archive in ARCHIVES.items():
                audio = f"{excerpt}_{kind}.wav"
                if audio in files:
                    recordings.append(Recording(audio.removesuffix(".wav"), split, (files[labels], files[audio])))
                else:
                    missing.append(f"{excerpt}: no {audio} (from {archive})")
        return Found(recordings, missing)

    def read_notes(self, recording: Recording) -> list[Note]:
        with naming(recording):
            return _notes(recording.files[0])


CORPUS = GuitarSet()


def _files(root: Path) -> dict[str, Path]:
    """Annotations and mono audio by file name, from `root` and two levels of folders below it.

    Where a name comes twice, the file nearer to `root` counts. Hidden files (`._*` of macOS archives) do not.
    """
    files = {}
    for pattern in ("*/*/*", "*/*", "*"):
        for path in sorted(root.glob(pattern)):
            if FILE.fullmatch(path.name):
                files[path.name] = path
            elif path.suffix == ".jams" and not path.name.startswith("."):
                raise UserError(f"{path} is not named like GuitarSet's 00_BN1-129-Eb_comp.jams; rename or remove it")
    return files


def _notes(path: Path) -> list[Note]:
    """The notes of all strings, mended."""
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        strings = [
            [(float(row["time"]), float(row["duration"]), round(float(row["value"]))) for row in annotation["data"]]
            for annotation in annotations
            if annotation["namespace"] == "note_midi"
        ]
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a JAMS file of GuitarSet ({reason})") from error
    if len(strings) != NUM_STRINGS:
        raise UserError(f"{path} has {len(strings)} note_midi annotations, not one for each of {NUM_STRINGS} strings")
    if path.stem == TWICE_LABELLED:
        strings = [_once(rows) for rows in strings]
    late = LATE_SECONDS.get(path.stem)
    if late is not None:  # known to the millisecond, so the first note may come out a hair before 0
        strings = [[(max(0.0, time - late), duration, pitch) for time, duration, pitch in rows] for rows in strings]
    return [
        Note(pitch, VELOCITY, PROGRAM, time, time + duration, instrument=string)
        for string, rows in enumerate(strings)
        for time, duration, pitch in rows
    ]


def _once(rows: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """(time, duration, pitch) of one string, with the longer of two labels of one pluck only."""
    rows = sorted(rows)
    twice = {
        min(one, two, key=lambda row: row[1])
        for one, two in pairwise(rows)
        if one[2] == two[2] and two[0] - one[0] < SAME_PLUCK_SECONDS
    }
    return [row for row in rows if row not in twice]
