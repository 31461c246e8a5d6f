"""MIDI files of any kind through SoundFonts: music that people wrote, as data to train on.

    python -m music_synth.prepare_data rendered --source FOLDER --soundfont A.sf2,B.sf3 --variations 3

A piece is a MIDI file, alone, in a folder (searched through) or in a WAD archive; one that is there twice counts once.
Each is rendered with each SoundFont as it is, and of the training pieces so many more times varied (`variation`).

* Notes are those that a player sounds, with effective velocities: see `midi.players`.
* Whether a piece is for training, validation or test (8, 1 and 1 of ten) hangs on its notes alone, so that it stays
  where it is when others come, and no piece is in two splits, under whatever names or with whatever sounds. Only of
  a handful of pieces one moves where a split would be empty.
* Files that cannot be read are passed over and listed; of damaged ones what makes sense is taken, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from music_synth.audio.io import resample, turned_down
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.audio.soundfont import RENDER_RATE, default_soundfont, render_midi
from music_synth.data.datasets.corpus import Content, Corpus, Found, Measured, Recording, check, split_by_chance
from music_synth.data.datasets.variation import KINDS, Variation, equalize, vary
from music_synth.errors import UserError
from music_synth.midi import smf
from music_synth.midi.notes import Note, read_midi, sounding
from music_synth.midi.wad import is_wad, read_wad

GAIN = 0.5  # FluidSynth's; full arrangements then peak below 1
MAX_MINUTES = 60  # of a piece


@dataclass(frozen=True)
class Rendering(Measured):
    """A piece with a SoundFont: `files` are both. `seed`: of its variation; empty where it is as written.

    It lasts `seconds` up to the end of the last note.
    """

    lump: str = ""  # in a WAD archive
    seed: str = ""
    kinds: tuple[str, ...] = KINDS
    gain: float = GAIN

    @property
    def settings(self) -> str:
        return repr((self.lump, self.seed, self.kinds, self.gain))

    @property
    def timbre(self) -> str:
        return self.files[1].stem


class Rendered(Corpus):
    """The reader."""

    title = "MIDI files through SoundFonts"

    def recordings_in(self, root: Path) -> Found:
        """Finds each piece of `root`, with the SoundFont that ships, as it is."""
        return find_renderings([root])

    def read_notes(self, recording: Recording) -> list[Note]:
        assert isinstance(recording, Rendering)
        return sounding(self._varied(recording))

    def read(self, recording: Recording) -> Content:
        """Renders a piece. UserError: it is too long, or FluidSynth or the SoundFont fails."""
        assert isinstance(recording, Rendering)
        midi = self._varied(recording)
        notes, change = sounding(midi), self._variation(recording)
        minutes = max((note.offset for note in notes), default=0.0) / 60
        if minutes > MAX_MINUTES:
            raise UserError(f"{recording.id}: {minutes:.0f} minutes; a piece may last {MAX_MINUTES}")
        audio = render_midi(
            midi, recording.files[1], RENDER_RATE, reverb=change.room, gain=recording.gain, tuning=change.tuning
        )
        audio = equalize(resample(audio, RENDER_RATE, SAMPLE_RATE), SAMPLE_RATE, change.equalizer)
        return check(recording, notes, turned_down(audio))

    def _variation(self, recording: Rendering) -> Variation:
        return Variation.draw(recording.seed, recording.kinds) if recording.seed else Variation()

    def _varied(self, recording: Rendering) -> smf.MidiFile:
        path = recording.files[0]
        midi = smf.load(read_wad(path)[recording.lump] if recording.lump else path)
        return vary(midi, self._variation(recording)) if recording.seed else midi


CORPUS = Rendered()


def find_renderings(
    sources: Sequence[Path],
    soundfonts: Sequence[Path] = (),
    variations: int = 0,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    gain: float = GAIN,
) -> Found:
    """What to render of the pieces of `sources`; `missing` lists files that cannot be read.

    Args:
      sources: MIDI files, folders and WAD archives.
      soundfonts: SF2 or SF3 files; the one that ships if there are none.
      variations: of each training piece with each SoundFont, besides the piece as it is.
      kinds: what is varied; see `variation.KINDS`.
      seed: of the variations.
      gain: FluidSynth's master gain.

    Raises:
      UserError: a source or a SoundFont is not there, or a variation is unknown.
    """
    soundfonts = list(soundfonts) or [default_soundfont()]
    for path in soundfonts:
        if not path.is_file():
            raise UserError(f"no SoundFont at {path}: give .sf2 or .sf3 files")
    Variation.draw("", kinds)  # complains about unknown kinds
    found: dict[str, tuple[str, Path, str, float]] = {}  # by what the piece holds; up to its last second
    unreadable = []
    for name, path, lump, data in tqdm(_pieces(sources), desc="looking at pieces", unit="piece"):
        try:
            notes = read_midi(path if data is None else data)
            found.setdefault(_content(notes), (name, path, lump, max(note.offset for note in notes)))
        except UserError as error:
            unreadable.append(str(error) if data is None else f"{path}, {lump}: {error}")
    splits = split_by_chance(found)
    recordings, ids = [], set()
    for content, (name, path, lump, end) in found.items():
        for soundfont in soundfonts:
            for number in range(1 + (variations if splits[content] == "train" else 0)):
                label = re.sub(r"[^\w.-]+", "_", f"{name}.{soundfont.stem}" + (f".{number}" if number else ""))
                label += f"-{content[:8]}" if label in ids else ""
                ids.add(label)
                drawn = f"{seed}/{content}/{soundfont.name}/{number}" if number else ""
                seconds = end / Variation.draw(drawn, kinds).tempo if number else end
                files = path, soundfont
                recordings.append(Rendering(label, splits[content], files, seconds, lump, drawn, tuple(kinds), gain))
    return Found(recordings, unreadable)


def _pieces(sources: Sequence[Path]) -> Iterator[tuple[str, Path, str, bytes | None]]:
    """(name, file, lump, bytes of the lump) of every MIDI file there is."""
    for source in sources:
        if source.is_dir():
            paths = sorted(path for path in source.rglob("*") if path.is_file())
            paths = [path for path in paths if path.suffix.lower() in smf.SUFFIXES or path.suffix.lower() == ".wad"]
        elif source.exists():
            paths = [source]
        else:
            raise UserError(f"no such file or folder: {source}")
        for path in paths:
            inside = path.relative_to(source) if source.is_dir() else Path(path.name)
            name = ".".join(inside.with_suffix("").parts)
            lumps: Mapping[str, bytes | None] = {"": None}  # read as a MIDI file, which says what is wrong with it
            if is_wad(path):
                with contextlib.suppress(UserError):
                    lumps = read_wad(path)
            for lump, data in lumps.items():
                yield f"{name}.{lump}" if lump else name, path, lump, data


def _content(notes: Sequence[Note]) -> str:
    """What makes a piece the same piece: when which key sounds."""
    keys = sorted((round(note.onset, 2), note.pitch, note.is_drum) for note in notes)
    return hashlib.sha256(repr(keys).encode()).hexdigest()
