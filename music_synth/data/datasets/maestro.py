"""MAESTRO, versions 3.0.0 and 2.0.0: piano competitions recorded on a Disklavier, 200 hours, labels good to 3 ms.

The download is `maestro-v3.0.0.zip` (101 GB) from https://magenta.tensorflow.org/datasets/maestro, under
CC BY-NC-SA 4.0: not for commercial use. It unpacks into

    maestro-v3.0.0/maestro-v3.0.0.csv, maestro-v3.0.0.json    the list, in two forms
    maestro-v3.0.0/2018/NAME.midi, NAME.wav                   ten years; 44.1 or 48 kHz, 16 bits, stereo

What to know, and what we do:

* The two forms of the list say the same. We read the CSV, or the JSON where only that is there. The JSON of
  v2.0.0 is a list of records, that of v3.0.0 has a table from row to value for each column.
* The splits are the list's own (962, 137 and 177 recordings in v3.0.0): no composition is in two of them.
* MIDI files hold keys and pedals. The sustain pedal lengthens notes, as published; other pedals are left out.
* `maestro-v3.0.0-midi.zip` has the same list and no audio: all its recordings are then missing.
* v2.0.0 also holds recordings with other instruments than the piano, which v3.0.0 dropped. It is a corpus of its
  own here (`CORPUS_V2`), since its splits are not the same.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from music_synth.data.datasets.corpus import SPLITS, Found, ReaderOfOneFile, Recording, folder_with, naming
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi

COLUMNS = ("split", "midi_filename", "audio_filename")  # those that we need


@dataclass(frozen=True)
class Maestro(ReaderOfOneFile):
    """The reader of one version; see `Corpus`."""

    version: str
    pieces: tuple[int, ...] = ()  # the list says
    audio_file = 1

    @property
    def title(self) -> str:
        return f"MAESTRO v{self.version}"

    @property
    def archives(self) -> tuple[str, ...]:
        return (f"maestro-v{self.version}.zip",)

    def recordings_in(self, root: Path) -> Found:
        """Lists what is in `root`: the folder `maestro-v3.0.0`, or one that holds it.

        Raises:
          UserError: the list is not there, cannot be read or lacks a column, or two rows are one recording.
        """
        path = self._list(root)
        recordings, missing, ids = [], [], set()
        for row, (split, midi, audio) in enumerate(_rows(path), start=1):
            if split not in SPLITS:
                raise UserError(f"{path}: row {row} has the split {split!r}, not one of {', '.join(SPLITS)}")
            name = re.sub(r"[\s,/\\]+", "_", midi.rpartition(".")[0])  # with the year, which its folder names
            if name in ids:
                raise UserError(f"{path}: row {row} lists {midi} once more; unpack {self.archives[0]} again")
            ids.add(name)
            lacking = [file for file in (midi, audio) if not (path.parent / file).is_file()]
            if lacking:
                missing.append(f"{name}: no {' and no '.join(lacking)}")
            else:
                recordings.append(Recording(name, split, (path.parent / midi, path.parent / audio)))
        return Found(recordings, missing)

    def read_notes(self, recording: Recording) -> list[Note]:
        """Notes as long as the sustain pedal lets them sound. UserError: see `read_midi`."""
        with naming(recording):
            return read_midi(recording.files[0], as_published=True)

    def _list(self, root: Path) -> Path:
        names = [f"maestro-v{self.version}.csv", f"maestro-v{self.version}.json"]
        for name in names:
            with contextlib.suppress(UserError):
                return folder_with(root, [name], self.title) / name
        raise UserError(
            f"{root} does not hold {self.title}: no {' and no '.join(names)} in it or in a folder of it; "
            f"unpack {self.archives[0]} there"
        )


CORPUS = Maestro("3.0.0")
CORPUS_V2 = Maestro("2.0.0")


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """The COLUMNS of every row of the list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            lines = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            table = json.loads(text)
            lines = table if isinstance(table, list) else _records(table)
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); unpack it again") from error
    if not lines:
        raise UserError(f"{path} lists no recordings; unpack it again")
    for row, line in enumerate(lines, start=1):
        for column in COLUMNS:
            if not isinstance(line, dict) or not isinstance(line.get(column), str) or not line[column]:
                raise UserError(f"{path}: row {row} has no {column}; unpack it again")
    split, midi, audio = COLUMNS
    return [(line[split], line[midi], line[audio]) for line in lines]


def _records(table: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    """Records of a table that is stored by columns. Its rows are numbered from "0"."""
    rows = sorted({row for column in table.values() for row in column}, key=int)
    return [{name: column.get(row) for name, column in table.items()} for row in rows]
