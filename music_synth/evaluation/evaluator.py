"""Held-out log-mel error: how far the mel that a decoder writes lies from the mel of the recording.

Mean absolute difference over all frames and mel bins of a split, in dB. Two ways, both reported:

* whole pieces, generated as a listener hears them: the context of a segment is what the model wrote before;
* single segments with their true context.

Beside the checkpoints stand the training set's mean spectrum (what no model should fail to beat), the target
through the inverter (what is lost after the decoder) and the target itself (0 if data and mel agree).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from music_synth.audio.mel import DB_PER_NEPER, FRAME_RATE, HOP_LENGTH, MIN_LOG_MEL, log_mel
from music_synth.chaining import check_finite, pad_to_bucket, sample_chain, sample_segment
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.seam import Seam


class Piece(Protocol):
    """A whole piece of a split, as `Feed.pieces` yields it; a frozen dataclass."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None  # [S]; None where the feed does not keep it


class Checkpoint(NamedTuple):
    """A trained decoder with what it takes to use it."""

    name: str  # its row in the table
    model: Seam
    tokenizer: Tokenizer
    params: Any


@dataclass(frozen=True)
class Row:
    """One line of the table: log-mel errors in dB, None where the column does not apply."""

    name: str
    whole_pieces: float | None
    single_segments: float | None


class LogMelError:
    """Mean absolute difference in dB, summed in float64. Values under the mel's floor count as the floor."""

    def __init__(self):
        self._sum, self._count = 0.0, 0

    def add(self, mel: np.ndarray, target: np.ndarray) -> None:
        """Both log-mel [T, M]."""
        if mel.shape != target.shape:
            raise ValueError(f"mel of shape {mel.shape} against a target of shape {target.shape}")
        difference = np.maximum(mel, MIN_LOG_MEL).astype(np.float64) - np.maximum(target, MIN_LOG_MEL)
        self._sum += float(np.abs(difference).sum())
        self._count += difference.size

    def result(self) -> float:
        if not self._count:
            raise ValueError("no frames were added")
        return float(DB_PER_NEPER * self._sum / self._count)


def score(
    pieces: Sequence[Piece],
    mean_spectrum: np.ndarray,
    checkpoints: Sequence[Checkpoint],
    inverter: Callable[[np.ndarray], np.ndarray],
    inverter_name: str,
    batch_size: int = 8,
    seed: int = 0,
    on_piece: Callable[[str, Piece, np.ndarray], None] | None = None,
    progress: bool = False,
) -> list[Row]:
    """All rows of the table.

    Args:
      pieces: of the held-out split, from `take`.
      mean_spectrum: log-mel [M] of the training split, from `mean_log_mel`.
      batch_size: pieces (or segments) sampled side by side; changes the speed, not the numbers.
      seed: of the sampling; each piece's random numbers follow from it and the piece's id.
      on_piece: called with the checkpoint's name, each whole piece and its sampled log-mel [T, M].
      progress: bars on stderr.

    Raises:
      UserError: a checkpoint's output is not finite (the message names it).
    """

    def bar(name: str, steps: Iterable, total: int) -> Iterable:
        return tqdm(steps, desc=name, total=total, disable=not progress)

    constant = _error((np.broadcast_to(mean_spectrum, piece.mel.shape), piece.mel) for piece in pieces)
    rows = [Row("mean spectrum of the training set", constant, constant)]
    for checkpoint in checkpoints:
        whole, single = LogMelError(), LogMelError()
        try:
            sampled = sample_whole(checkpoint, pieces, batch_size, seed)
            for piece, mel in bar(f"{checkpoint.name}: whole pieces", sampled, len(pieces)):
                whole.add(mel, piece.mel)
                if on_piece is not None:
                    on_piece(checkpoint.name, piece, mel)
            sampled = sample_single(checkpoint, pieces, batch_size, seed)
            for mel, target in bar(f"{checkpoint.name}: segments", sampled, num_segments(checkpoint, pieces)):
                single.add(mel, target)
        except UserError as error:
            raise UserError(f"{checkpoint.name}: {error}") from error
        rows.append(Row(checkpoint.name, whole.result(), single.result()))
    vocoded = ((log_mel(inverter(piece.mel), np), piece.mel) for piece in pieces)
    vocoded = bar(inverter_name, vocoded, len(pieces))
    rows.append(Row(f"target through {inverter_name}", _error(vocoded), None))
    itself = ((_reencoded(piece), piece.mel) for piece in pieces)
    rows.append(Row("target itself", _error(itself), None))
    return rows


def take(pieces: Iterable[Piece], max_seconds: float | None = None) -> list[Piece]:
    """The pieces in order until `max_seconds` are full; the last one is cut there. None: all of them."""
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds = {max_seconds}: must be positive, or None for the whole split")
    left = float("inf") if max_seconds is None else max(1, round(max_seconds * FRAME_RATE))
    taken = []
    for piece in pieces:
        taken.append(cut(piece, left) if left < len(piece.mel) else piece)
        left -= len(taken[-1].mel)
        if left <= 0:
            break
    return taken


