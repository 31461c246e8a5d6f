"""The TFRecords that the published models were trained on, for those who hold them, in place of an archive.

    maestro      maestro-v3.0.0_ns_wav_{train,validation,test}.tfrecord-?????-of-00025
    slakh        slakh_multi_full_subsets_10_train_all_inst.tfrecord-?????-of-02307,
                 slakh_multi_full_{validation,test}_all_inst.tfrecord-?????-of-{00168,00109}
    cerberus4    slakh_multi_cerberus_SPLIT_bass:drums:guitar:piano.tfrecord-?????-of-{00286,00212,00106}
    guitarset    {train,validation}.tfrecord-?????-of-{00019,00006}
    musicnet     musicnet-{train,validation,test}.tfrecord-?????-of-{00036,00005,00003}
    musicnet_em  {train,validation,test}.tfrecord-?????-of-{00103,00005,00006}
    urmp         {train,validation}.tfrecord

So they are called in MT3's list of data sets (in gs://magentadata/datasets/maestro/v3.0.0 and gs://mt3/data/datasets),
and that list and its readers say what they hold (`KINDS`). Nobody here has seen the files.

What we make of them:
- Names may differ, as long as they carry `.tfrecord` and they or their folder say the split. The number of shards is
  what the names say; shards that are not there are missing.
- Programs, drums, pedals and parts are resolved as the readers of the archives do: by what plays, not by the program
  in the NoteSequence, but for MAESTRO and MusicNet, where it is right. Pitch bends are ignored.
- GuitarSet's are as they are: the four items that 478 and 238 lack of 480 and 240 fit the two excerpts with late
  labels, twice each (a guess), so nothing is mended here.
- Recordings have the ids of the records; where several share one, as the sub-mixes of a song do, they are numbered.
- Listing reads lengths and ids, labels read labels, and only loading reads all, and checks what TensorFlow wrote
  to check it by. So a dry run is quick, though Slakh's stems are ten times what we need of it; and a damaged sample
  is only seen by a build.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from music_synth.audio.io import read_audio, resample
from music_synth.data.datasets import guitarset, urmp
from music_synth.data.datasets.corpus import SPLITS, Content, Corpus, Found, Recording, check, naming
from music_synth.data.datasets.tf_example import Example, framed, is_whole, mapped
from music_synth.data.note_sequences import parse_note_sequence
from music_synth.errors import UserError
from music_synth.midi.notes import Note, apply_sustain
from music_synth.midi.segments import SAMPLE_RATE
from music_synth.midi.tokenizer import SLAKH_PROGRAMS

NAME = re.compile(r"(?P<stem>[^.].*)\.tfrecords?(?:-(?P<number>\d{5})-of-(?P<total>\d{5}))?")
SPLIT = re.compile(rf"(?<![a-z])(?:{'|'.join(SPLITS)})(?![a-z])")
BUILT_HERE = "dataset_info.json"  # lies beside the TFRecords of tfds's data sets, ours among them
AGAIN = "download the file again"
# What plays: (program, whether it is drums), by its name.
SLAKH_CLASSES = (
    "Acoustic Piano|Electric Piano|Chromatic Percussion|Organ|Acoustic Guitar|Clean Electric Guitar|"
    "Distorted Electric Guitar|Acoustic Bass|Electric Bass|Violin|Viola|Cello|Contrabass|Orchestral Harp|Timpani|"
    "String Ensemble|Synth Strings|Choir and Voice|Orchestral Hit|Trumpet|Trombone|Tuba|French Horn|Brass Section|"
    "Soprano/Alto Sax|Tenor Sax|Baritone Sax|Oboe|English Horn|Bassoon|Clarinet|Pipe|Synth Lead|Synth Pad"
).split("|")
SLAKH = {name: (program, False) for name, program in zip(SLAKH_CLASSES, SLAKH_PROGRAMS, strict=True)}
QUARTET = {"bass": (32, False), "drums": (0, True), "guitar": (24, False), "piano": (0, False)}


class Kind(NamedTuple):
    """How the records of a data set are laid out."""

    features: frozenset[str]
    splits: tuple[str, ...] = SPLITS
    id: str = "id"
    audio: str = "audio"  # a WAV file, or samples
    rate: str = ""  # sample rate of the samples; "": a WAV file
    sequences: str = "sequence"  # one, or one a part
    programs: Mapping[str, tuple[int, bool]] | None = None  # of each part by `inst_names`; None: as in the sequence
    pieces: tuple[int, ...] = ()  # records in all, as published


MULTITRACK = Kind(
    frozenset(
        "audio_sample_rate inst_names midi_class mix note_sequences plugin_name program_num slakh_class src_ids "
        "stems stems_shape target_type track_id".split()
    ),
    id="track_id",
    audio="mix",
    rate="audio_sample_rate",
    sequences="note_sequences",
)
KINDS = {
    "maestro": Kind(frozenset({"audio", "sequence", "id"}), pieces=(1276,)),
    "slakh": MULTITRACK._replace(programs=SLAKH | {"Drums": (0, True)}),
    "cerberus4": MULTITRACK._replace(programs=QUARTET),
    "guitarset": Kind(
        frozenset({"sequence", "audio", "velocity_range", "id"}),
        SPLITS[:2],
        programs={"": (guitarset.PROGRAM, False)},
        pieces=(478 + 238,),
    ),
    "musicnet": Kind(frozenset({"id", "sample_rate", "audio", "sequence"}), rate="sample_rate", pieces=(330,)),
    "musicnet_em": Kind(frozenset({"id", "sample_rate", "audio", "sequence"}), rate="sample_rate"),
    "urmp": Kind(
        frozenset({"id", "tracks", "inst_names", "audio", "sequence", "instrument_sequences"}),
        SPLITS[:2],
        sequences="instrument_sequences",
        programs={code: (program, False) for code, program in urmp.PROGRAMS.items()},
        pieces=(44,),
    ),
}


@dataclass(frozen=True)
class Record(Recording):
    """A record of a TFRecord file."""

    kind: str  # of KINDS
    number: int  # in its file, from 1
    start: int  # where its content lies in the file, in bytes
    end: int


def files(name: str, root: Path) -> list[tuple[Path, re.Match[str]]]:
    """Lists the TFRecords of a data set, with their names taken apart.

    They lie in `root` and its folders, or in that called `name`, which may stand beside those of other data sets.
    """
    for folder in (root / name, root):
        paths = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
        matches = [(path, NAME.fullmatch(path.name)) for path in paths if not (path.parent / BUILT_HERE).exists()]
        found = [(path, match) for path, match in matches if match]
        if found:
            return found
    return []


def recordings_in(name: str, corpus: Corpus, root: Path) -> Found:
    """Lists the records in `root`; missing are shards, splits, and what comes after damage in a file.

    Raises:
      UserError: `name` has no such TFRecords, or files are of another data set, or nothing says of which split.
    """
    if name not in KINDS:
        raise UserError(
            f"{root} holds TFRecords, but {name} is made from {' and '.join(corpus.archives)} only;"
            f" TFRecords are read for {', '.join(KINDS)}"
        )
    series: dict[str, dict[tuple[Path, str, int], dict[int, Path]]] = {split: {} for split in SPLITS}
    for path, match in files(name, root):
        _refuse_other_names(name, corpus.title, path, match["stem"])
        named = SPLIT.search(match["stem"]) or SPLIT.search(path.parent.name)
        if named is None:
            raise UserError(f"{path}: neither its name nor its folder's says {', '.join(SPLITS)}; rename it")
        key = path.parent, match["stem"], int(match["total"] or 1)
        series[named[0]].setdefault(key, {})[int(match["number"] or 0)] = path
    records: list[Record] = []
    missing: list[str] = []
    for split, found in series.items():
        if len(found) > 1:
            one, two = (next(iter(paths.values())) for paths in list(found.values())[:2])
            raise UserError(f"{one} and {two} are of two sets of TFRecords for {split}; move one of them away")
        if not found and split in KINDS[name].splits:
            missing.append(f"no TFRecords of {split} in {root}")
        for (folder, stem, total), paths in found.items():
            missing += [
                f"no {stem}.tfrecord-{number:05d}-of-{total:05d} in {folder}"
                for number in range(total)
                if number not in paths
            ]
            for _, path in sorted(paths.items()):
                more, damage = _records(name, split, path)
                records += more
                missing += damage
    return Found(_numbered(records), missing)


def read_notes(record: Record) -> list[Note]:
    """Reads the notes of a record. UserError: a feature is missing, or cannot be read."""
    with _placed(record):
        return _notes(KINDS[record.kind], _example(record))


def seconds(record: Record) -> float:
    """Returns the length of its audio, by number of samples or the WAV file's header. UserError: as `read_notes`."""
    import soundfile

    kind = KINDS[record.kind]
    with _placed(record):
        example = _example(record)
        if kind.rate:
            return example.num_floats(kind.audio) / _rate(kind, example)
        descriptor = os.open(record.files[0], os.O_RDONLY)
        os.lseek(descriptor, example.place(kind.audio)[0], os.SEEK_SET)
        return soundfile.info(descriptor).duration  # closes it


