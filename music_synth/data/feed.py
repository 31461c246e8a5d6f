"""Where batches come from: the one class that training and evaluation see, wherever the data of its task are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from music_synth.data import synthetic
from music_synth.data.data_dir import default_data_dir
from music_synth.data.examples import (
    NO_CONTEXT,
    Batch,
    Piece,
    SegmentSettings,
    data_set_of,
    evaluation_batches,
    quieter,
)
from music_synth.data.mixture import Mixture, members_of
from music_synth.data.prepared import MANIFEST, PreparedWindows
from music_synth.errors import UserError, needing
from music_synth.midi.tokenizer import Tokenizer

__all__ = ["Batch", "Feed", "Piece", "open_feed"]

log = logging.getLogger(__name__)
QUIETER_STREAM = 3  # random stream of a seed, besides those of `prepared` and `mixture`


class Windows(Protocol):
    """What a feed draws from: the windows of prepared folders, or of a seqio task or mixture."""

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]: ...

    def pieces(self, split: str, audio: bool = True) -> Iterator[Piece]: ...


class Feed(SegmentSettings):
    """Makes NumPy batches of a task, and whole pieces. Its fields are its settings, see `SegmentSettings`.

    A batch is a dictionary; B = batch_size, T = segment_frames, C = T:

        note_tokens [B, max_tokens] int32   0 = padding, 1 = end
        mel [B, T, 128] float32             natural-log mel
        mel_mask [B, T] bool                training: all True, the silence after a piece is learned;
                                            evaluation: False there, and in rows that fill up the last batch
        context_mel [B, C, 128] float32     the frames just before, at the front (only with context)
        context_mask [B, C] bool            a prefix; all False where nothing came before (only with context)

    Folders of prepared arrays and the embedded data set are read without TensorFlow; all else is seqio's. A task
    "FOLDER=3,FOLDER=1" is a mixture, see `mixture`.

    Raises:
      UserError: no such folder or task, a damaged folder, or a task where TensorFlow is not installed.
    """

    num_skipped = 0  # training windows passed over so far, for having more than max_tokens tokens

    def __post_init__(self):
        super().__post_init__()
        windows = self._open(self.task)
        self._windows: Windows = self._open_seqio() if windows is None else windows
        self._trained = self._windows
        if self.rehearsal is not None:
            other = self._open(self.rehearsal)
            if windows is None or other is None:
                name = self.task if windows is None else self.rehearsal
                raise UserError(f"Feed.rehearsal mixes prepared folders, and {name!r} is none: prepare_data makes one")
            self._trained = Mixture([windows, other], [1 - self.rehearsal_share, self.rehearsal_share], self)

    def _open(self, task: str) -> Mixture | None:
        """Opens the prepared folders of a task; None: it is one of seqio's."""
        members = {} if self.cache_dir else members_of(task)
        folders = {name: folder_of(name, self.data_dir) for name in members}
        if not members or list(folders.values()) == [None]:
            return None
        windows = []
        for name, folder in folders.items():
            if folder is None:
                raise UserError(f"{name} in {task!r}: a mixture is of prepared folders (or of seqio's making)")
            if self.context and name.endswith(NO_CONTEXT):
                raise UserError(f"task {name!r} has no context: set Feed.context = False, or choose another task")
            windows.append(PreparedWindows(folder, self, self._skip))
        return Mixture(windows, list(members.values()), self)

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Makes batches without end; batch k depends on the seed and k alone, so a run resumes exactly."""
        for step, batch in enumerate(self._trained.train_batches(start_step), start_step):
            if self.quieter_db:
                rng = np.random.default_rng([self.seed, QUIETER_STREAM, step])
                decibels = rng.uniform(0.0, self.quieter_db, len(batch["note_tokens"]))
                batch = quieter(batch, decibels, self.tokenizer.vocabulary)
            yield batch

    def eval_batches(self, split: str = "validation") -> Iterator[Batch]:
        """Makes all consecutive segments of a split with their true context, in fixed order."""
        pieces = self._windows.pieces(split, audio=False)
        return evaluation_batches(
            pieces, self.tokenizer, context_frames=self.context_frames, batch_size=self.batch_size
        )

    def pieces(self, split: str) -> Iterator[Piece]:
        """Reads the whole pieces of a split, in fixed order; with audio, but for folders that hold none."""
        return self._windows.pieces(split)

    def _open_seqio(self) -> Windows:
        otherwise = ", or train on a folder made by python -m music_synth.prepare_data"
        with needing(f"task {self.task!r} needs TensorFlow and seqio", "data", otherwise):
            from music_synth.data.seqio_windows import SeqioWindows
        return SeqioWindows(self, self._skip)

    def _skip(self, piece: str, seconds: float) -> None:
        """Counts a window, and logs the first one, the second, the fourth, the eighth and so on."""
        self.num_skipped += 1
        if self.num_skipped & (self.num_skipped - 1) == 0:
            told = f"more than {self.tokenizer.max_tokens} tokens ({self.num_skipped} skipped so far)"
            log.warning("skipped a window of %s at %.2f s: %s", piece, seconds, told)


def open_feed(task: str, tokenizer: Tokenizer, batch_size: int, **settings: Any) -> Feed:
    """Opens a `Feed`, whose other settings are named."""
    return Feed(task=task, tokenizer=tokenizer, batch_size=batch_size, **settings)


def folder_of(task: str, data_dir: str | Path | None = None) -> Path | None:
    """Gives the prepared folder that a task is read from, of the embedded data set made now if it must be.

    None: the task is one of seqio's. UserError: see `path_of`, `synthetic.prepare_arrays`.
    """
    if (path := path_of(task)) is not None:
        return path
    if not is_embedded(task):
        return None
    edition = synthetic.Edition.named(data_set_of(task).partition(":")[2])
    return synthetic.prepare_arrays(edition, Path(data_dir or default_data_dir()))


def path_of(task: str) -> Path | None:
    """Gives the folder that a task is; None: it is a name. UserError: it looks like a path, and there is no folder."""
    path = Path(task).expanduser()
    if (path / MANIFEST).exists():
        return path
    if os.sep not in task and not task.startswith(("~", ".")):
        return None
    if not path.is_dir():
        raise UserError(f"no folder {task}: python -m music_synth.prepare_data synthetic --out {task} makes it")
    return path


def is_embedded(task: str) -> bool:
    """Says whether a task is about the embedded data set, of whatever size."""
    return data_set_of(task).partition(":")[0] == synthetic.NAME
