"""The held-out pieces that are scored: chosen, cut, and kept on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, NUM_MELS, log_mel
from music_synth.data.examples import Piece
from music_synth.errors import UserError
from music_synth.evaluation.clips import Folder, Target, target_name
from music_synth.evaluation.measures import Tools


class Targets(NamedTuple):
    """The clips of a split, on disk."""

    folder: Folder
    names: list[str]
    seconds: float
    have_audio: bool  # else the mel through the first inverter stands for the recording


def take(
    pieces: Iterable[Piece], max_seconds: float | None = None, clip_seconds: float | None = None
) -> Iterator[Piece]:
    """Yields pieces in order, `clip_seconds` of each, until `max_seconds` are full; the last one is cut there."""
    for name, seconds in (("max_seconds", max_seconds), ("clip_seconds", clip_seconds)):
        if seconds is not None and not 0 < seconds < math.inf:
            raise UserError(f"evaluate.{name} = {seconds}: must be positive and finite, or None for all")
    left, longest = (
        float("inf") if seconds is None else max(1, round(seconds * FRAME_RATE))
        for seconds in (max_seconds, clip_seconds)
    )
    for piece in pieces:
        length = min(left, longest)
        taken = cut(piece, int(length)) if length < len(piece.mel) else piece
        left -= len(taken.mel)
        yield taken
        if left <= 0:
            return


def cut(piece: Piece, num_frames: int) -> Piece:
    """Cuts a piece to its first `num_frames` frames; notes that sound at the cut end there."""
    end = num_frames / FRAME_RATE
    notes = [note._replace(offset=min(note.offset, end)) for note in piece.notes if note.onset < end]
    # One hop more: the last frame's window reaches into it.
    audio = None if piece.audio is None else piece.audio[: (num_frames + 1) * HOP_LENGTH]
    return dataclasses.replace(piece, notes=notes, mel=piece.mel[:num_frames], audio=audio)


def rendered(soundfont: Path) -> Iterator[Piece]:
    """Renders the test pieces of the embedded data set by another SoundFont than its own."""
    from music_synth.data import synthetic
    from music_synth.midi.notes import read_midi

    for spec in synthetic.plan_split("test", 40):
        midi = synthetic.compose(spec)
        audio = synthetic.render(midi, soundfont=soundfont)
        yield Piece(spec.id, read_midi(midi), log_mel(audio, np), audio)


def mean_log_mel(pieces: Iterable[Piece]) -> np.ndarray:
    """Takes the mean log-mel [M] over all frames of the pieces, float32."""
    total, count = np.zeros(NUM_MELS), 0
    for piece in pieces:
        total = total + piece.mel.sum(axis=0, dtype=np.float64)
        count += len(piece.mel)
    if not count:
        raise UserError("the training split is empty: its mean spectrum cannot be taken")
    return (total / count).astype(np.float32)


def store_targets(pieces: Iterable[Piece], folder: Path, tools: Tools, inverters: Mapping[str, str]) -> Targets:
    """Writes the pieces one by one. Those whose audio the feed does not keep get that of their mel.

    Args:
      inverters: checksums of their files, by which what one made is told from what another did.
    """
    kept, names, seconds, have_audio = Folder(folder / "target"), [], 0.0, True
    first = next(iter(inverters))
    for piece in pieces:
        have_audio &= piece.audio is not None
        name = target_name(piece, heard=inverters[first] if piece.audio is None else "recording")
        needed = len(piece.mel) * HOP_LENGTH
        if kept.find_target(name) is None:
            audio = tools.inverters[first](piece.mel, piece.notes) if piece.audio is None else piece.audio
            audio = audio[: needed + HOP_LENGTH]
            audio = np.pad(audio, (0, max(0, needed - len(audio))))
            kept.write_target(name, Target(piece.id, piece.notes, piece.mel, audio, piece.timbre))
        names.append(name)
        seconds += len(piece.mel) / FRAME_RATE
    return Targets(kept, names, seconds, have_audio)
