"""Files of a piece as it is edited: audio of a voice, each part alone, or MIDI."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.audio.io import audio_from_int16, audio_writer
from music_synth.errors import UserError
from music_synth.studio.pieces import StudioPiece
from music_synth.studio.protocol import Edit, PartEdit, Voice, choice, nested, text
from music_synth.studio.tracks import Memory
from music_synth.studio.voices import Voices, instrument_names

FORMATS = {"wav": "audio/wav", "flac": "audio/flac", "stems": "application/zip", "mid": "audio/midi"}


@dataclass(frozen=True)
class Wanted:
    """A file that is asked for."""

    voice: Voice = field(metadata=nested(Voice, "voice"))
    piece: str = text()
    format: str = choice(FORMATS)
    edit: Edit = field(default=Edit(), metadata=nested(Edit, "edit"))


def write(folder: Path, wanted: Wanted, piece: StudioPiece, voices: Voices) -> Iterator[Any]:
    """Writes the file `folder`/file.FORMAT step by step; yields what is to be waited for, or None, after each.

    Audio is what `synthesize` writes of the MIDI file as edited, byte for byte.

    Raises:
      UserError: nothing would be heard, or the voice does not play this piece.
    """
    target = folder / f"file.{wanted.format}"
    if wanted.format == "mid":
        midi = piece.edited(wanted.edit)[1]
        if not midi:
            raise UserError("every part is muted: there is nothing to save")
        target.write_bytes(midi)
    elif wanted.format == "stems":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name, edit in stems(piece, wanted.edit):
                stem = folder / "stem.wav"
                yield from write_audio(stem, wanted.voice, piece, edit, voices)
                archive.write(stem, name)
    else:
        yield from write_audio(target, wanted.voice, piece, wanted.edit, voices)


def write_audio(target: Path, voice: Voice, piece: StudioPiece, edit: Edit, voices: Voices) -> Iterator[Any]:
    """Writes the audio of a voice."""
    with audio_writer(target) as append:
        for stretch in voices.play(voice, piece, edit, 0, Memory(), False):
            audio = getattr(stretch, "audio", None)
            if audio is not None:
                audio = audio_from_int16(audio) if audio.dtype == np.int16 else audio
                append(audio.clip(-1.0, 1.0))
            yield None if hasattr(stretch, "audio") else stretch


def stems(piece: StudioPiece, edit: Edit) -> Iterator[tuple[str, Edit]]:
    """Yields (name of a file, the edit in which that part is alone) of every part that is heard."""
    for part in piece.describe()["parts"]:
        number = part["part"]
        if not edit.hears(number):
            continue
        own = edit.parts.get(number, PartEdit())
        others = {other: dataclasses.replace(change, solo=False) for other, change in edit.parts.items()}
        program = part["program"] if own.program is None else own.program
        drum = part["drum"] if own.drum is None else own.drum
        name = "Drums" if drum else re.sub(r"\W+", "_", instrument_names()[program]).strip("_")
        yield (
            f"{number + 1:02d}_{name}.wav",
            dataclasses.replace(edit, parts={**others, number: dataclasses.replace(own, solo=True)}),
        )
