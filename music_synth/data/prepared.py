"""A folder of prepared arrays, and the feed over it. No TensorFlow: so trains a machine with only JAX.

    manifest.json            what the folder holds (below); written last
    train/00000.mel.npy      log-mel [T, 128] float16 of piece 0: 12.8 kB a second, read through a memory map
    train/00000.notes.npy    notes [n, 7] float64: the fields of `Note`
    train/00000.audio.npy    audio [S] int16 at 16 kHz, where it was asked for: 32 kB a second; for training inverters
    validation/... test/...

manifest.json: {"format", "version", "data_set", "data_set_version", "mel": {sample_rate, hop_length,
num_mels}, "splits": {name: [{"id", "files": stem, "frames": T, "notes": n}]}};
where there is audio, each entry has "samples": S too.

float16 keeps a log-mel to 0.004 (0.03 dB).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from music_synth.audio import mel as mel_module
from music_synth.audio.io import audio_from_int16, audio_to_int16
from music_synth.data.examples import (
    Batch,
    Example,
    Piece,
    cut_window,
    evaluation_batches,
    num_strata,
    pad_window,
    shard_rows,
    stack,
    stratified_start,
    tell_skipped,
)
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import FRAME_RATE, SegmentTooLong
from music_synth.midi.tokenizer import Events, Tokenizer

FORMAT = "music_synth prepared arrays"
VERSION = 1
MANIFEST = "manifest.json"
MEL_SETTINGS = {
    "sample_rate": mel_module.SAMPLE_RATE,
    "hop_length": mel_module.HOP_LENGTH,
    "num_mels": mel_module.NUM_MELS,
}
AGAIN = "prepare the folder again with python -m music_synth.prepare_data"
MAX_DRAWS = 100  # windows tried for one example before the data set is called unusable
WINDOW_STREAM, ORDER_STREAM = 0, 1  # random streams of a seed: what a window is, in which order they come
EVENTS_KEPT = 512  # pieces whose sorted events stay in memory


def notes_to_array(notes: Iterable[Note]) -> np.ndarray:
    """Notes as float64 [n, 7], columns in the order of `Note`'s fields; exact."""
    return np.array([tuple(note) for note in notes], np.float64).reshape(-1, len(Note._fields))


def notes_from_array(array: np.ndarray) -> list[Note]:
    """The notes that `notes_to_array` stored."""
    return [
        Note(int(pitch), int(velocity), int(program), onset, offset, bool(is_drum), int(instrument))
        for pitch, velocity, program, onset, offset, is_drum, instrument in array.tolist()
    ]


@dataclass(frozen=True)
class StoredPiece:
    """One entry of the manifest."""

    id: str
    stem: str  # path without ".mel.npy", relative to the folder
    frames: int
    notes: int
    samples: int | None  # None: no audio was kept

    @classmethod
    def from_entry(cls, entry: Mapping) -> StoredPiece:
        samples = int(entry["samples"]) if "samples" in entry else None
        return cls(str(entry["id"]), str(entry["files"]), int(entry["frames"]), int(entry["notes"]), samples)


def write_folder(
    folder: Path, splits: Mapping[str, Iterable[Piece]], data_set: str, data_set_version: str, audio: bool = False
) -> dict[str, int]:
    """Writes a prepared folder, with the pieces' audio if asked; it appears under its name only when it is whole.

    Returns:
      Number of pieces in each split.

    Raises:
      UserError: the folder exists and is not empty, or cannot be written.
    """
    check_target(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}; choose another --out") from error
    try:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "data_set": data_set,
            "data_set_version": data_set_version,
            "mel": MEL_SETTINGS,
            "splits": {split: _write_split(work, split, pieces, audio) for split, pieces in splits.items()},
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
        work.chmod(0o755)  # mkdtemp makes it private
        os.replace(work, folder)  # an empty folder of that name is replaced
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; make room or choose another --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {split: len(entries) for split, entries in manifest["splits"].items()}


