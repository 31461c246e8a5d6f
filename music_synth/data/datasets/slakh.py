"""Slakh2100 and BabySlakh: Lakh MIDI songs played by sampled instruments, a stem for each.

Download `slakh2100_flac_redux.tar.gz` (Zenodo 4599666, 104 GB) or `babyslakh_16k.tar.gz` (Zenodo 4603870, its first
20 songs). License: CC BY 4.0.

    slakh2100_flac_redux/{train,validation,test,omitted}/    babyslakh_16k/    (no splits, WAV at 16 kHz)
        Track00001/
            all_src.mid  mix.flac                  not read, see below
            metadata.yaml                          stems: {S00: {is_drum, program_num, plugin_name, ...}, ...}
            MIDI/S00.mid ...  stems/S00.flac ...   one of each for a stem; mono, 44.1 kHz, 16 bits

Their quirks, and what we do:

- Splits: the folder that a track lies in. So the original splits, "split2" and "redux", which the authors' script
  makes by moving folders, are read alike; `omitted` (duplicates) is left out. BabySlakh has none: Track00017 and 18
  are for validation, 19 and 20 for test; no two of its songs are the same.
- Training hears ten random sub-mixes of a song, of at least four stems, as MT3 does; validation and test the full
  mix. They depend on nothing but the name of the track and how many stems it has.
- A mix is the sum of its stems: `mix.flac` is that too, their gain is applied already. The sum is right also where
  a stem is missing. A sub-mix may exceed 1 a little where stems cancelled in the full mix.
- Labels are those of `MIDI/SNN.mid`; `all_src.mid` is not what was played.
- Files say which stems there are. `audio_rendered` does not: BabySlakh says false of stems that are there. A stem
  without audio or MIDI is neither heard nor labeled; `missing` names its files where the metadata promises them, by
  `audio_rendered`, `midi_saved` or a loudness.
  `audio_dir` and `midi_dir` are not read: in Track00616 they name a folder of their maker's.
- Drums are what `is_drum` says, whatever the MIDI channel; their `program_num` is 128. Their program here is 0.
- Programs are those of the 34 classes (`class_program`); the numbers in the MIDI files are ignored. MT3 takes the
  class from the plugin, which differs for a few: there a harpsichord is an acoustic piano.
- Basses are labeled an octave above what sounds, except with one plugin. Published models do not mind, nor does
  `CORPUS`; `SOUNDING_BASS` (the data set slakh_sounding_bass) labels what sounds.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from music_synth.audio.io import read_audio
from music_synth.data.datasets.corpus import SPLITS, Content, Found, Recording, check, folder_with, naming
from music_synth.errors import UserError
from music_synth.midi.notes import Note, apply_sustain, parse_midi
from music_synth.midi.tokenizer import SLAKH_PROGRAMS

SUB_MIXES = 10  # of each song, for training
MIN_STEMS = 4  # of a sub-mix
BASSES = range(32, 40)
BASS_AS_LABELED = "scarbee_jay_bass_slap_both.nkm"  # the plugin that sounds as written
AUDIO = (".flac", ".wav")  # the authors' converter makes WAV of FLAC
BABY_SPLIT = {"Track00017": "validation", "Track00018": "validation", "Track00019": "test", "Track00020": "test"}
REPAIR = "unpack the archive again, or move the track's folder away"
KINDS = {bool: "true or false", int: "a number", str: "a name"}
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast


class Stem(NamedTuple):
    """One part of a song: what plays it, and where it is."""

    name: str  # "S00"
    audio: Path
    midi: Path
    program: int  # of its class; 0 for drums
    is_drum: bool
    transpose: int  # semitones from the label to what sounds


class Song(NamedTuple):
    """A track's folder."""

    track: str  # "Track00001"
    split: str
    metadata: Path
    stems: tuple[Stem, ...]  # those with audio and MIDI, by name


@dataclass(frozen=True)
class Mix(Recording):
    """Some stems of a song, played together. The `instrument` of a note is the place of its stem in `stems`."""

    stems: tuple[Stem, ...]

    @classmethod
    def of(cls, song: Song, name: str, stems: tuple[Stem, ...]) -> Mix:
        files = [song.metadata, *(file for stem in stems for file in (stem.midi, stem.audio))]
        return cls(name, song.split, tuple(files), stems)


