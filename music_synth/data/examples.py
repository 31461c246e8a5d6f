"""From a whole piece to training and evaluation examples: the functions that every feed shares.

A window is `segment_frames` frames of a piece. An example is a window's note tokens, its log-mel and the
log-mel of the frames just before it (the context). The prepared feed and the seqio feed share all of it.

Where this differs from the published selector (Hawthorne et al. 2022; its quirks: golden/README.md 3.11.3-6):

- A window that begins the piece has an empty context (mask all False), the one that playing starts with; a
  window that begins less than a context later has the true shorter one, at the front, with a prefix mask.
  Published, such contexts end in the first 16 frames of the target itself.
- Everything is cut from the mel of the whole piece, so no frame comes from a truncated window of samples.
- The window starts anywhere in the piece with equal probability, with and without context. Published, without
  context, a window may also start before the piece and is then shortened.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL, NUM_MELS
from music_synth.midi.notes import Note
from music_synth.midi.segments import SegmentTooLong, pad_tokens
from music_synth.midi.tokenizer import Events, Tokenizer

Example = dict[str, np.ndarray]  # one row of a batch
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A whole piece: what full-length evaluation and the cutting of segments need."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # [T, M] float32, natural-log mel
    audio: np.ndarray | None = None  # [S] float32, 16 kHz, where the feed has it


def num_segments(num_frames: int, segment_frames: int) -> int:
    """Consecutive segments that cover `num_frames` frames of mel; the last may be partly empty."""
    return -(-num_frames // segment_frames)


def stratified_start(rng: np.random.Generator, stratum: int, num_strata: int, num_frames: int) -> int:
    """A frame drawn uniformly from one of `num_strata` equal parts of range(num_frames).

    One draw from every part covers a piece evenly, and a start is still uniform over the whole (to a frame a
    part).
    """
    return int(rng.integers(stratum * num_frames // num_strata, (stratum + 1) * num_frames // num_strata))


def cut_target(mel: np.ndarray, start: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """`num_frames` frames of mel [T, M] from `start` on, and their mask: False (and silence) after its end."""
    piece = mel[start : start + num_frames]
    return _pad_frames(piece, num_frames), np.arange(num_frames) < len(piece)


def cut_context(mel: np.ndarray, start: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The (up to) num_frames frames before `start`, at the front of the window, and their mask [num_frames].

    The mask is a prefix: all True from start = num_frames on, all False at start = 0. Frame `start` itself,
    the target's first, is never in it.
    """
    piece = mel[max(0, start - num_frames) : start] if start > 0 else mel[:0]
    return _pad_frames(piece, num_frames), np.arange(num_frames) < len(piece)


def _pad_frames(piece: np.ndarray, num_frames: int) -> np.ndarray:
    frames = np.full((num_frames, piece.shape[-1]), MIN_LOG_MEL, np.float32)
    frames[: len(piece)] = piece
    return frames


def make_example(
    mel: np.ndarray,
    events: Events,
    tokenizer: Tokenizer,
    start: int,
    *,
    context_frames: int,
    training: bool,
    first_frame: int = 0,
    empty_context: bool = False,
) -> Example | None:
    """Tokens, target and context of the window that begins at frame `start` of `mel`.

    Args:
      mel: log-mel [T, M] of a piece, or of a stretch of it that reaches a context before and a segment after.
      events: of the whole piece.
      start: in frames of `mel`, 0 <= start < T.
      context_frames: 0 leaves context_mel and context_mask out.
      training: a window with too many tokens gives None (else it loses its last events, with a warning);
        silence after the end of the piece is part of the target (else it is masked).
      first_frame: frame of the piece at which `mel` begins.
      empty_context: mask the context whatever there is.

    Returns:
      note_tokens [max_tokens] int32 (padded with 0), mel [T, M] float32, mel_mask [T] bool, context_mel
      [C, M] float32, context_mask [C] bool; T = segment_frames, C = context_frames.
    """
    num_frames = tokenizer.segment_frames
    try:
        on_overflow = "error" if training else "truncate"
        tokens = tokenizer.encode_window(events, first_frame + start, num_frames, on_overflow)
    except SegmentTooLong:
        return None
    target, present = cut_target(mel, start, num_frames)
    example = {
        "note_tokens": pad_tokens(tokens, tokenizer.max_tokens),
        "mel": target,
        "mel_mask": np.ones(num_frames, bool) if training else present,
    }
    if context_frames:
        context, context_mask = cut_context(mel, start, context_frames)
        example["context_mel"] = context
        example["context_mask"] = context_mask & (not empty_context)
    return example


def blank_example(tokenizer: Tokenizer, context_frames: int) -> Example:
    """A row that counts for nothing (all masks False), to fill up the last batch of an evaluation."""
    num_frames = tokenizer.segment_frames
    example = {
        "note_tokens": np.zeros(tokenizer.max_tokens, np.int32),
        "mel": np.full((num_frames, NUM_MELS), MIN_LOG_MEL, np.float32),
        "mel_mask": np.zeros(num_frames, bool),
    }
    if context_frames:
        example["context_mel"] = np.full((context_frames, NUM_MELS), MIN_LOG_MEL, np.float32)
        example["context_mask"] = np.zeros(context_frames, bool)
    return example


def stack(examples: list[Example]) -> Batch:
    """Rows to a batch [B, ...]."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def shard_rows(batch_size: int, shard_index: int, num_shards: int) -> range:
    """Rows of a global batch that process `shard_index` of `num_shards` makes."""
    if not (0 <= shard_index < num_shards) or batch_size % num_shards:
        raise ValueError(f"batch_size = {batch_size} cannot be split for shard {shard_index} of {num_shards}")
    rows = batch_size // num_shards
    return range(shard_index * rows, (shard_index + 1) * rows)


def evaluation_batches(
    pieces: Iterable[tuple[np.ndarray, Events]],
    tokenizer: Tokenizer,
    *,
    context_frames: int,
    batch_size: int,
    rows: range,
) -> Iterator[Batch]:
    """The consecutive segments of (mel, events) pieces, with true context (the first of a piece: none).

    Of every global batch of `batch_size` only `rows` are made; the last batch is filled up with blank rows.
    """
    step = tokenizer.segment_frames
    windows = ((mel, events, start) for mel, events in pieces for start in range(0, len(mel), step))
    blank = blank_example(tokenizer, context_frames)
    while chunk := list(itertools.islice(windows, batch_size)):
        examples = [
            make_example(mel, events, tokenizer, start, context_frames=context_frames, training=False)
            for mel, events, start in chunk[rows.start : rows.stop]
        ]
        yield stack(examples + [blank] * (len(rows) - len(examples)))
