"""Where the clips of an evaluation come from: recordings, inverters, decoders, and floors made of noise."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, MIN_LOG_MEL, log_mel
from music_synth.evaluation import measures
from music_synth.evaluation.clips import Folder, Sound, Target
from music_synth.evaluation.measures import BETWEEN, COST, Tools
from music_synth.evaluation.statistics import Gaussian
from music_synth.playing import Decoder, Segment, piece_seed, whole_mels

WHOLE, SINGLE = "whole pieces", "single segments with true context"

Scores = dict[str, Any]  # of a clip, known when it is made: what it cost, ...


class Checkpoint(NamedTuple):
    """A trained decoder and its name in the table."""

    name: str
    decoder: Decoder


class Source(Protocol):
    """Makes clips. A frozen dataclass that can be sent to another process."""

    def make(
        self, names: Sequence[str], targets: Sequence[Target], tools: Tools
    ) -> Iterator[tuple[int, Sound, Scores]]:
        """Yields (which of the targets, its clip, what is known of it) in any order. UserError if it cannot."""


@dataclass(frozen=True)
class MeanSpectrum:
    """One spectrum in all frames; never played. That of the clip itself is its level and timbre, not its notes."""

    log_mel: np.ndarray | None = None  # [M]; None: the mean of the clip itself

    def make(self, names, targets, tools):
        for index, target in enumerate(targets):
            spectrum = target.mel.mean(axis=0) if self.log_mel is None else self.log_mel
            yield index, Sound(np.broadcast_to(spectrum, target.mel.shape), None), {}


@dataclass(frozen=True)
class Recording:
    """The ground truth's audio itself; its mel is taken anew, and differs where data and mel disagree."""

    def make(self, names, targets, tools):
        for index, target in enumerate(targets):
            yield index, Sound(mel_of(target.audio, len(target.mel)), target.audio), {}


@dataclass(frozen=True)
class ThroughInverter:
    """The ground truth's mel, made audio, of which the mel is taken anew."""

    inverter: str

    def make(self, names, targets, tools):
        seconds: list[float] = []  # for a second of audio
        for index, target in enumerate(targets):
            start = time.perf_counter()
            audio = tools.inverters[self.inverter](target.mel, target.notes)
            seconds.append((time.perf_counter() - start) * FRAME_RATE / len(target.mel))
            yield index, Sound(mel_of(audio, len(target.mel)), audio), {COST.key: typical(seconds)}


@dataclass(frozen=True)
class Revoiced:
    """The mels of other clips, made audio by another inverter than the first."""

    of: Folder
    inverter: str

    def make(self, names, targets, tools):
        for index, (name, target) in enumerate(zip(names, targets, strict=True)):
            mel = self.of.read_sound(name).mel
            yield index, Sound(mel, tools.inverters[self.inverter](mel, target.notes)), {}


@dataclass(frozen=True)
class Noisy:
    """The mels of other clips plus Gaussian noise with the covariance of their error.

    Each frame's bins err together as theirs do, but heed neither notes nor the frames beside.
    """

    of: Folder
    targets: Folder
    all_names: tuple[str, ...]  # whose errors count
    inverter: str
    seed: int

    def make(self, names, targets, tools):
        root = error_root(self.of, self.targets, self.all_names)
        for index, (name, target) in enumerate(zip(names, targets, strict=True)):
            rng = np.random.default_rng(piece_seed(target.id, self.seed))
            mel = floored(self.of.read_sound(name).mel)
            mel = (mel + rng.standard_normal(mel.shape) @ root.T).astype(np.float32)
            yield index, Sound(mel, tools.inverters[self.inverter](mel, target.notes)), {}


@functools.lru_cache(maxsize=4)
def error_root(of: Folder, targets: Folder, names: Sequence[str]) -> np.ndarray:
    """Takes a root [M, M] of the covariance, over all frames, of targets minus clips: noise @ root.T has it."""
    gaussian = Gaussian()
    for name in names:
        gaussian.add(floored(targets.read_target(name).mel) - floored(of.read_sound(name).mel))
    values, vectors = np.linalg.eigh(gaussian.covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def floored(mel: np.ndarray) -> np.ndarray:
    """Lifts to the mel's floor what lies under it."""
    return np.maximum(mel, MIN_LOG_MEL)


@dataclass(frozen=True)
class Sampled:
    """What a checkpoint samples from the notes."""

    open_checkpoint: Callable[[], Checkpoint]
    mode: str  # WHOLE or SINGLE
    inverter: str
    seed: int
    batch_size: int  # segments side by side: changes the speed, not the numbers

    def make(self, names, targets, tools):
        decoder = self.open_checkpoint().decoder
        encode = decoder.tokenizer.encode  # a timbre that it does not know counts as unknown
        tokens = [encode(target.notes, len(target.mel), timbre=target.timbre) for target in targets]
        mels = [target.mel for target in targets]
        lengths = [len(mel) for mel in mels]

        def batches(seed: int) -> Iterator[list[Segment]]:
            seeds = [piece_seed(target.id, seed) for target in targets]
            if self.mode == WHOLE:
                return decoder.sample_pieces(tokens, seeds, self.batch_size)
            return decoder.sample_segments(tokens, mels, seeds, self.batch_size)

        seconds: list[float] = []  # of each call, a second of mel
        sampled = timed(batches(self.seed), seconds)
        others: dict[int, np.ndarray] = {}  # the same pieces by another seed
        if self.mode == WHOLE:
            head, again = next(sampled), batches(self.seed + 1)
            other_head = next(again)
            if any(not np.array_equal(one.mel, other.mel) for one, other in zip(head, other_head, strict=True)):
                others = dict(whole_mels(itertools.chain([other_head], again), lengths))
            sampled = itertools.chain([head], sampled)
        for index, mel in whole_mels(sampled, lengths):
            scores: Scores = {COST.key: typical(seconds)}
            if self.mode == WHOLE:
                scores[BETWEEN] = measures.log_mel_error(others.get(index, mel), mel)
            yield index, Sound(mel, tools.inverters[self.inverter](mel, targets[index].notes)), scores


def timed(batches: Iterable[list[Segment]], seconds: list[float]) -> Iterator[list[Segment]]:
    """Yields the batches; `seconds` gets how long a second of mel took in each."""
    start = time.perf_counter()
    for batch in batches:
        seconds.append((time.perf_counter() - start) / (len(batch) * len(batch[0].mel) / FRAME_RATE))
        yield batch
        start = time.perf_counter()


def typical(seconds: Sequence[float]) -> float:
    """Takes the median without the first, which compiles; as a call of other sizes may, too."""
    return float(np.median(seconds[1:] or seconds))


def mel_of(audio: np.ndarray, num_frames: int) -> np.ndarray:
    """Takes the first frames of the log-mel of audio [S], which is extended with silence if it is too short."""
    return log_mel(np.pad(audio, (0, max(0, num_frames * HOP_LENGTH - len(audio)))), np)[:num_frames]
