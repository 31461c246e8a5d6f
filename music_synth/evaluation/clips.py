"""The clips of an evaluation on disk, so that one that was killed goes on, and memory does not grow with their number.

    clips/target/string-quartet-1a2b3c4d.json     id, notes; .npz: log-mel; .flac: the recording
    clips/diffusion-whole-5e6f7a8b/
        string-quartet-1a2b3c4d.npz               log-mel, as sampled
        string-quartet-1a2b3c4d.flac              the audio of it
        string-quartet-1a2b3c4d.scores.json       what was measured so far
        string-quartet-1a2b3c4d.vggish-0.npy      frames of an embedding

A clip's name has a checksum of its notes, its mel and the origin of its audio in it, a folder's one of all that its
clips depend on: what is found under a name is what would be made anew. Every file appears under its name when it is
whole.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.audio.io import read_audio, write_audio
from music_synth.errors import UserError, telling
from music_synth.midi.notes import Note

SCORES = "scores.json"
UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)  # what a damaged file raises
MAX_SLUG = 80  # letters of a name that stand in a file's, the last ones


@dataclass(frozen=True)
class Target:
    """What a clip should be."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None = None  # the recording [S]; None where the feed does not keep it
    timbre: str = ""  # as of `Piece`


@dataclass(frozen=True)
class Sound:
    """A clip as it was made."""

    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None  # [S]; None for what is never played


@dataclass(frozen=True)
class Folder:
    """A folder of clips; all methods take a clip's name. What is cut or empty, and cannot be read, is not there."""

    path: Path

    def write_target(self, name: str, target: Target) -> None:
        self.write_sound(name, Sound(target.mel, target.audio))
        self.write_json(name, "json", {"id": target.id, "notes": target.notes, "timbre": target.timbre})

    def find_target(self, name: str) -> Target | None:
        about, sound = self.read_json(name, "json"), self.find_sound(name)
        try:
            notes = [Note(*note) for note in about["notes"]]
            timbre = about.get("timbre", "")
            return None if sound is None else Target(about["id"], notes, sound.mel, sound.audio, timbre)
        except (KeyError, TypeError):
            return None

    def read_target(self, name: str) -> Target:
        """Reads what `write_target` wrote; UserError if it is not there any more."""
        return self._present(name, self.find_target(name))

    def write_sound(self, name: str, sound: Sound) -> None:
        if sound.audio is not None:
            heard = np.clip(sound.audio, -1.0, 1.0)  # what is louder than a file can hold is cut off without a word
            self.write(name, "flac", functools.partial(write_audio, audio=heard))
        num_samples = -1 if sound.audio is None else len(sound.audio)
        mel = np.asarray(sound.mel, np.float32)
        self.write(name, "npz", functools.partial(np.savez, mel=mel, num_samples=num_samples))  # last: makes it a clip

    def find_sound(self, name: str) -> Sound | None:
        try:
            with open(self.file(name, "npz"), "rb") as file, np.load(file) as arrays:  # np.load leaves a bad one open
                mel, num_samples = arrays["mel"], int(arrays["num_samples"])
            audio = None if num_samples < 0 else read_audio(self.file(name, "flac"))
        except (*UNREADABLE, UserError):
            return None
        return Sound(mel, audio) if audio is None or len(audio) == num_samples else None

    def read_sound(self, name: str) -> Sound:
        """Reads what `write_sound` wrote; UserError if it is not there any more."""
        return self._present(name, self.find_sound(name))

    def write_json(self, name: str, kind: str, content: Any) -> None:
        def write(path: Path) -> None:
            path.write_text(json.dumps(content), encoding="utf-8")

        self.write(name, kind, write)

    def read_json(self, name: str, kind: str) -> dict[str, Any]:
        """Reads a dictionary; {} where there is none."""
        try:
            content = json.loads(self.file(name, kind).read_text(encoding="utf-8"))
        except UNREADABLE:
            return {}
        return content if isinstance(content, dict) else {}

    def find_array(self, name: str, kind: str) -> np.ndarray | None:
        try:
            return np.load(self.file(name, kind))
        except UNREADABLE:
            return None

    def file(self, name: str, kind: str) -> Path:
        return self.path / f"{name}.{kind}"

    def write(self, name: str, kind: str, write: Callable[[Path], object]) -> None:
        """Has `write` write a file; UserError if the folder cannot be written."""
        with telling(f"cannot write into {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as folder:
                made = Path(folder) / f"made.{kind.rsplit('.', 1)[-1]}"
                write(made)
                os.replace(made, self.file(name, kind))  # not synced: what a crash cuts off is made anew

    def _present(self, name: str, found: Any) -> Any:
        if found is None:
            raise UserError(f"the clip {name} in {self.path} is gone or damaged; the same command makes it anew")
        return found


def target_name(piece: Any, heard: str) -> str:
    """Names a piece's clip, in all folders; `heard` says what its audio is: a recording, or made by what."""
    identity = [piece.id, piece.notes, piece.mel, heard, *([piece.timbre] if piece.timbre else [])]
    return f"{slug(piece.id)[-MAX_SLUG:]}-{checksum(identity)}"


def slug(text: str) -> str:
    """Makes text a part of a file's name: "Diffusion (runs/a)" -> "diffusion-runs-a"."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def checksum(thing: Any) -> str:
    """Sums up nested plain values, dataclasses of them, and arrays: 8 hexadecimal digits."""
    return f"{_crc(thing, 0):08x}"


def _crc(part: Any, value: int) -> int:
    if isinstance(part, dict):
        for key in sorted(part):
            value = _crc((key, part[key]), value)
        return value
    if isinstance(part, (list, tuple)):
        for item in part:
            value = _crc(item, value)
        return zlib.crc32(b";", value)
    if hasattr(part, "dtype"):
        return zlib.crc32(np.ascontiguousarray(part).tobytes(), value)
    return zlib.crc32(repr(part).encode(), value)


def file_checksum(path: str | Path) -> str:
    """Sums up a file or folder as far as names, sizes and times of change tell; of a name that is no path: its own."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return checksum([str(path), [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]])
