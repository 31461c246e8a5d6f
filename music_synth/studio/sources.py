"""Where the pieces come from that the studio offers from its start."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from music_synth.audio.io import audio_to_int16
from music_synth.data.data_dir import default_data_dir
from music_synth.data.feed import folder_of, open_feed
from music_synth.data.prepared import read_manifest, split_of
from music_synth.data.synthetic import DEFAULT_MINUTES, compose, plan_split
from music_synth.errors import UserError
from music_synth.midi.notes import midi_bytes
from music_synth.midi.segments import FRAME_RATE, frames_of
from music_synth.midi.smf import SUFFIXES
from music_synth.midi.tokenizer import Tokenizer
from music_synth.studio import limits
from music_synth.studio.pieces import StudioPiece, from_midi

MAX_PIECES = 200  # of a data set
Recording = Callable[[], np.ndarray]  # opens audio, int16 [S] at 16 kHz


def choose_pieces(paths: Sequence[Path], task: str | None, split: str, tokenizer: Tokenizer) -> list[StudioPiece]:
    """Reads the pieces of files and folders (none given: of the data folder), and of a data set if one is named.

    Where there is no file at all, the embedded data set's composer makes some.

    Raises:
      UserError: a file cannot be read, or there is no such data set.
    """
    chosen = [piece for path in paths for piece in read_path(path)]
    if not paths and default_data_dir().is_dir():
        chosen = read_path(default_data_dir(), may_be_empty=True)
    if task is not None:
        chosen += held_out(task, split, tokenizer)
    if not chosen:
        chosen = [from_midi(compose(spec), spec.id, spec.id) for spec in plan_split("test", DEFAULT_MINUTES)]
    if len({piece.id for piece in chosen}) < len(chosen):
        raise UserError("two files have the same name: give one of them another")
    return chosen


def read_path(path: Path, may_be_empty: bool = False) -> list[StudioPiece]:
    """Reads a MIDI file, or those of a folder by name, where a warning names what cannot be played and is left out."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no file {path}")
        return [read_file(path)]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    found = []
    for file in files:
        try:
            found.append(read_file(file))
        except UserError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    if not found and not may_be_empty:
        raise UserError(f"there is no MIDI file ({', '.join(SUFFIXES)}) to play in the folder {path}")
    return found


def read_file(path: Path) -> StudioPiece:
    try:
        return from_midi(path.read_bytes(), path.stem.replace("_", " "), path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def held_out(task: str, split: str, tokenizer: Tokenizer) -> list[StudioPiece]:
    """Lists the first pieces of a split of a data set, with their recordings where it keeps them."""
    folder = folder_of(task)
    if folder is not None:
        stored = split_of(read_manifest(folder), split, folder)[:MAX_PIECES]
        found = [
            (piece.id, piece.read_notes(), None if piece.num_samples is None else piece.open_audio) for piece in stored
        ]
    else:
        read = itertools.islice(open_feed(task, tokenizer, 1, context=False).pieces(split), MAX_PIECES)
        found = [(piece.id, piece.notes, as_recording(piece.audio)) for piece in read]
    return [
        StudioPiece(id, id, midi_bytes(notes), tuple(notes), recording)
        for id, notes, recording in found
        if notes and frames_of(notes) / FRAME_RATE <= limits.MAX_PIECE_SECONDS
    ]


def as_recording(audio: np.ndarray | None) -> Recording | None:
    samples = None if audio is None else audio_to_int16(audio)
    return None if samples is None else lambda: samples
