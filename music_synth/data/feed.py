"""Where batches come from: the one interface that training and evaluation see, and how a feed is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from music_synth.data.examples import Batch, Piece
from music_synth.data.prepared import MANIFEST, PreparedFeed
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer

__all__ = ["Batch", "Feed", "Piece", "PreparedFeed", "open_feed"]


class Feed(Protocol):
    """NumPy batches and whole pieces.

    A batch is a dictionary; B rows are this process's share of `batch_size`, T = segment_frames, C = T:

        note_tokens [B, max_tokens] int32   0 = padding, 1 = end
        mel [B, T, 128] float32             natural-log mel
        mel_mask [B, T] bool                training: all True, the silence after a piece is learned;
                                            evaluation: False there, and in rows that fill up the last batch
        context_mel [B, C, 128] float32     the frames just before, at the front (only with context)
        context_mask [B, C] bool            a prefix; all False where nothing came before (only with context)
    """

    num_skipped: int  # training windows passed over so far, for having more than max_tokens tokens

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless; batch k depends on the seed and k alone, so a run resumes exactly at start_step."""
        ...

    def eval_batches(self, split: str = "validation") -> Iterator[Batch]:
        """All consecutive segments of a split with their true context, in fixed order."""
        ...

    def pieces(self, split: str) -> Iterator[Piece]:
        """The whole pieces of a split, in fixed order."""
        ...


def open_feed(
    task: str,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int = 0,
    context: bool = True,
    empty_context: float = 0.1,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> Feed:
    """Opens the feed of a prepared folder, or of a seqio task or mixture.

    Args:
      task: path of a folder written by prepare_data, or the name of a task or mixture ("synthetic").
      batch_size: rows of the global batch, over all processes.
      seed: of windows and order.
      context: whether batches have context_mel and context_mask.
      empty_context: share of training examples whose context is masked, to practice beginnings. Every piece
        that is played begins without context; among windows drawn evenly from pieces of 2,000 frames one in
        2,000 does, too few to learn from. The published setting is 0.
      data_dir: where tfds keeps its data sets (default: its own, ~/tensorflow_datasets). Tasks only.
      cache_dir: folder of seqio's offline cache; used where it holds the task. Tasks only.
      shard_index, num_shards: which of how many processes this is; each gets its rows of every global batch.

    Raises:
      UserError: no such folder or task, a damaged folder, or a task where TensorFlow is not installed.
    """
    if not 0 <= empty_context <= 1:
        raise UserError(f"Feed.empty_context = {empty_context}: must be in [0, 1]")
    if batch_size < 1 or batch_size % num_shards:
        raise UserError(f"batch_size = {batch_size}: must be a positive multiple of {num_shards} processes")
    shared = {
        "seed": seed,
        "context": context,
        "empty_context": empty_context,
        "shard_index": shard_index,
        "num_shards": num_shards,
    }
    if is_folder(task):
        return PreparedFeed(Path(task).expanduser(), tokenizer, batch_size, **shared)
    try:
        from music_synth.data.pipeline import SeqioFeed
    except ImportError as error:
        raise UserError(
            f"task {task!r} needs TensorFlow and seqio ({error}): pip install 'music_synth[data]', or train "
            "on a folder made by python -m music_synth.prepare_data"
        ) from error
    return SeqioFeed(task, tokenizer, batch_size, data_dir=data_dir, cache_dir=cache_dir, **shared)


def is_folder(task: str) -> bool:
    """Whether `task` means a path: it looks like one, or is a prepared folder. UserError if there is none."""
    path = Path(task).expanduser()
    if (path / MANIFEST).exists():
        return True
    if os.sep not in task and not task.startswith(("~", ".")):
        return False
    if not path.is_dir():
        raise UserError(f"no folder {task}: python -m music_synth.prepare_data synthetic --out {task} makes it")
    return True
