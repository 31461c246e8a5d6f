"""Recordings of your own: audio files, each with the MIDI file of what is played in it.

    python -m music_synth.prepare_data pairs --source FOLDER --dry_run
    python -m music_synth.prepare_data pairs --source FOLDER --out prepared/mine

* A MIDI file belongs to the audio file of its name, beside it or in parallel folders `audio/` and `midi/`, at any
  depth. Where names do not tell, a manifest does: CSV with a header, or a JSON object a line, of the columns audio,
  midi and, if wanted, split and program.
* A split is the manifest's; else that of a folder `train`, `validation` or `test` on the way to the file; else by
  chance, 8:1:1, at least one pair each. One or two recordings are each cut in time instead.
* Notes are those that a player sounds, lengthened by the pedals: see `midi.players`.
* `pairs_check` says which of the pairs belong together, and how the notes are to be moved.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from music_synth.audio.io import read_audio
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.data.datasets.corpus import SPLITS, Content, Corpus, Found, Measured, check, naming
from music_synth.data.prepared import TRANSCRIBED
from music_synth.errors import UserError, telling
from music_synth.files import write_whole
from music_synth.midi import smf
from music_synth.midi.notes import Note, check_notes, midi_bytes, sounding

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64")
FOREIGN_SUFFIXES = (".m4a", ".aac", ".wma", ".mp4")  # that libsndfile does not read
PARALLEL = ("audio", "midi")  # folders whose names do not count
MANIFESTS = ("manifest.csv", "manifest.jsonl")
COLUMNS = ("audio", "midi", "split", "program")
DRUMS = "drums"
MEND = "mend it"
CUTS = (0.8, 0.9)  # of a recording's length: where validation and test begin, if there are less than three
CUT_SEARCH = 0.05  # of its length, to either side of these


class Instrument(NamedTuple):
    """What plays where a MIDI file names no program, or whatever it names."""

    program: int | None = None  # None: drums
    always: bool = False

    @classmethod
    def named(cls, text: str, where: str, always: bool = False) -> Instrument:
        """Reads "0" to "127", or "drums"; UserError says `where` another text stands."""
        if text.strip().lower() == DRUMS:
            return cls(None, always)
        if not text.strip().isdecimal() or int(text) > 127:
            raise UserError(f"{where} {text}: give a program of General MIDI, 0 to 127, or {DRUMS}")
        return cls(int(text), always)


@dataclass(frozen=True)
class Pair(Measured):
    """Audio and its notes: `files` are both. What is heard at offset + stretch * t the MIDI file has at t."""

    instrument: Instrument | None = None
    offset: float = 0.0  # seconds
    stretch: float = 1.0
    part: tuple[float, float] | None = None  # seconds of the audio from .. to; None: all of it

    @property
    def settings(self) -> str:
        return repr((self.instrument, self.offset, self.stretch, self.part))


class Pairs(Corpus):
    """The reader."""

    title = "audio files with their MIDI files"

    def recordings_in(self, root: Path) -> Found:
        """Finds the pairs in `root`; whether they belong together is not looked at."""
        return find_pairs(root)

    def read_notes(self, recording: Pair) -> list[Note]:
        """Notes at their places in the audio."""
        with naming(recording, MEND):
            return placed(notes_of(recording.files[1], recording.instrument), recording)

    def read(self, recording: Pair) -> Content:
        """Notes and audio. UserError: one of the files cannot be read, or the audio ends before the notes do."""
        with naming(recording, MEND):
            notes, audio = self.read_notes(recording), read_audio(recording.files[0])
            if recording.part is not None:
                first, end = (round(second * SAMPLE_RATE) for second in recording.part)
                audio = audio[first:end]
            return check(recording, notes, np.ascontiguousarray(audio))


CORPUS = Pairs()


def notes_of(path: Path, instrument: Instrument | None = None) -> list[Note]:
    """Notes of a MIDI file as a player sounds them, played by `instrument` where it says so. UserError: see `load`."""
    midi = smf.load(path)
    if instrument is not None:
        midi = played_by(midi, instrument)
    notes = sounding(midi)
    if not notes:
        raise UserError(f"{path} holds no notes")
    return notes


def played_by(midi: smf.MidiFile, instrument: Instrument) -> smf.MidiFile:
    """The file with the instrument on every channel that names no program; with `always` on all but drum channels."""
    named = {event.channel for track in midi.tracks for event in track if event.kind == smf.PROGRAM_CHANGE}
    changed = set(range(16)) - {smf.DRUM_CHANNEL} - (set() if instrument.always else named)
    if instrument.program is None:
        first = [smf.Event(0, smf.RHYTHM_PART, channel, 1, 0) for channel in sorted(changed)]
    else:
        first = [smf.Event(0, smf.PROGRAM_CHANGE, channel, instrument.program, 0) for channel in sorted(changed)]
    tracks = [
        [event for event in track if not (event.kind == smf.PROGRAM_CHANGE and event.channel in changed)]
        for track in midi.tracks
    ]
    return midi._replace(tracks=[first, *tracks], ends=[0, *midi.ends])


def placed(notes: Sequence[Note], pair: Pair) -> list[Note]:
    """Notes moved to where they are heard, as far as the pair's part of the audio has their onsets."""
    first, end = pair.part or (0.0, float("inf"))
    moved = []
    for note in notes:
        onset, offset = (pair.offset + pair.stretch * time - first for time in (note.onset, note.offset))
        if pair.part is None:
            onset = max(onset, 0.0)
        if 0 <= onset < end - first and onset < offset:
            moved.append(note._replace(onset=onset, offset=min(offset, end - first)))
    return moved


