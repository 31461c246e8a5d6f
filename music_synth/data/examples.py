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
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL, NUM_MELS
from music_synth.midi.notes import Note
from music_synth.midi.segments import pad_tokens
from music_synth.midi.tokenizer import Events, OnOverflow, Tokenizer

Example = dict[str, np.ndarray]  # one row of a batch
Batch = dict[str, np.ndarray]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A whole piece: what full-length evaluation and the cutting of segments need."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # [T, M] float32, natural-log mel
    audio: np.ndarray | None = None  # [S] float32, 16 kHz, where the feed has it


def num_strata(num_starts: int, segment_frames: int) -> int:
    """Into how many parts a stretch of possible starts falls, so that a part is about a segment."""
    return max(1, round(num_starts / segment_frames))


def stratified_start(rng: np.random.Generator, stratum: int, strata: int, num_starts: int) -> int:
    """A start drawn uniformly from part `stratum` of range(num_starts) cut into `strata` equal parts.

    One draw from every part covers a piece evenly; a single draw is uniform over the whole, but for rounding.
    """
    return int(rng.integers(stratum * num_starts // strata, (stratum + 1) * num_starts // strata))


class Window(NamedTuple):
    """A window as it is cut, without padding."""

    tokens: np.ndarray  # [n] int32, with EOS
    target: np.ndarray  # [t, M], the frames of the window that the piece has, at least one
    context: np.ndarray  # [c, M], the frames before it that the piece has, none at its beginning


def cut_window(
    mel: np.ndarray,
    events: Events,
    tokenizer: Tokenizer,
    start: int,
    context_frames: int,
    *,
    first_frame: int = 0,
    on_overflow: OnOverflow = "truncate",
) -> Window:
    """The window that begins at frame `start` of `mel`, and at most `context_frames` frames before it.

    Args:
      mel: log-mel [T, M] of a piece, or of a stretch of it that reaches a context before and a segment after.
      events: of the whole piece.
      start: in frames of `mel`, 0 <= start < T. It is the first frame of the target and never in the context.
      first_frame: frame of the piece at which `mel` begins.
      on_overflow: what to do with more than max_tokens tokens, see `Tokenizer.encode_window`.

    Raises:
      SegmentTooLong: too many tokens, and on_overflow is "error".
    """
    num_frames = tokenizer.segment_frames
    return Window(
        tokenizer.encode_window(events, first_frame + start, num_frames, on_overflow),
        mel[start : start + num_frames],
        mel[max(0, start - context_frames) : start],
    )


def pad_window(window: Window, tokenizer: Tokenizer, context_frames: int, *, training: bool) -> Example:
    """One row of a batch: tokens padded with 0, frames with silence; the context stands at the front.

    In training, what follows the end of the piece is silence to be learned, as any other frame; in evaluation
    it is masked. The context's mask is True for its frames.
    """
    target, present = _pad_frames(window.target, tokenizer.segment_frames)
    example = {
        "note_tokens": pad_tokens(window.tokens, tokenizer.max_tokens),
        "mel": target,
        "mel_mask": np.ones_like(present) if training else present,
    }
    if context_frames:
        example["context_mel"], example["context_mask"] = _pad_frames(window.context, context_frames)
    return example


def _pad_frames(frames: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """frames [t, M] with silence appended, float32 [length, M], and a mask [length] of the frames proper."""
    padded = np.full((length, NUM_MELS), MIN_LOG_MEL, np.float32)
    padded[: len(frames)] = frames
    return padded, np.arange(length) < len(frames)


def tell_skipped(count: int, piece: str, seconds: float, max_tokens: int) -> None:
    """Logs that a training window was skipped: the first one, the second, the fourth, the eighth and so on."""
    if count & (count - 1) == 0:
        log.warning(
            "skipped a window of %s at %.2f s: more than %d tokens (%d skipped so far)",
            piece,
            seconds,
            max_tokens,
            count,
        )


def blank_example(tokenizer: Tokenizer, context_frames: int) -> Example:
    """A row that counts for nothing (all masks False), to fill up the last batch of an evaluation."""
    nothing = np.zeros((0, NUM_MELS), np.float32)
    window = Window(np.zeros(0, np.int32), nothing, nothing)
    return pad_window(window, tokenizer, context_frames, training=False)


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
        examples = []
        for mel, events, start in chunk[rows.start : rows.stop]:
            window = cut_window(mel, events, tokenizer, start, context_frames)
            examples.append(pad_window(window, tokenizer, context_frames, training=False))
        yield stack(examples + [blank] * (len(rows) - len(examples)))
