"""From a whole piece to training and evaluation examples: the settings and functions that all feeds share.

A window is `segment_frames` frames of a piece. An example is a window's note tokens, its log-mel and the
log-mel of the frames just before it (the context).

Where this differs from the published selector (Hawthorne et al. 2022; its quirks: docs/spec.md 3.11.3-6):

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
from typing import NamedTuple

import numpy as np

from music_synth.audio.io import audio_from_int16, audio_to_int16
from music_synth.audio.mel import DB_PER_NEPER, MIN_LOG_MEL, NUM_MELS, log_mel
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import pad_tokens
from music_synth.midi.tokenizer import Events, OnOverflow, Tokenizer
from music_synth.midi.vocabulary import Vocabulary

Row = dict[str, np.ndarray]  # of a batch
Batch = dict[str, np.ndarray]

NO_CONTEXT = "_nocontext"  # suffix of the task without context


@dataclass(kw_only=True)
class FeedSettings:
    """What every feed is told, that of a decoder and that of an inverter."""

    task: str  # a folder written by prepare_data, a mixture of some, or the name of a data set, a seqio task or mixture
    batch_size: int
    seed: int = 0  # of windows and order
    data_dir: str | None = None  # where data sets live (default: data/ of the checkout)

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"{type(self).__name__}.seed = {self.seed}: must be in 0..{2**32 - 1}")


@dataclass(kw_only=True)
class SegmentSettings(FeedSettings):
    """What a decoder's feed is told besides.

    empty_context is the share of training examples whose context is masked, to practice beginnings. Every piece that is
    played begins without context; among windows drawn evenly from pieces of 2,000 frames one in 2,000 does, too few to
    learn from. The published setting is 0. timbre_dropout is the share of those with a timbre that do not say which.

    quieter_db is by how much a training example is made quieter, at most, in velocities and mel alike (`quieter`): the
    notes of most data sets are loud, and what is never heard soft is not played soft.

    rehearsal is another task, a share of the training examples, so that a model that is tuned does not forget what it
    could before; what is held out is that of `task` alone.
    """

    tokenizer: Tokenizer
    context: bool = True  # whether batches have context_mel and context_mask
    empty_context: float = 0.1
    timbre_dropout: float = 0.15
    quieter_db: float = 0.0
    rehearsal: str | None = None
    rehearsal_share: float = 0.25
    cache_dir: str | None = None  # folder of seqio's offline cache of the task

    def __post_init__(self):
        super().__post_init__()
        for name in ("empty_context", "timbre_dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"Feed.{name} = {share}: must be in [0, 1]")
        if not 0 <= self.quieter_db <= 60 or (self.quieter_db and self.tokenizer.velocity_bins == 1):
            raise UserError(
                f"Feed.quieter_db = {self.quieter_db}: must be in [0, 60], and 0 where Tokenizer.velocity_bins = 1,"
                " as such tokens do not tell loudness"
            )
        if not 0 < self.rehearsal_share < 1:
            raise UserError(f"Feed.rehearsal_share = {self.rehearsal_share}: must be between 0 and 1")

    @property
    def context_frames(self) -> int:
        return self.tokenizer.segment_frames if self.context else 0


def data_set_of(task: str) -> str:
    """Gives the data set that a task of this package is about, "synthetic:5min" of "synthetic:5min_nocontext"."""
    return task.removesuffix(NO_CONTEXT)


@dataclass(frozen=True)
class Piece:
    """A whole piece: what full-length evaluation and the cutting of segments need."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # [T, M] float32, natural-log mel
    audio: np.ndarray | None = None  # [S] float32, 16 kHz, where the feed has it
    timbre: str = ""  # name of the SoundFont, room or player that it is heard by; "": unknown

    @classmethod
    def of_audio(cls, id: str, notes: list[Note], audio: np.ndarray) -> Piece:
        """Makes a piece of audio [S], as data sets store it: in 16 bits."""
        audio = audio_from_int16(audio_to_int16(audio))
        return cls(id, notes, log_mel(audio, np), audio)


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
    timbre: str = "",
) -> Window:
    """The window that begins at frame `start` of `mel`, and at most `context_frames` frames before it.

    Args:
      mel: log-mel [T, M] of a piece, or of a stretch of it that reaches a context before and a segment after.
      events: of the whole piece.
      start: in frames of `mel`, 0 <= start < T. It is the first frame of the target and never in the context.
      first_frame: frame of the piece at which `mel` begins.
      on_overflow: what to do with more than max_tokens tokens, see `Tokenizer.encode_window`.
      timbre: of the piece; "" for unknown.

    Raises:
      SegmentTooLong: too many tokens, and on_overflow is "error".
    """
    num_frames = tokenizer.segment_frames
    return Window(
        tokenizer.encode_window(events, first_frame + start, num_frames, on_overflow, timbre),
        mel[start : start + num_frames],
        mel[max(0, start - context_frames) : start],
    )


def pad_window(window: Window, tokenizer: Tokenizer, context_frames: int, *, training: bool) -> Row:
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


def blank_example(tokenizer: Tokenizer, context_frames: int) -> Row:
    """A row that counts for nothing (all masks False), to fill up the last batch of an evaluation."""
    nothing = np.zeros((0, NUM_MELS), np.float32)
    window = Window(np.zeros(0, np.int32), nothing, nothing)
    return pad_window(window, tokenizer, context_frames, training=False)


def stack(examples: list[Row]) -> Batch:
    """Rows to a batch [B, ...]."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def quieter(batch: Batch, decibels: np.ndarray, vocabulary: Vocabulary) -> Batch:
    """Makes each row of a batch quieter by decibels [B], in mel, context and the velocities of its notes.

    A velocity v sounds 40 log10(v / 127) dB below full scale (SoundFont 2.04, default modulator; docs/midi.md).
    """
    tokens, first, bins = batch["note_tokens"], vocabulary.velocity_id, vocabulary.velocity_bins
    loudness = 10.0 ** (-decibels[:, None] / 40.0)
    lower = first + np.ceil((tokens - first - 0.5) * loudness).astype(tokens.dtype)  # of the middle of a bin
    changed = {"note_tokens": np.where((tokens > first) & (tokens <= first + bins), lower, tokens)}
    for name in {"mel", "context_mel"} & batch.keys():
        changed[name] = np.maximum(batch[name] - decibels[:, None, None] / DB_PER_NEPER, MIN_LOG_MEL)
        changed[name] = changed[name].astype(np.float32)
    return batch | changed


def evaluation_batches(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, context_frames: int, batch_size: int
) -> Iterator[Batch]:
    """Cuts pieces into consecutive segments with their true context (the first of a piece: none) and their timbre.

    The last batch is filled up with blank rows.
    """

    def rows_of(piece: Piece) -> Iterator[Row]:
        events = Events.from_notes(piece.notes)
        for start in range(0, len(piece.mel), tokenizer.segment_frames):
            window = cut_window(piece.mel, events, tokenizer, start, context_frames, timbre=piece.timbre)
            yield pad_window(window, tokenizer, context_frames, training=False)

    rows = itertools.chain.from_iterable(map(rows_of, pieces))
    blank = blank_example(tokenizer, context_frames)
    while batch := list(itertools.islice(rows, batch_size)):
        yield stack(batch + [blank] * (batch_size - len(batch)))