# --- which files belong together ---------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """Files that belong together by their names, or by a manifest."""

    name: str
    audio: Path
    midi: Path
    split: str
    instrument: Instrument | None


def find_pairs(
    source: Path, manifest: Path | None = None, instrument: Instrument | None = None, seed: int = 0
) -> Found:
    """Finds the pairs of a folder; `missing` lists files without a partner, and what cannot be told.

    Args:
      source: the folder.
      manifest: lists the pairs; None: `manifest.csv` or `manifest.jsonl` in the folder, or else the names tell.
      instrument: of what the manifest gives none.
      seed: of the splits, where they are by chance.

    Raises:
      UserError: no such folder; a manifest that cannot be read, or says what cannot be.
    """
    if not source.is_dir():
        raise UserError(f"no folder {source}: give one with audio files and their MIDI files")
    manifest = manifest or next((source / name for name in MANIFESTS if (source / name).is_file()), None)
    candidates, missing = _by_name(source) if manifest is None else _by_manifest(manifest)
    candidates = _with_splits(candidates, seed)
    pairs, ids = [], set[str]()
    for one in candidates:
        label = re.sub(r"[^\w.-]+", "_", one.name)
        if label in ids:
            label += "-" + hashlib.sha256(one.name.encode()).hexdigest()[:8]
        ids.add(label)
        pairs.append(Pair(label, one.split, (one.audio, one.midi), 0.0, one.instrument or instrument))
    return Found(pairs, missing)


def audio_without_midi(source: Path) -> list[Path]:
    """Lists the audio files of a folder that have no MIDI file of their name."""
    return [path for _, files, midis in _named(source) if not midis for path in files]


def write_transcript(audio: Path, transcribe: Callable[[np.ndarray], list[Note]]) -> Path | None:
    """Writes what a program hears in an audio file beside it, as a MIDI file to be corrected.

    None: it hears nothing. UserError: it fails, the audio cannot be read, or the file not be written.
    """
    path = audio.with_name(f"{audio.stem}{TRANSCRIBED}.mid")
    notes = transcribe(read_audio(audio))
    if not notes:
        return None
    with telling(f"cannot write {path}"):
        write_whole(path, midi_bytes(check_notes(notes)))
    return path


def _named(source: Path) -> Iterator[tuple[str, list[Path], list[Path]]]:
    """(name, audio files, MIDI files of that name), by name. A MIDI file that a program wrote counts where alone."""
    audio, midi, transcribed = (defaultdict[str, list[Path]](list) for _ in range(3))
    for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
        suffix, name = path.suffix.lower(), path.stem
        if suffix in (*AUDIO_SUFFIXES, *FOREIGN_SUFFIXES):
            found = audio
        elif suffix in smf.SUFFIXES:
            found = transcribed if name.endswith(TRANSCRIBED) else midi
        else:
            continue
        parts = path.relative_to(source).parent.parts
        parts = tuple(part for part in parts if part.lower() not in PARALLEL)
        key = "/".join((*parts, name.removesuffix(TRANSCRIBED)))
        found[unicodedata.normalize("NFC", key)].append(path)  # macOS stores letters and accents apart
    for key in sorted({*audio, *midi, *transcribed}):
        yield key, audio.get(key, []), midi.get(key) or transcribed.get(key, [])