def check_target(folder: Path) -> None:
    """UserError unless `folder` is missing or an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: remove it, or choose another --out")


def _write_split(work: Path, split: str, pieces: Iterable[Piece], audio: bool) -> list[dict]:
    (work / split).mkdir()
    entries = []
    for index, piece in enumerate(pieces):
        stem = f"{split}/{index:05d}"
        np.save(work / f"{stem}.mel.npy", piece.mel.astype(np.float16))
        np.save(work / f"{stem}.notes.npy", notes_to_array(piece.notes))
        entries.append({"id": piece.id, "files": stem, "frames": len(piece.mel), "notes": len(piece.notes)})
        if audio:
            samples = audio_to_int16(piece.audio)
            np.save(work / f"{stem}.audio.npy", samples)
            entries[-1]["samples"] = len(samples)
    return entries


def read_manifest(folder: Path) -> dict[str, list[StoredPiece]]:
    """The pieces of each split of a prepared folder.

    Raises:
      UserError: no manifest, or one that does not parse, is of another version, or lists files that are
        missing or cut off.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}: {AGAIN}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} says format {manifest['format']!r}, not {FORMAT!r}: {AGAIN}")
        if manifest["version"] != VERSION:
            raise UserError(f"{path} is version {manifest['version']}, this program reads {VERSION}: {AGAIN}")
        if manifest["mel"] != MEL_SETTINGS:
            raise UserError(f"{path} has mel settings {manifest['mel']}, not {MEL_SETTINGS}: {AGAIN}")
        splits = {
            split: [StoredPiece.from_entry(entry) for entry in entries] for split, entries in manifest["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error
    for piece in itertools.chain.from_iterable(splits.values()):
        _check_file(folder / f"{piece.stem}.mel.npy", piece.frames * mel_module.NUM_MELS * 2)
        _check_file(folder / f"{piece.stem}.notes.npy", piece.notes * len(Note._fields) * 8)
        if piece.samples is not None:
            _check_file(folder / f"{piece.stem}.audio.npy", piece.samples * 2)
    return splits


def open_audio(folder: Path, split: str) -> list[np.ndarray]:
    """The audio of each piece of a split, int16 [S], read through memory maps.

    Raises:
      UserError: no such split, or the folder was prepared without audio.
    """
    pieces = _stored_pieces(folder, split)
    if any(piece.samples is None for piece in pieces):
        raise UserError(f"{folder} holds no audio: {AGAIN} --audio")
    return [_open_audio_file(folder, piece.stem) for piece in pieces]


def open_mels(folder: Path, split: str) -> list[np.ndarray]:
    """The log-mel of each piece of a split, float16 [T, 128], read through memory maps."""
    return [_open_mel_file(folder, piece.stem) for piece in _stored_pieces(folder, split)]


def _stored_pieces(folder: Path, split: str) -> list[StoredPiece]:
    splits = read_manifest(folder)
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}: choose from {', '.join(splits)}")
    return splits[split]


def _open_mel_file(folder: Path, stem: str) -> np.ndarray:
    return _load(folder / f"{stem}.mel.npy", np.float16, mel_module.NUM_MELS, mmap_mode="r")


def _open_audio_file(folder: Path, stem: str) -> np.ndarray:
    return _load(folder / f"{stem}.audio.npy", np.int16, None, mmap_mode="r")


def _check_file(path: Path, data_bytes: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} is missing, though the manifest lists it: {AGAIN}") from error
    if not 0 < size - data_bytes <= 1024:  # the header of a .npy file is 128 bytes
        raise UserError(f"{path} has {size} bytes instead of about {data_bytes + 128}: {AGAIN}")


@dataclass(frozen=True)
class Split:
    """The pieces of a split, and the frames of all of them as one axis on which windows are drawn."""

    name: str
    pieces: tuple[StoredPiece, ...]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """[number of pieces]: where each piece ends on the common axis."""
        return np.cumsum([piece.frames for piece in self.pieces], dtype=np.int64)

    def locate(self, frame: int) -> tuple[int, int]:
        """(index of the piece, frame in it) of a frame of the common axis."""
        index = int(np.searchsorted(self.ends, frame, side="right"))
        return index, frame - int(self.ends[index] - self.pieces[index].frames)


class PreparedFeed:
    """A feed (`music_synth.data.feed.Feed`) over a prepared folder.

    Training windows: the frames of the whole training split, one piece after the other, fall into equal parts
    of about a segment; an epoch draws one window from each part, in a new random order. Example number i is a
    pure function of (seed, i), so any batch can be made at any time: starting at a late step costs nothing.

    num_skipped counts the training windows that were passed over because they have too many tokens; another
    window takes their place.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        seed: int = 0,
        context: bool = True,
        empty_context: float = 0.1,
        shard_index: int = 0,
        num_shards: int = 1,
    ):
        """See `music_synth.data.feed.open_feed`."""
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.context_frames = tokenizer.segment_frames if context else 0
        self.empty_context = empty_context
        self.num_skipped = 0
        self.splits = {name: Split(name, tuple(pieces)) for name, pieces in read_manifest(self.folder).items()}
        self._rows = shard_rows(batch_size, shard_index, num_shards)
        self._events = functools.lru_cache(maxsize=EVENTS_KEPT)(self._load_events)
        self._mel = functools.lru_cache(maxsize=EVENTS_KEPT)(self._open_mel)
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... without end; each is a function of (seed, number)."""
        split = self._split("train")
        if not len(split.ends) or not split.ends[-1]:
            raise UserError(f"{self.folder} has no training pieces: prepare a data set that has some")
        for step in itertools.count(start_step):
            yield stack([self._train_example(split, step * self.batch_size + row) for row in self._rows])

    def eval_batches(self, split: str = "validation") -> Iterator[Batch]:
        """Consecutive segments of the pieces of `split`; the last batch is filled up with blank rows."""
        split = self._split(split)
        pieces = ((self._mel(stored.stem), self._events(stored.stem)) for stored in split.pieces)
        return evaluation_batches(
            pieces,
            self.tokenizer,
            context_frames=self.context_frames,
            batch_size=self.batch_size,
            rows=self._rows,
        )

    def pieces(self, split: str) -> Iterator[Piece]:
        """The whole pieces of `split`, in order; with audio, if the folder holds it."""
        return (
            Piece(
                stored.id,
                self._notes(stored.stem),
                self._mel(stored.stem).astype(np.float32),
                None if stored.samples is None else audio_from_int16(_open_audio_file(self.folder, stored.stem)),
            )
            for stored in self._split(split).pieces
        )

    def _split(self, name: str) -> Split:
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}: choose from {', '.join(self.splits)}")
        return self.splits[name]

    def _train_example(self, split: Split, index: int) -> Example:
        """Training example number `index` of the endless stream."""
        num_starts = int(split.ends[-1])
        strata = num_strata(num_starts, self.tokenizer.segment_frames)
        epoch, position = divmod(index, strata)
        stratum = int(self._order(epoch, strata)[position])
        rng = np.random.default_rng([self.seed, WINDOW_STREAM, index])
        for _ in range(MAX_DRAWS):
            piece, start = split.locate(stratified_start(rng, stratum, strata, num_starts))
            context_frames = 0 if rng.random() < self.empty_context else self.context_frames
            stored = split.pieces[piece]
            try:
                window = cut_window(
                    self._mel(stored.stem),
                    self._events(stored.stem),
                    self.tokenizer,
                    start,
                    context_frames,
                    on_overflow="error",
                )
            except SegmentTooLong:
                self.num_skipped += 1
                tell_skipped(self.num_skipped, stored.id, start / FRAME_RATE, self.tokenizer.max_tokens)
                stratum = int(rng.integers(strata))
                continue
            return pad_window(window, self.tokenizer, self.context_frames, training=True)
        raise UserError(
            f"{MAX_DRAWS} windows of {self.folder} in a row exceed {self.tokenizer.max_tokens} tokens:"
            " raise Tokenizer.max_tokens"
        )

    def _draw_order(self, epoch: int, strata: int) -> np.ndarray:
        return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(strata)

    def _open_mel(self, stem: str) -> np.ndarray:
        return _open_mel_file(self.folder, stem)

    def _notes(self, stem: str) -> list[Note]:
        return notes_from_array(_load(self.folder / f"{stem}.notes.npy", np.float64, len(Note._fields)))

    def _load_events(self, stem: str) -> Events:
        try:
            return Events.from_notes(self._notes(stem))
        except ValueError as error:
            raise UserError(f"{self.folder / stem}.notes.npy: {error}: {AGAIN}") from error


def _load(path: Path, dtype: type, columns: int | None, mmap_mode: str | None = None) -> np.ndarray:
    """An array [n, columns], or [n] where `columns` is None."""
    try:
        array = np.load(path, mmap_mode=mmap_mode)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {AGAIN}") from error
    if array.dtype != dtype or array.shape[1:] != (() if columns is None else (columns,)):
        raise UserError(f"{path} holds {array.dtype} {array.shape}, not {dtype.__name__} [n, {columns}]: {AGAIN}")
    return array