def cut(piece: Piece, num_frames: int) -> Piece:
    """The first `num_frames` frames of a piece; notes that sound at the cut end there."""
    end = num_frames / FRAME_RATE
    notes = [note._replace(offset=min(note.offset, end)) for note in piece.notes if note.onset < end]
    # One hop more: the last frame's window reaches into it.
    audio = None if piece.audio is None else piece.audio[: (num_frames + 1) * HOP_LENGTH]
    return dataclasses.replace(piece, notes=notes, mel=piece.mel[:num_frames], audio=audio)


def mean_log_mel(pieces: Iterable[Piece]) -> np.ndarray:
    """Mean log-mel [M] over all frames of the pieces, float32."""
    total, count = 0.0, 0
    for piece in pieces:
        total = total + piece.mel.sum(axis=0, dtype=np.float64)
        count += len(piece.mel)
    if not count:
        raise UserError("the training split is empty: its mean spectrum cannot be taken")
    return (total / count).astype(np.float32)


def sample_whole(
    checkpoint: Checkpoint, pieces: Sequence[Piece], batch_size: int, seed: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece and its sampled log-mel [T, M], longest first; context from the model's own output."""
    pieces = sorted(pieces, key=lambda piece: -len(piece.mel))  # of similar length side by side
    num_groups = -(-len(pieces) // batch_size)
    # Groups of even size: a size of its own for the last one would be compiled for once more.
    for group in np.array_split(np.arange(len(pieces)), num_groups):
        chosen = [pieces[index] for index in group]
        tokens = [checkpoint.tokenizer.encode(piece.notes, len(piece.mel)) for piece in chosen]
        seeds = [piece_seed(piece.id, seed) for piece in chosen]
        mel = np.concatenate(list(sample_chain(checkpoint.model, checkpoint.params, tokens, seeds)), axis=1)
        for row, piece in zip(mel, chosen, strict=True):
            yield piece, row[: len(piece.mel)]


def sample_single(
    checkpoint: Checkpoint, pieces: Sequence[Piece], batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(mel, target), both [T, M] or shorter, of each segment; context = the true segment before it."""
    network = checkpoint.model.network
    segments = [
        (piece, index, tokens)
        for piece in pieces
        for index, tokens in enumerate(checkpoint.tokenizer.encode(piece.notes, len(piece.mel)))
    ]
    segments.sort(key=lambda segment: len(segment[2]))  # one bucket of tokens side by side
    for first in range(0, len(segments), batch_size):
        chosen = segments[first : first + batch_size]
        filled = chosen + chosen[:1] * (batch_size - len(chosen))  # one shape for all batches
        contexts = [true_context(piece.mel, index, network) for piece, index, _ in filled]
        batch = {
            "note_tokens": pad_to_bucket([tokens for _, _, tokens in filled], network.max_tokens),
            "context_mel": np.stack([context for context, _ in contexts]),
            "context_mask": np.stack([mask for _, mask in contexts]),
        }
        seeds = np.array([piece_seed(piece.id, seed) for piece, _, _ in filled], np.uint32)
        indices = np.array([index for _, index, _ in filled], np.uint32)
        mel = np.asarray(sample_segment(checkpoint.model, checkpoint.params, batch, seeds, indices))
        check_finite(mel, "single segments")
        for row, (piece, index, _) in zip(mel, chosen, strict=False):  # the filling is left out
            target = piece.mel[index * network.target_frames :][: network.target_frames]
            yield row[: len(target)], target


def true_context(mel: np.ndarray, index: int, network) -> tuple[np.ndarray, np.ndarray]:
    """Context [C, M] and mask [C] of segment `index` of a piece's log-mel; before the first: nothing."""
    start = index * network.target_frames
    if index == 0:
        shape = (network.context_frames, network.num_mels)
        return np.zeros(shape, np.float32), np.zeros(network.context_frames, bool)
    return mel[start - network.context_frames : start], np.ones(network.context_frames, bool)


def num_segments(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> int:
    frames = checkpoint.model.network.target_frames
    return sum(-(-len(piece.mel) // frames) for piece in pieces)


def piece_seed(piece_id: str, seed: int) -> int:
    """Seed of a piece: from its id, so that order and batching of the pieces change nothing."""
    return zlib.crc32(f"{seed} {piece_id}".encode())


def _error(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    error = LogMelError()
    for mel, target in pairs:
        error.add(mel, target)
    return error.result()


def _reencoded(piece: Piece) -> np.ndarray:
    """The mel of the piece's audio where there is audio, else its mel."""
    if piece.audio is None:
        return piece.mel
    needed = len(piece.mel) * HOP_LENGTH
    audio = np.pad(piece.audio, (0, max(0, needed - len(piece.audio))))
    return log_mel(audio, np)[: len(piece.mel)]


def to_markdown(rows: Sequence[Row], heading: str) -> str:
    """The table, with how far each row lies below the first one's error (mean spectrum) on whole pieces."""
    baseline = rows[0].whole_pieces
    lines = [
        heading,
        "",
        "| | whole pieces, dB | against the mean spectrum | single segments with true context, dB |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        gain = "" if row is rows[0] or not baseline else f"{100 * (row.whole_pieces / baseline - 1):+.0f} %"
        single = "" if row.single_segments is None else f"{row.single_segments:.2f}"
        lines.append(f"| {row.name} | {row.whole_pieces:.2f} | {gain} | {single} |")
    return "\n".join(lines) + "\n"