def _by_name(source: Path) -> tuple[list[Candidate], list[str]]:
    candidates, missing = [], []
    for name, audio, midi in _named(source):
        if not audio:
            missing.append(f"{name}: {midi[0]} has no audio file of its name")
        elif not midi:
            missing.append(f"{name}: {audio[0]} has no MIDI file of its name; --transcribe basic_pitch writes one")
        elif len(audio) > 1 or len(midi) > 1:
            several = audio if len(audio) > 1 else midi
            missing.append(f"{name}: {several[0].name} and {several[1].name} are both there; leave one, or a manifest")
        elif audio[0].suffix.lower() in FOREIGN_SUFFIXES:
            missing.append(f"{name}: {audio[0]} is not read; convert it to WAV or FLAC")
        else:
            split = next((part for part in name.split("/") if part in SPLITS), "")
            label = name.replace("/", ".") + TRANSCRIBED * midi[0].stem.endswith(TRANSCRIBED)
            candidates.append(Candidate(label, audio[0], midi[0], split, None))
    return candidates, missing


def _by_manifest(path: Path) -> tuple[list[Candidate], list[str]]:
    candidates, missing = [], []
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in COLUMNS[:2]):
            raise UserError(f"{where}: it needs audio and midi, the names of two files")
        if unknown := [str(name) for name in row if name not in COLUMNS]:
            raise UserError(f"{where}: unknown column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
        split, program = (str(value) if (value := row.get(name)) is not None else "" for name in COLUMNS[2:])
        if split and split not in SPLITS:
            raise UserError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
        instrument = Instrument.named(program, f"{where}: program", always=True) if program else None
        audio, midi = (path.parent / row[name] for name in COLUMNS[:2])
        label = ".".join(Path(row["audio"]).with_suffix("").parts).lstrip("./")
        lacking = [file for file in (audio, midi) if not file.is_file()]
        if lacking:
            missing.append(f"{label}: no file {' and no file '.join(map(str, lacking))} ({where})")
        else:
            label += TRANSCRIBED * midi.stem.endswith(TRANSCRIBED)
            candidates.append(Candidate(label, audio, midi, split, instrument))
    return candidates, missing


def _rows(path: Path) -> list:
    """The rows of a manifest, one dictionary each if all is well."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a manifest ({error}): give CSV, or JSON lines") from error


def _with_splits(candidates: list[Candidate], seed: int) -> list[Candidate]:
    """Every candidate with a split: its own, if there are any, and else by chance. Fewer than three: with none."""
    if any(one.split for one in candidates):
        return [one._replace(split=one.split or SPLITS[0]) for one in candidates]
    if len(candidates) < len(SPLITS):
        return candidates
    drawn = sorted(candidates, key=lambda one: hashlib.sha256(f"{seed}/{one.name}".encode()).hexdigest())
    held_out = max(1, round(len(drawn) / 10))
    splits = dict(zip(drawn, ["test"] * held_out + ["validation"] * held_out, strict=False))
    return [one._replace(split=splits.get(one, "train")) for one in candidates]


def cut(pair: Pair) -> list[Pair]:
    """The parts of a pair that has no split, one for each split, cut where the fewest notes sound."""
    if pair.split:
        return [pair]
    notes = placed(notes_of(pair.files[1]), pair)
    grid = np.linspace(0.0, pair.seconds, 1 + max(1, round(pair.seconds * 20)))
    sounding = np.zeros(len(grid))
    for note in notes:
        sounding += (grid >= note.onset) & (grid < note.offset)
    ends = [0.0]
    for share in CUTS:
        near = np.abs(grid / pair.seconds - share) <= CUT_SEARCH / 2
        places = grid[near & (sounding == sounding[near].min())]
        ends.append(float(places[np.abs(places / pair.seconds - share).argmin()]))
    ends.append(pair.seconds)
    return [
        replace(pair, id=f"{pair.id}.{split}", split=split, part=(first, end), seconds=end - first)
        for split, first, end in zip(SPLITS, ends, ends[1:], strict=False)
    ]
