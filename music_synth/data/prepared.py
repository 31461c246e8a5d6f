"""A folder of prepared arrays, and the training windows in it. No TensorFlow: so trains a machine with only JAX.

    manifest.json            what the folder holds (below); written last
    train/00000.mel.npy      log-mel [T, 128] float16 of piece 0: 12.8 kB a second, read through a memory map
    train/00000.notes.npy    notes [n, 7] float64: the fields of `Note`
    train/00000.audio.npy    audio [S] int16 at 16 kHz, where it was asked for: 32 kB a second; for training inverters
    validation/... test/...

manifest.json: {"format", "version", "data_set", "data_set_version", "mel": {sample_rate, hop_length,
num_mels}, "splits": {name: [{"id", "files": stem, "frames": T, "notes": n}]}};
where there is audio, each entry has "samples": S too, and where it is known "timbre": name.

float16 keeps a log-mel to 0.004 (0.03 dB).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from music_synth.audio.io import audio_from_int16, audio_to_int16
from music_synth.audio.mel import HOP_LENGTH, NUM_MELS, SAMPLE_RATE
from music_synth.data.examples import Piece, Row, SegmentSettings, cut_window, num_strata, pad_window, stratified_start
from music_synth.errors import UserError, telling
from music_synth.files import check_new, whole_folder, write_whole
from music_synth.midi.notes import Note
from music_synth.midi.segments import FRAME_RATE, SegmentTooLong
from music_synth.midi.tokenizer import Events

FORMAT = "music_synth prepared arrays"
VERSION = 1
MANIFEST = "manifest.json"
TRANSCRIBED = ".transcribed"  # in the id of a piece whose notes a program wrote, and in the name of their MIDI file
MEL_SETTINGS = {"sample_rate": SAMPLE_RATE, "hop_length": HOP_LENGTH, "num_mels": NUM_MELS}
AGAIN = "prepare the folder again with python -m music_synth.prepare_data"
MAX_LOG_MEL = 50.0  # beyond it, either way, no log-mel is: that of a full scale is 6
MAX_DRAWS = 100  # windows tried for one example before the data set is called unusable
WINDOW_STREAM, ORDER_STREAM = 0, 1  # random streams of a seed: what a window is, in which order they come
EVENTS_KEPT = 512  # pieces whose sorted events stay in memory


# --- the folder ---


def notes_to_array(notes: Iterable[Note]) -> np.ndarray:
    """Notes as float64 [n, 7], columns in the order of `Note`'s fields; exact."""
    return np.array([tuple(note) for note in notes], np.float64).reshape(-1, len(Note._fields))


def notes_from_array(array: np.ndarray) -> list[Note]:
    """The notes that `notes_to_array` stored. ValueError, OverflowError: numbers that are none."""
    return [
        Note(int(pitch), int(velocity), int(program), onset, offset, bool(is_drum), int(instrument))
        for pitch, velocity, program, onset, offset, is_drum, instrument in array.tolist()
    ]


