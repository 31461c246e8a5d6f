"""The feed that an inverter trains on: excerpts of the audio of any task, and their log-mel.

No TensorFlow for a prepared folder that holds audio (prepare_data --audio).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from music_synth.audio.io import audio_from_int16, audio_to_int16
from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL, NUM_MELS, SAMPLE_RATE, log_mel, num_mel_frames
from music_synth.data.examples import Batch, FeedSettings, stack
from music_synth.data.feed import folder_of, path_of
from music_synth.data.prepared import read_manifest, split_of
from music_synth.errors import UserError, needing
from music_synth.midi.notes import Note
from music_synth.vocoder.istft import SOURCE_HOPS
from music_synth.vocoder.source import RELEASE_SECONDS, source_of_frames


@dataclass(kw_only=True)
class AudioFeed(FeedSettings):
    """NumPy batches of excerpts of a prepared folder with audio, or of a data set:

    audio [B, 320 T] float32        16 kHz
    mel [B, T, 128] float32         natural-log mel of them; the last frame sees the hop after the excerpt too.
                                    With stored_mel: what the folder holds in its place, at the excerpt's gain
    mel_mask [B, T] bool            training: all True; evaluation: False after the end of a piece
    source [B, 320 (T + 3)] float32 with notes: the signal made of them (`vocoder.source`). In training of some
                                    excerpts it is that of no notes or of wrong ones: an inverter has to take both

    stored_mel is to train on what a decoder makes of the same notes, from prepare_data --audio --sampled_by. Two such
    mels cannot be laid on each other: mix must be 0.

    Raises:
      UserError: no such folder or data set, a folder without audio, a setting out of range.
    """

    num_frames: int = 64  # of an excerpt in training, 20 ms each
    eval_frames: int = 256  # and in evaluation
    gain_db: tuple[float, float] = (-18.0, 3.0)  # an excerpt's gain is drawn from, so that quiet and loud train alike
    mix: float = 0.2  # share of training excerpts on which a second one is laid
    stored_mel: bool = False  # take the folder's mel, not the audio's
    notes: bool = False  # bring the source of the notes, for generators that take one
    empty_notes: float = 0.25  # share of training excerpts that get no notes,
    wrong_notes: float = 0.25  # or wrong ones (`spoiled`)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mix <= 1:
            raise UserError(f"AudioFeed.mix = {self.mix}: must be in [0, 1]")
        if min(self.empty_notes, self.wrong_notes) < 0 or self.empty_notes + self.wrong_notes > 1:
            given = f"AudioFeed.empty_notes = {self.empty_notes}, wrong_notes = {self.wrong_notes}"
            raise UserError(f"{given}: must be shares of one")
        if self.stored_mel and path_of(self.task) is None:
            raise UserError(f"AudioFeed.stored_mel: {self.task!r} is no folder; write one by prepare_data --sampled_by")
        if self.stored_mel and self.mix:
            raise UserError(f"AudioFeed.stored_mel: stored mels cannot be mixed; set AudioFeed.mix = 0, not {self.mix}")
        if len(self.gain_db) != 2 or self.gain_db[0] > self.gain_db[1]:
            raise UserError(f"AudioFeed.gain_db = {self.gain_db}: must be (lowest, highest)")
        if min(self.num_frames, self.eval_frames) < 1:
            given = f"AudioFeed.num_frames = {self.num_frames}, eval_frames = {self.eval_frames}"
            raise UserError(f"{given}: must be at least 1")
        self._pieces = functools.cache(self._load)

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... without end; each is a function of (seed, number)."""
        pieces = [piece for piece in self._pieces("train") if len(piece.audio) >= HOP_LENGTH]
        if not pieces:
            raise UserError(f"{self.task!r} has no training audio: prepare a data set that has some")
        ends = np.cumsum([len(piece.audio) for piece in pieces])
        share = ends / ends[-1]
        for step in itertools.count(start_step):
            numbers = [step * self.batch_size + row for row in range(self.batch_size)]
            yield stack([self._train_example(pieces, share, number) for number in numbers])

    def eval_batches(self, split: str = "validation") -> Iterator[Batch]:
        """Consecutive excerpts of `eval_frames` of the pieces of `split`; the last batch is filled up with silence."""
        starts = (
            (piece, start)
            for piece in self._pieces(split)
            for start in range(0, len(piece.audio), self.eval_frames * HOP_LENGTH)
        )
        no_mel = np.zeros((0, NUM_MELS), np.float32) if self.stored_mel else None
        blank = (Recording(np.zeros(0, np.int16), no_mel, []), 0)
        while chunk := list(itertools.islice(starts, self.batch_size)):
            chunk += [blank] * (self.batch_size - len(chunk))
            yield stack([self._eval_example(*one) for one in chunk])

    def _train_example(self, pieces: Sequence[Recording], share: np.ndarray, number: int) -> Batch:
        """An excerpt from anywhere, at a random gain; `mix` of them with a second one on top."""
        rng = np.random.default_rng([self.seed, number])
        audio, mel = np.zeros((self.num_frames + 1) * HOP_LENGTH, np.float32), None
        played: list[Note] = []
        for _ in range(1 + (rng.random() < self.mix)):
            piece = pieces[int(np.searchsorted(share, rng.random(), side="right"))]
            start = int(rng.integers(0, max(1, len(piece.audio) - self.num_frames * HOP_LENGTH)))
            if piece.mel is not None:
                start -= start % HOP_LENGTH  # a frame begins there
            excerpt = piece.audio[start : start + len(audio)]
            gain = np.float32(10 ** (rng.uniform(*self.gain_db) / 20))
            audio[: len(excerpt)] += audio_from_int16(excerpt) * gain
            if piece.mel is not None:
                mel = piece.frames(start, self.num_frames) + np.log(gain)
            played += piece.notes_from(start, self.num_frames) if self.notes else []
        row = example(audio, self.num_frames, self.num_frames, mel)
        return row | (self._source(self._given(played, rng), self.num_frames) if self.notes else {})

    def _given(self, notes: list[Note], rng: np.random.Generator) -> list[Note]:
        """The notes that go with a training excerpt: these, or none, or wrong ones."""
        kind = rng.random()
        if kind < self.empty_notes:
            return []
        return spoiled(notes, rng) if kind < self.empty_notes + self.wrong_notes else notes

    def _source(self, notes: list[Note], num_frames: int) -> Batch:
        return {"source": source_of_frames(notes, 0, num_frames)}

    def _eval_example(self, piece: Recording, start: int) -> Batch:
        frames = self.eval_frames
        audio = np.zeros((frames + 1) * HOP_LENGTH, np.float32)
        excerpt = piece.audio[start : start + len(audio)]
        audio[: len(excerpt)] = audio_from_int16(excerpt)
        mel = None if piece.mel is None else piece.frames(start, frames)
        row = example(audio, frames, min(frames, num_mel_frames(max(0, len(piece.audio) - start))), mel)
        return row | (self._source(piece.notes_from(start, frames), frames) if self.notes else {})

    def _load(self, split: str) -> list[Recording]:
        """Reads the pieces of a split: a folder's arrays stay on disk, a data set that was built is held in memory."""
        folder = folder_of(self.task, self.data_dir)
        if folder is not None:
            return [
                Recording(
                    piece.open_audio(),
                    piece.open_mel() if self.stored_mel else None,
                    piece.read_notes() if self.notes else [],
                )
                for piece in split_of(read_manifest(folder), split, folder)
            ]
        otherwise = ", or train on a folder made by python -m music_synth.prepare_data --audio"
        with needing(f"task {self.task!r} needs TensorFlow and seqio", "data", otherwise):
            from music_synth.data import tasks
        pieces = tasks.pieces_in_memory(self.task, split, self.data_dir)
        return [Recording(audio_to_int16(np.asarray(piece.audio)), None, piece.notes) for piece in pieces]