def read(record: Record) -> Content:
    """Notes and audio of a record, of which every byte is checked. UserError: as `read_notes`, or it is damaged."""
    kind = KINDS[record.kind]
    with _placed(record) as placed:
        data = mapped(record.files[0])
        if not is_whole(data, record.start, record.end):
            raise ValueError("damaged: its checksum is wrong")
        example = Example(data, record.start, record.end)
        notes = _notes(kind, example)
        if not kind.rate:
            return check(placed, notes, read_audio(example.string(kind.audio)))
        samples = example.floats(kind.audio)
        if not len(samples) or not np.isfinite(samples).all():
            raise ValueError(f"{kind.audio} holds no samples, or samples that are NaN or infinite")
        return check(placed, notes, resample(samples, _rate(kind, example), SAMPLE_RATE))


# --- what a record says ---


def _notes(kind: Kind, example: Example) -> list[Note]:
    """The notes of all parts. `instrument` is the part, where there is more than one sequence."""
    several = "inst_names" in kind.features
    sequences = example.strings(kind.sequences) if several else [example.string(kind.sequences)]
    names = [name.decode() for name in example.strings("inst_names")] if several else [""]
    if len(names) != len(sequences):
        raise ValueError(f"{len(names)} inst_names for {len(sequences)} {kind.sequences}")
    result: list[Note] = []
    for part, (name, sequence) in enumerate(zip(names, sequences, strict=True)):
        notes, pedals = parse_note_sequence(sequence)
        if kind.programs is not None:
            if name not in kind.programs:
                raise ValueError(f"unknown instrument {name!r}: none of {', '.join(kind.programs)}")
            program, is_drum = kind.programs[name]
            notes = [note._replace(program=program, is_drum=is_drum) for note in notes]
        if wrong := [note for note in notes if not note.onset < note.offset]:  # which the pedal would hide
            raise ValueError(f"{wrong[0]} does not end after it begins")
        notes = apply_sustain(notes, pedals)
        result += [note._replace(instrument=part) for note in notes] if several else notes
    return result