@dataclass(frozen=True)
class MixReader:
    """Reads a mix of stems: what the corpora made of Slakh have in common."""

    bass_octave: bool = False  # label basses as they sound
    trim = True

    def read_notes(self, recording: Mix) -> list[Note]:
        """Reads the notes of all its stems. UserError: a MIDI file cannot be read."""
        notes: list[Note] = []
        for instrument, stem in enumerate(recording.stems):
            with naming(replace(recording, id=f"{recording.id}, stem {stem.name}")):
                notes += _notes(stem, instrument)
        return notes

    def read(self, recording: Mix) -> Content:
        """Reads the notes of its stems, and their sum.

        Raises:
            UserError: a file is missing or cannot be read, or a stem's audio and labels cannot belong together.
        """
        notes: list[Note] = []
        audio = np.zeros(0, np.float32)
        for instrument, stem in enumerate(recording.stems):
            named = replace(recording, id=f"{recording.id}, stem {stem.name}")
            with naming(named):
                sound = read_audio(stem.audio)
                notes += check(named, _notes(stem, instrument), sound).notes
            audio = np.pad(audio, (0, max(0, len(sound) - len(audio))))
            audio[: len(sound)] += sound
        return check(recording, notes, audio)


class Slakh(MixReader):
    """Slakh2100 in folders of splits. Raises as `Corpus` says."""

    title = "Slakh2100"
    archives = ("slakh2100_flac_redux.tar.gz",)
    pieces = (1289 + 270 + 151, 1500 + 375 + 225)  # "redux", and the original and "split2"

    def recordings_in(self, root: Path) -> Found:
        return _mixes(*split_songs(root, self.title, self.bass_octave))


class BabySlakh(MixReader):
    """The first 20 songs of Slakh2100 at 16 kHz. Raises as `Corpus` says."""

    title = "BabySlakh"
    archives = ("babyslakh_16k.tar.gz",)
    pieces = (20,)

    def recordings_in(self, root: Path) -> Found:
        folders = _tracks(folder_with(root, ["Track00001"], self.title))
        if folders[-1].name > max(BABY_SPLIT):
            raise UserError(
                f"{folders[-1]} is not of {self.title}, which ends with {max(BABY_SPLIT)}; is it Slakh2100?"
            )
        return _mixes(*_songs(((BABY_SPLIT.get(path.name, "train"), path) for path in folders), self.bass_octave))


CORPUS = Slakh()
SOUNDING_BASS = Slakh(bass_octave=True)
BABY = BabySlakh()


def class_program(program: int) -> int:
    """Returns the program that stands for the Slakh class of a General MIDI program (0..127).

    That is the class at or below it in its family of eight, or the family's first: a piccolo (72) is a pipe (73).
    Families without a class, from 96 on, which Slakh2100 does not play, keep their programs.
    """
    family = [number for number in SLAKH_PROGRAMS if number // 8 == program // 8]
    return max((number for number in family if number <= program), default=family[0] if family else program)


def split_songs(root: Path, title: str, bass_octave: bool) -> tuple[list[Song], list[str]]:
    """Lists the songs of train, validation and test, in this order, and a line for each file that is missing.

    Raises:
        UserError: `root` holds no such folders; a metadata file cannot be used; a track is in two splits.
    """
    folder = folder_with(root, SPLITS, title)
    return _songs(((split, path) for split in SPLITS for path in _tracks(folder / split)), bass_octave)


def sub_mixes(song: Song) -> list[tuple[Stem, ...]]:
    """Draws ten distinct subsets of at least four stems, or all if there are fewer. The same in every process.

    All sizes are equally likely, so small groups are heard as often as full ones.
    """
    count = len(song.stems)
    sizes = range(MIN_STEMS, count + 1)
    wanted = min(SUB_MIXES, sum(math.comb(count, size) for size in sizes))
    rng = random.Random(f"slakh/{song.track}")
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < wanted:
        chosen[tuple(sorted(rng.sample(range(count), rng.choice(sizes))))] = None
    return [tuple(song.stems[i] for i in subset) for subset in chosen]


def _notes(stem: Stem, instrument: int) -> list[Note]:
    return [note._replace(instrument=instrument) for note in _sounding(stem)]


@functools.lru_cache(maxsize=64)  # the sub-mixes of a song come one after the other, and share its stems
def _sounding(stem: Stem) -> list[Note]:
    """The notes of a stem as they sound. What plays them is set before the pedal, which drums do not have."""
    notes, pedals = parse_midi(stem.midi)
    sounding = [
        note._replace(program=stem.program, is_drum=stem.is_drum, pitch=note.pitch + stem.transpose) for note in notes
    ]
    return apply_sustain(sounding, pedals)


def _mixes(songs: list[Song], missing: list[str]) -> Found:
    """The recordings of songs: sub-mixes of those for training, the others whole."""
    recordings: list[Recording] = []
    for song in songs:
        if song.split == "train":
            recordings += [Mix.of(song, f"{song.track}-{i}", stems) for i, stems in enumerate(sub_mixes(song))]
        else:
            recordings.append(Mix.of(song, song.track, song.stems))
    return Found(recordings, missing)


def _tracks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"Track\d{5}", path.name) and path.is_dir())


