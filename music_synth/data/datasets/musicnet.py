"""MusicNet: 330 recordings of chamber and piano music, 34 hours; and MusicNet-EM: better labels for 323 of them.

The downloads are `musicnet.tar.gz` (11 GB, https://zenodo.org/records/5120004, CC BY 4.0) and, for MusicNet-EM,
also `musicnet_em.zip` (https://github.com/benadar293/benadar293.github.io, CC BY-NC-SA 4.0: not for commercial
use), unpacked beside it or into it:

    musicnet/train_data/1727.wav, test_data/1759.wav          44.1 kHz, mono, 32-bit floats
    musicnet/train_labels/1727.csv, test_labels/1759.csv      a row for each note
    musicnet_em/1727.mid                                      MusicNet-EM
    musicnet_metadata.csv                                     optional, a download of its own: lists the 330

What to know, and what we do:

* Times are samples at 44.1 kHz: start_time / 44100 is the onset in seconds. There are no velocities; we write 100,
  as Magenta's reader did.
* Instruments are General MIDI numbers that count from 1: only so do the 11 numbers in the files (`PROGRAMS`) name the
  11 instruments of the paper, one by one, and Magenta's reader, of the group that made the published records,
  subtracts 1 too. Taken as they are, violin (41) would be viola, cello (43) contrabass, and flute (74) recorder. A
  number besides these 11 is an error.
* The split is the published one: 15 recordings each for validation and test, drawn from both folders, the other 300 to
  train with. `CORPUS_OFFICIAL` (the data set musicnet_official) has the authors' 10 test recordings and no validation.
* The labels were aligned by dynamic time warping: about 4% are wrong and onsets are often off by more than 50 ms.
  MusicNet-EM has onsets good to 32 ms, and velocities that mean nothing (we keep the file's).
* MusicNet-EM lacks `EM_LACKS`, which are listed as missing.
* MusicNet-EM's programs count from 0, but come from the scores, which by others' reports write some second violins as
  pizzicato strings (45); its first edition had no instruments at all. A program that MusicNet's own labels of the
  recording do not have gives way to the program of the note of that pitch in them that begins nearest, so MusicNet-EM
  needs those labels too. (Nobody here has seen the files.)
* The scores of `musicnet_midis.tar.gz` are not aligned with the recordings, and folders that other projects call
  `train_labels_midi` and `test_labels_midi` (with 1759 and 1819 twice) are not in the archives. None is ever read.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from music_synth.data.datasets.corpus import Found, ReaderOfOneFile, Recording, folder_with, naming
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi

LABEL_RATE = 44100  # of the times in labels, whatever the rate of the audio
VELOCITY = 100
PROGRAMS = {  # instrument in labels: General MIDI program, counted from 0
    1: 0,  # piano
    7: 6,  # harpsichord
    41: 40,  # violin
    42: 41,  # viola
    43: 42,  # cello
    44: 43,  # contrabass
    61: 60,  # horn
    69: 68,  # oboe
    71: 70,  # bassoon
    72: 71,  # clarinet
    74: 73,  # flute
}
FOLDERS = ("train_data", "train_labels", "test_data", "test_labels")
COLUMNS = ("start_time", "end_time", "instrument", "note")  # those that we need
HELD_OUT = {  # split of the corpus: {split: recordings}; the others are for training
    "published": {
        "validation": "1733 1765 1790 1818 2160 2198 2289 2300 2308 2315 2336 2466 2477 2504 2611".split(),
        "test": "1729 1776 1813 1893 2118 2186 2296 2431 2432 2487 2497 2501 2507 2537 2621".split(),
    },
    "official": {"test": "1759 1819 2106 2191 2298 2303 2382 2416 2556 2628".split()},
}
EM_LACKS = ("2194", "2211", "2227", "2230", "2292", "2305", "2310")  # short preludes and fugues by Bach


@dataclass(frozen=True)
class MusicNet(ReaderOfOneFile):
    """The reader of MusicNet, with its own labels or those of MusicNet-EM; see `Corpus`."""

    em: bool = False
    split: str = "published"  # or "official"

    def __post_init__(self):
        if self.split not in HELD_OUT:
            raise UserError(f"unknown split of MusicNet {self.split!r}; choose one of {', '.join(HELD_OUT)}")

    @property
    def title(self) -> str:
        return "MusicNet-EM" if self.em else "MusicNet"

    @property
    def archives(self) -> tuple[str, ...]:
        return ("musicnet.tar.gz", *(["musicnet_em.zip"] if self.em else []))

    @property
    def pieces(self) -> tuple[int, ...]:
        return (330 - len(EM_LACKS),) if self.em else (330,)

    def recordings_in(self, root: Path) -> Found:
        """Lists what is in `root`: the folder with `train_data`, or one that holds it (and `musicnet_em`).

        Without `musicnet_metadata.csv` only `pieces` tells of a recording for training that has no file at all.

        Raises:
          UserError: one of the folders is not there, or the metadata has no ids.
        """
        folder = folder_with(root, FOLDERS, "MusicNet (unpack musicnet.tar.gz there)")
        parts = {kind: [folder / f"{part}_{kind}" for part in ("train", "test")] for kind in ("data", "labels")}
        kinds = {  # what a recording is made from: {what: {id: path}}
            "{}.wav in train_data or test_data": _by_id(parts["data"], ".wav"),
            "{}.csv in train_labels or test_labels": _by_id(parts["labels"], ".csv"),
        }
        if self.em:
            nests = [base / "musicnet_em" for base in (root, folder)]
            midis = _by_id([*nests, *(nest / "musicnet_em" for nest in nests)], ".mid")
            if not midis:
                raise UserError(f"{root} does not hold MusicNet-EM; unpack musicnet_em.zip there")
            kinds["musicnet_em/{}.mid"] = midis
        held_out = {id_: split for split, ids in HELD_OUT[self.split].items() for id_ in ids}
        recordings, missing = [], []
        for id_ in sorted({*held_out, *_listed(root, folder), *(id_ for files in kinds.values() for id_ in files)}):
            lacking = [kind for kind, files in kinds.items() if id_ not in files]
            if lacking:
                known = ", which MusicNet-EM does not have" if self.em and id_ in EM_LACKS else ""
                missing.append(f"{id_}: no {' and no '.join(kind.format(id_) for kind in lacking)}{known}")
            else:
                files = tuple(files[id_] for files in kinds.values())
                recordings.append(Recording(id_, held_out.get(id_, "train"), files))
        return Found(recordings, missing)

    def read_notes(self, recording: Recording) -> list[Note]:
        """Notes of one recording. UserError: labels or a MIDI file that cannot be read, an unknown instrument."""
        _, labels, *midi = recording.files
        with naming(recording):
            notes = _read_labels(labels)
            return _with_known_programs(read_midi(midi[0], as_published=True), notes) if midi else notes


CORPUS = MusicNet()
CORPUS_OFFICIAL = MusicNet(split="official")
CORPUS_EM = MusicNet(em=True)


def _by_id(folders: Sequence[Path], suffix: str) -> dict[str, Path]:
    """The files of the folders whose names are numbers, which those of hidden files are not."""
    return {path.stem: path for folder in folders for path in folder.glob(f"*{suffix}") if path.stem.isdecimal()}


def _listed(*folders: Path) -> set[str]:
    """The ids in the metadata, if one of the folders has it."""
    for path in (folder / "musicnet_metadata.csv" for folder in folders):
        if path.is_file():
            try:  # only ids matter here, and names with accents come in more than one encoding
                lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig", errors="replace"), newline=""))
                ids = {line["id"] for line in lines}
                if ids and all(id_ is not None and id_.isdecimal() for id_ in ids):
                    return ids
            except (OSError, KeyError, csv.Error):
                pass
            raise UserError(f"{path} has no column of ids; download it again, or delete it: it is optional")
    return set()


def _read_labels(path: Path) -> list[Note]:
    """The notes of a CSV file. Those of one program are one instrument."""
    if not path.is_file():
        raise UserError(f"no labels at {path}")
    notes = []
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as labels ({error})") from error
    for row, line in enumerate(lines, start=1):
        try:
            start, end, instrument, pitch = (int(line[column]) for column in COLUMNS)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: row {row} needs a whole number in each of {', '.join(COLUMNS)}") from None
        if instrument not in PROGRAMS:
            known = ", ".join(map(str, PROGRAMS))
            raise UserError(f"{path}: row {row} has the instrument {instrument}, which is none of {known}")
        number = list(PROGRAMS).index(instrument)
        onset, offset = start / LABEL_RATE, end / LABEL_RATE
        notes.append(Note(pitch, VELOCITY, PROGRAMS[instrument], onset, offset, instrument=number))
    return notes


def _with_known_programs(notes: Sequence[Note], labels: Sequence[Note]) -> list[Note]:
    """The notes, where a program that `labels` lack gives way to that of the label of that pitch which begins nearest.

    Where no label has the pitch, the program stays.
    """
    known = {label.program for label in labels}
    of_pitch: dict[int, list[Note]] = defaultdict(list)
    for label in labels:
        of_pitch[label.pitch].append(label)

    def program(note: Note) -> int:
        if note.program in known or not of_pitch[note.pitch]:
            return note.program
        return min(of_pitch[note.pitch], key=lambda label: abs(label.onset - note.onset)).program

    return [note._replace(program=program(note)) for note in notes]
