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

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.audio.io import read_audio, write_audio
from music_synth.errors import UserError
from music_synth.midi.notes import Note

SCORES = "scores.json"
MAX_SLUG = 80  # letters of a name that stand in a file's, the last ones


@dataclass(frozen=True)
class Target:
    """What a clip should be."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None = None  # the recording [S]; None where the feed does not keep it


@dataclass(frozen=True)
class Sound:
    """A clip as it was made."""

    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None  # [S]; None for what is never played


@dataclass(frozen=True)
class Folder:
    """A folder of clips; all methods take a clip's name."""

    path: Path

    def has_target(self, name: str) -> bool:
        return self.file(name, "json").exists()  # which is written last

    def write_target(self, name: str, target: Target) -> None:
        self.write_sound(name, Sound(target.mel, target.audio))
        self.write_json(name, "json", {"id": target.id, "notes": target.notes})

    def read_target(self, name: str) -> Target:
        about, sound = self.read_json(name, "json"), self.read_sound(name)
        return Target(about["id"], [Note(*note) for note in about["notes"]], sound.mel, sound.audio)

    def write_sound(self, name: str, sound: Sound) -> None:
        if sound.audio is not None:
            heard = np.clip(sound.audio, -1.0, 1.0)  # what is louder than a file can hold is cut off without a word
            self.write(name, "flac", lambda path: write_audio(path, heard))
        self.write(name, "npz", lambda path: np.savez(path, mel=np.asarray(sound.mel, np.float32)))

    def has_sound(self, name: str) -> bool:
        return self.file(name, "npz").exists()  # which is written last

    def read_sound(self, name: str) -> Sound:
        audio = self.file(name, "flac")
        with np.load(self.file(name, "npz")) as arrays:
            return Sound(arrays["mel"], read_audio(audio) if audio.exists() else None)

    def write_json(self, name: str, kind: str, content: Any) -> None:
        self.write(name, kind, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))

    def read_json(self, name: str, kind: str) -> Any:
        """{} where there is none yet."""
        path = self.file(name, kind)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def file(self, name: str, kind: str) -> Path:
        return self.path / f"{name}.{kind}"

    def write(self, name: str, kind: str, write: Callable[[Path], object]) -> None:
        """UserError if the folder cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as folder:
                made = Path(folder) / f"made.{kind.rsplit('.', 1)[-1]}"
                write(made)
                os.replace(made, self.file(name, kind))
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror or error}") from error


def target_name(piece: Any, heard: str) -> str:
    """The name of a piece's clip, in all folders; `heard` says what its audio is: a recording, or made by what."""
    return f"{slug(piece.id)[-MAX_SLUG:]}-{checksum([piece.id, piece.notes, piece.mel, heard])}"


def slug(text: str) -> str:
    """Text as a part of a file's name: "Diffusion (runs/a)" -> "diffusion-runs-a"."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def checksum(thing: Any) -> str:
    """Of nested plain values, dataclasses of them, and arrays: 8 hexadecimal digits."""
    value = 0

    def add(part: Any) -> None:
        nonlocal value
        if isinstance(part, dict):
            for key in sorted(part):
                add((key, part[key]))
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
            value = zlib.crc32(b";", value)
        elif hasattr(part, "dtype"):
            value = zlib.crc32(np.ascontiguousarray(part).tobytes(), value)
        else:
            value = zlib.crc32(repr(part).encode(), value)

    add(thing)
    return f"{value:08x}"


def file_checksum(path: str | Path) -> str:
    """Of a file or folder as far as names, sizes and times of change tell; of a name that is no path: its own."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return checksum([str(path), [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]])