def _songs(folders: Iterable[tuple[str, Path]], bass_octave: bool) -> tuple[list[Song], list[str]]:
    """The songs of (split, track folder), and a line for each file or song that cannot be used for lack of files."""
    songs: dict[str, Song] = {}
    missing = []
    for split, folder in folders:
        if folder.name in songs:
            raise UserError(f"{folder.name} is both in {songs[folder.name].split} and in {split}; move one away")
        metadata = folder / "metadata.yaml"
        if not metadata.is_file():
            missing.append(f"{folder.name}: no metadata.yaml in {folder}")
            continue
        stems, absent = _stems(metadata, bass_octave)
        missing += [f"{folder.name}: no {file} in {folder}" for file in absent]
        fewest = MIN_STEMS if split == "train" else 1
        if len(stems) < fewest:
            missing.append(f"{folder.name}: {len(stems)} stems with audio and MIDI in {folder}, fewer than {fewest}")
        else:
            songs[folder.name] = Song(folder.name, split, metadata, stems)
    return list(songs.values()), missing


def _stems(metadata: Path, bass_octave: bool) -> tuple[tuple[Stem, ...], list[str]]:
    """The stems of a track that have audio and MIDI, and the files of others that the metadata promises."""
    folder = metadata.parent
    audio_files, midi_files = _names(folder / "stems"), _names(folder / "MIDI")
    stems, absent = [], []
    for name, info in sorted(_read_metadata(metadata).items()):
        audio = next((name + suffix for suffix in AUDIO if name + suffix in audio_files), None)
        midi = f"{name}.mid" if f"{name}.mid" in midi_files else None
        if audio and midi:
            stems.append(_stem(metadata, name, info, folder / "stems" / audio, folder / "MIDI" / midi, bass_octave))
            continue
        if not audio and (info.get("audio_rendered") or "integrated_loudness" in info):  # it was once measured
            absent.append(f"stems/{name}{' or '.join(AUDIO)}")
        if not midi and (audio or info.get("midi_saved")):
            absent.append(f"MIDI/{name}.mid")
    return tuple(stems), absent


def _stem(metadata: Path, name: str, info: dict[str, Any], audio: Path, midi: Path, bass_octave: bool) -> Stem:
    def field(key: str, kind: type) -> Any:
        value = info.get(key)
        if type(value) is not kind:
            raise UserError(f"{metadata}: {key} of stem {name} is {value!r}, not {KINDS[kind]}; {REPAIR}")
        return value

    if field("is_drum", bool):
        return Stem(name, audio, midi, program=0, is_drum=True, transpose=0)
    program = field("program_num", int)
    if not 0 <= program <= 127:
        raise UserError(f"{metadata}: program_num of stem {name} is {program}, not 0 to 127; {REPAIR}")
    octave = bass_octave and program in BASSES and field("plugin_name", str) != BASS_AS_LABELED
    return Stem(name, audio, midi, class_program(program), is_drum=False, transpose=-12 if octave else 0)


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """What metadata.yaml says of each stem."""
    try:
        content = yaml.load(path.read_text("utf-8"), YAML_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason}); {REPAIR}") from None
    stems = content.get("stems") if isinstance(content, dict) else None
    if not isinstance(stems, dict) or not all(isinstance(stem, dict) for stem in stems.values()):
        raise UserError(f"{path} does not list the track's stems; {REPAIR}")
    return {str(name): info for name, info in stems.items()}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