@dataclass(frozen=True)
class StoredPiece:
    """A piece of a prepared folder. It checks what it reads: a UserError names the file, the piece and the damage."""

    folder: Path
    id: str
    stem: str  # path without ".mel.npy", relative to the folder
    num_frames: int
    num_notes: int
    num_samples: int | None  # None: no audio was kept
    timbre: str = ""

    def open_mel(self) -> np.ndarray:
        """Opens the log-mel, float16 [T, 128], on disk; its values are not looked at yet, see `check_mel`."""
        return self._load("mel", np.float16, (self.num_frames, NUM_MELS))

    def open_audio(self) -> np.ndarray:
        """Opens the audio, int16 [S], on disk."""
        if self.num_samples is None:
            raise UserError(f"{self.folder} holds no audio: {AGAIN} --audio")
        return self._load("audio", np.int16, (self.num_samples,))

    def read_notes(self) -> list[Note]:
        """Reads the notes."""
        array = self._load("notes", np.float64, (self.num_notes, len(Note._fields)))
        try:
            notes = notes_from_array(array)
            Events.from_notes(notes)  # complains about what is no note
        except (ValueError, OverflowError) as error:
            raise self._damaged("notes", str(error)) from error
        return notes

    def read(self, audio: bool = True) -> Piece:
        """Reads it whole, with its audio if that was kept and is wanted."""
        mel = self.open_mel().astype(np.float32)
        self.check_mel(mel)
        sound = audio_from_int16(self.open_audio()) if audio and self.num_samples is not None else None
        return Piece(self.id, self.read_notes(), mel, sound, self.timbre)

    def check_mel(self, frames: np.ndarray, first: int = 0) -> None:
        """Refuses frames [t, 128] of its mel, from number `first` on, that hold what no log-mel does."""
        if len(frames) and not (frames.max() <= MAX_LOG_MEL and frames.min() >= -MAX_LOG_MEL):  # NaN, too, is not
            wrong = ~(np.abs(frames) <= MAX_LOG_MEL)
            frame = int(wrong.any(axis=1).argmax())
            value = frames[frame][wrong[frame]][0]
            raise self._damaged("mel", f"{value} in frame {first + frame}, at {(first + frame) / FRAME_RATE:.2f} s")

    def check_sizes(self) -> None:
        """Refuses files that are missing, or of another size than the manifest says."""
        sizes = {"mel": self.num_frames * NUM_MELS * 2, "notes": self.num_notes * len(Note._fields) * 8}
        if self.num_samples is not None:
            sizes["audio"] = self.num_samples * 2
        for kind, data_bytes in sizes.items():
            path = self._path(kind)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"{path} is missing, though the manifest lists it: {AGAIN}") from error
            if not 0 < size - data_bytes <= 1024:  # the header of a .npy file is 128 bytes
                raise UserError(f"{path} has {size} bytes instead of about {data_bytes + 128}: {AGAIN}")

    def _load(self, kind: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = np.lib.format.open_memmap(self._path(kind), mode="r")
        except Exception as error:  # NumPy reads a header as a piece of Python, and fails as that does
            raise self._damaged(kind, f"it cannot be read: {error}") from error
        if array.dtype != dtype or array.shape != shape:
            raise self._damaged(kind, f"{array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}")
        if not array.flags.c_contiguous:
            raise self._damaged(kind, "rows and columns are exchanged")
        return array

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.stem}.{kind}.npy"

    def _damaged(self, kind: str, what: str) -> UserError:
        return UserError(f"{self._path(kind)} (piece {self.id}) is damaged ({what}): {AGAIN}")


def write_folder(
    folder: Path, splits: Mapping[str, Iterable[Piece]], data_set: str, data_set_version: str, audio: bool = False
) -> None:
    """Writes a prepared folder, with the pieces' audio if asked; it appears under its name only when it is whole.

    Raises:
      UserError: the folder exists and is not empty, or cannot be written.
    """
    check_new(folder)
    with telling(f"cannot write {folder}", "; make room or choose another folder"), whole_folder(folder) as part:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "data_set": data_set,
            "data_set_version": data_set_version,
            "mel": MEL_SETTINGS,
            "splits": {split: _write_split(part, split, pieces, audio) for split, pieces in splits.items()},
        }
        write_whole(part / MANIFEST, json.dumps(manifest, indent=1))


def _write_split(part: Path, split: str, pieces: Iterable[Piece], audio: bool) -> list[dict[str, Any]]:
    (part / split).mkdir()
    entries: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        stem = f"{split}/{index:05d}"
        np.save(part / f"{stem}.mel.npy", piece.mel.astype(np.float16))
        np.save(part / f"{stem}.notes.npy", notes_to_array(piece.notes))
        entries.append({"id": piece.id, "files": stem, "frames": len(piece.mel), "notes": len(piece.notes)})
        if piece.timbre:
            entries[-1]["timbre"] = piece.timbre
        if audio:
            assert piece.audio is not None  # whoever asks for audio gives pieces that have it
            samples = audio_to_int16(piece.audio)
            np.save(part / f"{stem}.audio.npy", samples)
            entries[-1]["samples"] = len(samples)
    return entries