def example(audio: np.ndarray, num_frames: int, present: int, mel: np.ndarray | None = None) -> Batch:
    """A row of a batch from audio [320 (T + 1)]; only the first `present` frames count. mel [T, 128]: not audio's."""
    mel = log_mel(audio, np)[:num_frames] if mel is None else np.maximum(mel, np.float32(MIN_LOG_MEL))
    mask = np.arange(num_frames) < present
    mel[~mask] = MIN_LOG_MEL
    return {"audio": audio[: num_frames * HOP_LENGTH], "mel": mel.reshape(-1, NUM_MELS), "mel_mask": mask}


def spoiled(notes: list[Note], rng: np.random.Generator) -> list[Note]:
    """Notes that are wrong in one way: some missing, some added, all early or late by up to a second, all elsewhere."""
    kind = rng.integers(4)
    if kind == 0:
        return [note for note in notes if rng.random() < 0.5]
    if kind == 1:
        return notes + [note._replace(pitch=int(rng.integers(24, 97))) for note in notes if rng.random() < 0.5]
    if kind == 2:
        shift = rng.uniform(-1.0, 1.0)
        return [note._replace(onset=note.onset + shift, offset=note.offset + shift) for note in notes]
    interval = int(rng.integers(1, 12)) * (1 if rng.random() < 0.5 else -1)
    return [note._replace(pitch=min(max(note.pitch + interval, 0), 127)) for note in notes]


class Recording(NamedTuple):
    """A piece: what was recorded, int16 [S], log-mel [T, 128] that is to stand for it (None: its own), its notes."""

    audio: np.ndarray
    mel: np.ndarray | None = None
    notes: Sequence[Note] = ()

    def notes_from(self, start: int, num_frames: int) -> list[Note]:
        """The notes of the frames from sample `start` on, with those that still ring there; seconds from there."""
        first, end = start / SAMPLE_RATE, (start + (num_frames + SOURCE_HOPS) * HOP_LENGTH) / SAMPLE_RATE
        return [note.since(first) for note in self.notes if note.onset < end and note.offset > first - RELEASE_SECONDS]

    def frames(self, start: int, count: int) -> np.ndarray:
        """float32 [count, 128], the stored mel from sample `start` on; after its end silence."""
        assert self.mel is not None  # asked only of recordings with a stored mel
        part = self.mel[start // HOP_LENGTH :][:count].astype(np.float32)
        return np.pad(part, ((0, count - len(part)), (0, 0)), constant_values=MIN_LOG_MEL)