def _example(record: Record) -> Example:
    return Example(mapped(record.files[0]), record.start, record.end)


def _rate(kind: Kind, example: Example) -> float:
    rate = example.number(kind.rate)
    if not 1000 <= rate <= 1e6:
        raise ValueError(f"{kind.rate} is {rate}")
    return rate


@contextlib.contextmanager
def _placed(record: Record) -> Iterator[Record]:
    """The record, with an id that says where it is; errors of its content say so and what to do."""
    import soundfile

    placed = replace(record, id=f"{record.id} (record {record.number} of {record.files[0].name})")
    with naming(placed, AGAIN, (UserError, OSError, ValueError, soundfile.LibsndfileError)):
        yield placed


# --- what a folder holds ---


def _refuse_other_names(name: str, title: str, path: Path, stem: str) -> None:
    """UserError where a file's name or folder names another data set of KINDS, or another version."""
    others = {path.parent.name, stem.partition("-")[0]} & KINDS.keys() - {name}
    version = re.search(r"-(v[\d.]*\d)", stem)
    what = others.pop() if others else ""
    if not what and version and version[1] not in title:
        what = f"version {version[1]}"
    if what:
        raise UserError(f"{path} is of {what} by its name, not of {title}; give --source the folder of {name}")


def _records(name: str, split: str, path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file, and a line where not all of it can be read. UserError: they are of another data set."""
    records: list[Record] = []
    try:
        data = mapped(path)
        for start, end in framed(data):
            number = len(records) + 1
            try:
                example = Example(data, start, end)
                own = re.sub(r"[\s,/\\]+", "_", example.string(KINDS[name].id).decode()).strip("_")
            except ValueError:  # loading will say what is wrong with it
                example, own = None, ""
            if example and number == 1:
                _refuse_other_features(name, path, example.names())
            records.append(Record(own or f"{path.name}-{number}", split, (path,), name, number, start, end))
    except (OSError, ValueError) as error:
        return records, [f"{path.name}: {error}; {AGAIN}"]
    return records, []


def _refuse_other_features(name: str, path: Path, names: frozenset[str]) -> None:
    others = [other for other, kind in KINDS.items() if kind.features == names]
    if others and name not in others:
        raise UserError(f"{path} is of {' or '.join(others)}, not of {name}: it has {', '.join(sorted(names))}")


def _numbered(records: list[Record]) -> list[Record]:
    """With ids that differ."""
    count, seen = Counter(record.id for record in records), Counter[str]()
    result = []
    for record in records:
        unique = record.id if count[record.id] == 1 else f"{record.id}-{seen[record.id]}"
        seen[record.id] += 1
        result.append(replace(record, id=unique))
    return result