def read_manifest(folder: Path) -> dict[str, list[StoredPiece]]:
    """Reads which pieces each split of a prepared folder has.

    Raises:
      UserError: no manifest, or one that does not parse, is of another version, or lists files that are
        missing or cut off.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}: {AGAIN}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} says format {manifest['format']!r}, not {FORMAT!r}: {AGAIN}")
        if manifest["version"] != VERSION:
            raise UserError(f"{path} is version {manifest['version']}, this program reads {VERSION}: {AGAIN}")
        if manifest["mel"] != MEL_SETTINGS:
            raise UserError(f"{path} has mel settings {manifest['mel']}, not {MEL_SETTINGS}: {AGAIN}")
        splits = {
            split: [_stored_piece(folder, entry) for entry in entries] for split, entries in manifest["splits"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error
    for piece in itertools.chain.from_iterable(splits.values()):
        piece.check_sizes()
    return splits


def _stored_piece(folder: Path, entry: Mapping[str, Any]) -> StoredPiece:
    stem = PurePosixPath(entry["files"])
    if stem.is_absolute() or ".." in stem.parts:
        raise ValueError(f"{stem} lies outside")
    sizes = [entry["frames"], entry["notes"], entry.get("samples", 0)]
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    timbre = str(entry.get("timbre", ""))
    return StoredPiece(folder, str(entry["id"]), str(stem), sizes[0], sizes[1], entry.get("samples"), timbre)


# --- training windows ---


class PreparedWindows:
    """The training windows, and the pieces, of a prepared folder.

    The frames of the whole training split, one piece after the other, fall into equal parts of about a segment; an
    epoch draws one window from each part, in a new random order. Example number i is a pure function of (seed, i), so
    any batch can be made at any time: starting at a late step costs nothing. A window with too many tokens is passed
    over; another takes its place.
    """

    def __init__(self, folder: Path, settings: SegmentSettings, on_skip: Callable[[str, float], None]):
        """Opens the folder; on_skip(piece id, seconds) is told of windows that are passed over."""
        self.folder = folder
        self._settings = settings
        self._on_skip = on_skip
        self._splits = read_manifest(folder)
        self._events = functools.lru_cache(maxsize=EVENTS_KEPT)(lambda piece: Events.from_notes(piece.read_notes()))
        self._mel = functools.lru_cache(maxsize=EVENTS_KEPT)(StoredPiece.open_mel)
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Where each training piece ends on the axis of all frames. UserError: there are none."""
        ends = np.cumsum([piece.num_frames for piece in self._split("train")], dtype=np.int64)
        if not len(ends) or not ends[-1]:
            raise UserError(f"{self.folder} has no training pieces: prepare a data set that has some")
        return ends

    @property
    def num_frames(self) -> int:
        return int(self.ends[-1])

    def pieces(self, split: str, audio: bool = True) -> Iterator[Piece]:
        """Reads the whole pieces of `split`, in order; with audio, if the folder holds it."""
        return (piece.read(audio) for piece in self._split(split))

    def _split(self, name: str) -> list[StoredPiece]:
        return split_of(self._splits, name, self.folder)

    def train_row(self, index: int) -> Row:
        """Makes training example number `index` of the endless stream."""
        pieces, ends, settings = self._split("train"), self.ends, self._settings
        num_starts = self.num_frames
        strata = num_strata(num_starts, settings.tokenizer.segment_frames)
        epoch, position = divmod(index, strata)
        stratum = int(self._order(epoch, strata)[position])
        rng = np.random.default_rng([settings.seed, WINDOW_STREAM, index])
        for _ in range(MAX_DRAWS):
            frame = stratified_start(rng, stratum, strata, num_starts)
            number = int(np.searchsorted(ends, frame, side="right"))
            piece, start = pieces[number], frame - int(ends[number] - pieces[number].num_frames)
            context_frames = 0 if rng.random() < settings.empty_context else settings.context_frames
            mel, events = self._mel(piece), self._events(piece)
            known = piece.timbre in settings.tokenizer.timbres and rng.random() >= settings.timbre_dropout
            timbre = piece.timbre if known else ""
            try:
                window = cut_window(
                    mel, events, settings.tokenizer, start, context_frames, on_overflow="error", timbre=timbre
                )
            except SegmentTooLong:
                self._on_skip(piece.id, start / FRAME_RATE)
                stratum = int(rng.integers(strata))
                continue
            row = pad_window(window, settings.tokenizer, settings.context_frames, training=True)
            piece.check_mel(row["mel"], start)
            if settings.context:
                piece.check_mel(row["context_mel"], start - len(window.context))
            return row
        raise UserError(
            f"{MAX_DRAWS} windows of {self.folder} in a row exceed {settings.tokenizer.max_tokens} tokens:"
            " raise Tokenizer.max_tokens"
        )

    def _draw_order(self, epoch: int, strata: int) -> np.ndarray:
        return np.random.default_rng([self._settings.seed, ORDER_STREAM, epoch]).permutation(strata)


def split_of(splits: dict[str, list[StoredPiece]], name: str, folder: Path) -> list[StoredPiece]:
    """Gives the pieces of a split. UserError: there is none of that name."""
    if name not in splits:
        raise UserError(f"{folder} has no split {name!r}: choose from {', '.join(splits)}")
    return splits[name]
