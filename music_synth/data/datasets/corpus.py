"""What the readers of downloaded data sets share: from a folder to recordings, from a recording to notes and audio.

No TensorFlow here; `builder.py` makes tfds data sets of it.

A reader is a module of this package, such as `maestro`, with an instance of a `Corpus` called CORPUS. Listing is
quick and looks only at what lists the recordings; reading does the work, one recording at a time, in any process.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from music_synth.audio.io import read_audio
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import SAMPLE_RATE
from music_synth.midi.tokenizer import Events

SPLITS = ("train", "validation", "test")
HELD_OUT = (("test", 0.1), ("validation", 0.2))  # cumulative shares of what is split by chance; the rest is training's
MAX_MISSING_SECONDS = 1.0  # audio may end this much before its last note does


@dataclass(frozen=True)
class Recording:
    """One item of a corpus. A reader may subclass it to carry what `load` needs; it must pickle."""

    id: str  # unique in the corpus, without commas or spaces
    split: str
    files: tuple[Path, ...]  # all that it is made from, full paths; recordings of one piece share the first

    @property
    def settings(self) -> str:
        """Says what else makes it what it is."""
        return ""

    @property
    def timbre(self) -> str:
        """Names the SoundFont, room or player, where one data set has several; "": unknown."""
        return ""


@dataclass(frozen=True)
class Measured(Recording):
    """A recording whose length is known before it is read."""

    seconds: float


class Content(NamedTuple):
    """What a recording holds."""

    notes: list[Note]  # sorted by onset; programs and drum flags resolved; sustain applied
    audio: np.ndarray  # float32 [S], mono, 16 kHz


class Found(NamedTuple):
    """What a folder holds of a corpus."""

    recordings: Sequence[Recording]  # in fixed order; every file of each is there
    missing: list[str]  # one line for each item that the corpus lists and the folder lacks: what, and of which item


class Reader(Protocol):
    """Reads recordings. Its methods raise UserError whose message names the item and the way out."""

    def read_notes(self, recording: Any) -> list[Note]:  # one of those that it found
        """Reads the notes of a recording, without its audio."""
        ...

    def read(self, recording: Any) -> Content:
        """Reads notes and audio of a recording, as of `check`."""
        ...


class Corpus(Reader, Protocol):
    """Lists the recordings of a corpus, and reads them."""

    title: str  # for people: "MAESTRO v3.0.0"
    archives: tuple[str, ...] = ()  # file names of the archives that people download, in the order they are unpacked
    # In the whole download, of each edition; empty where it has a list of them, or none is known:
    pieces: tuple[int, ...] = ()
    trim: bool = False  # whether training cuts overlapping notes of one pitch, as published

    def recordings_in(self, root: Path) -> Found:
        """Lists what is in `root`: the folder that the archives unpack into, or one that holds it."""
        ...


class ReaderOfOneFile:
    """What readers share whose recordings have one file of audio."""

    trim = False
    audio_file = 0  # its place among a recording's files

    def read_notes(self, recording: Any) -> list[Note]:
        raise NotImplementedError

    def read(self, recording: Any) -> Content:
        """Reads notes and audio. UserError: as of `read_notes`, `read_audio` and `check`."""
        with naming(recording):
            return check(recording, self.read_notes(recording), read_audio(recording.files[self.audio_file]))


@contextlib.contextmanager
def naming(
    recording: Recording, remedy: str = "unpack it again", kinds: tuple[type[Exception], ...] = (UserError,)
) -> Iterator[None]:
    """Says in errors of its files, of these kinds, which recording they are about, and what to do."""
    try:
        yield
    except kinds as error:
        if str(error).startswith(f"{recording.id}: "):
            raise
        raise UserError(f"{recording.id}: {error}; {remedy}, or leave it out with --skip_bad") from error


def check(recording: Recording, notes: Sequence[Note], audio: np.ndarray) -> Content:
    """Returns sorted notes and audio of a recording, if they can belong together.

    Raises:
        UserError: no notes; a note that is out of range or does not end after it begins; audio that ends more
            than a second before its last note does.
    """
    if not notes:
        raise UserError(f"{recording.id}: no notes; leave it out with --skip_bad")
    try:
        Events.from_notes(notes)  # as training will
    except (ValueError, OverflowError) as error:
        raise UserError(f"{recording.id}: {error}; leave it out with --skip_bad") from error
    seconds, last = len(audio) / SAMPLE_RATE, max(note.offset for note in notes)
    if seconds + MAX_MISSING_SECONDS < last:
        raise UserError(
            f"{recording.id}: {seconds:.2f} s of audio for labels up to {last:.2f} s; leave it out with --skip_bad"
        )
    return Content(sorted(notes, key=lambda note: (note.onset, note.is_drum, note.program, note.pitch)), audio)


def split_by_chance(contents: Collection[str]) -> dict[str, str]:
    """The split of each of some hashes: 8:1:1, by chance, which the hash fixes. A split that is left out takes one."""
    splits = {}
    for content in sorted(contents):
        share = int(content[:8], 16) / 2**32
        splits[content] = next((split for split, end in HELD_OUT if share < end), "train")
    if len(splits) < len(SPLITS):
        return dict.fromkeys(splits, "train")
    for split in SPLITS:
        if split not in splits.values():
            count = Counter(splits.values())
            splits[next(content for content in splits if count[splits[content]] > 1)] = split
    return splits


def folder_with(root: Path, names: Iterable[str], what: str) -> Path:
    """Returns `root`, or the one folder directly in it, that holds all `names`; UserError says what is missing."""
    wanted = list(names)
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())) if root.is_dir() else ():
        if all((folder / name).exists() for name in wanted):
            return folder
    missing = ", ".join(wanted)
    raise UserError(f"{root} does not hold {what}: {missing} not found in it or in a folder of it")
