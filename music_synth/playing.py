"""Plays notes through a trained decoder: whole pieces, or single segments (docs/spec.md 3.17).

Segments of a whole piece have the one before, as sampled, for a context; single segments their true context.

What synthesis plays, evaluation scores and inverters are fine-tuned on comes from here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL, NUM_MELS
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import frames_of, pad_tokens, token_bucket
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Batch, Params, SpectrogramModel
from music_synth.vocoder.inverter import Inverter, stream_audio
from music_synth.vocoder.neural import NeuralInverter

_compiled: set[Any] = set()  # generators
Tokens = Sequence[np.ndarray]  # of a piece: int32 [n] a segment, unpadded, as `Tokenizer.encode` gives them


class Segment(NamedTuple):
    """A segment as it was sampled."""

    piece: int
    number: int  # in the piece, from 0
    mel: np.ndarray  # log-mel float32 [T, M]


class Part(NamedTuple):
    """Some audio of a piece."""

    piece: int
    audio: np.ndarray  # float32 [S] at 16 kHz
    ended: bool  # whether it is the piece's last


@functools.partial(jax.jit, static_argnames="model")
def sample_batch(
    model: SpectrogramModel, params: Params, batch: Batch, seeds: jax.Array, index: jax.Array
) -> jax.Array:
    """Samples one segment of several pieces: log-mel [B, T, M].

    Every row has random numbers of its own, from its seed [B] and the segment's index [B], so that how a
    piece sounds depends neither on the others in the batch nor on their number.
    """
    keys = jax.vmap(lambda seed, segment: jax.random.fold_in(jax.random.key(seed), segment))(seeds, index)
    return model.sample(params, batch, keys)


@dataclass
class Row:
    """A segment to be sampled, and what it starts from."""

    piece: int
    context: np.ndarray | None = None  # log-mel [C, M]; None: nothing came before
    index: int = 0


@dataclass(frozen=True)
class Decoder:
    """A trained decoder with all it takes to play it."""

    model: SpectrogramModel
    params: Params
    tokenizer: Tokenizer
    timbre: str = ""  # that `stream` and `play` play with; "": unknown

    def __post_init__(self):
        self.tokenizer.check_timbre(self.timbre)
        object.__setattr__(self, "params", jax.device_put(self.params))  # once, not in every call

    # --- sampling ------------------------------------------------------------------------------------------------

    def sample_pieces(
        self, pieces: Sequence[Tokens], seeds: Sequence[int], batch_size: int = 1
    ) -> Iterator[list[Segment]]:
        """Samples whole pieces, up to `batch_size` side by side; when one ends, another takes its row.

        Long pieces begin first, so that few are left alone at the end. What is compiled stays little: rows are sampled
        in batches of powers of two, without an idle one, and all segments of a piece are padded to one bucket, so that
        a piece alone compiles nothing after its first segment.

        Yields:
          What one call of the model gave: the next segment of each of some pieces.

        Raises:
          UserError: the model's output is not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        network = self.model.network
        buckets = [token_bucket(max(map(len, tokens)), network.max_tokens) for tokens in pieces]
        waiting = deque(sorted(range(len(pieces)), key=lambda piece: -len(pieces[piece])))
        rows: list[Row] = []
        while waiting or rows:
            while waiting and len(rows) < batch_size:
                rows.append(Row(waiting.popleft()))
            for batch in powers_of_two(rows):
                segments = self._sample(pieces, seeds, batch, max(buckets[row.piece] for row in batch))
                yield segments
                for row, segment in zip(batch, segments, strict=True):
                    row.context = segment.mel[network.target_frames - network.context_frames :]
                    row.index += 1
            rows = [row for row in rows if row.index < len(pieces[row.piece])]

    def sample_segments(
        self, pieces: Sequence[Tokens], mels: Sequence[np.ndarray], seeds: Sequence[int], batch_size: int = 1
    ) -> Iterator[list[Segment]]:
        """Samples every segment of some pieces by itself, its context the end of the true segment before it.

        Args:
          mels: log-mel [T, M] of each piece.

        Yields:
          What one call of the model gave, at most `batch_size` segments; their order is by number of tokens.

        Raises:
          UserError: the model's output is not finite.
        """
        network = self.model.network
        rows = []
        for piece, tokens in enumerate(pieces):
            for index in range(len(tokens)):
                start = index * network.target_frames
                context = mels[piece][start - network.context_frames : start] if index else None
                rows.append(Row(piece, context, index))
        rows.sort(key=lambda row: len(pieces[row.piece][row.index]))  # one bucket of tokens side by side
        batch_size = min(batch_size, len(rows))
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            filled = chosen + chosen[:1] * (batch_size - len(chosen))  # one shape for all batches
            longest = max(len(pieces[row.piece][row.index]) for row in chosen)
            bucket = token_bucket(longest, network.max_tokens)
            yield self._sample(pieces, seeds, filled, bucket)[: len(chosen)]

    def sample_one(self, tokens: Tokens, seed: int, number: int, before: np.ndarray | None = None) -> np.ndarray:
        """Samples one segment of a piece as `sample_pieces` would, after the mel `before` [t, M]: log-mel [T, M].

        Raises:
          UserError: the model's output is not finite.
        """
        network = self.model.network
        context = None if before is None else before[len(before) - network.context_frames :]
        bucket = token_bucket(max(map(len, tokens)), network.max_tokens)
        return self._sample([tokens], [seed], [Row(0, context, number)], bucket)[0].mel

    def _sample(
        self, pieces: Sequence[Tokens], seeds: Sequence[int], rows: Sequence[Row], bucket: int
    ) -> list[Segment]:
        """Calls the model once, the tokens of all rows padded to `bucket`."""
        network = self.model.network
        nothing = np.zeros((network.context_frames, network.num_mels), np.float32)
        batch = {
            "note_tokens": np.stack([pad_tokens(pieces[row.piece][row.index], bucket) for row in rows]),
            "context_mel": np.stack([nothing if row.context is None else row.context for row in rows]),
            "context_mask": np.stack([np.full(network.context_frames, row.context is not None) for row in rows]),
        }
        row_seeds = np.array([seeds[row.piece] for row in rows], np.uint32)
        indices = np.array([row.index for row in rows], np.uint32)
        mels = np.asarray(sample_batch(self.model, self.params, batch, row_seeds, indices))
        return [
            Segment(row.piece, row.index, check_finite(mel, f"segment {row.index}"))
            for row, mel in zip(rows, mels, strict=True)
        ]

    # --- playing -------------------------------------------------------------------------------------------------

    def tokenize(self, notes: Sequence[Note]) -> tuple[list[np.ndarray], int]:
        """Makes the note tokens of a piece's segments, and counts its frames; UserError if there are no notes."""
        num_frames = frames_of(notes)
        return self.tokenizer.encode(notes, num_frames, timbre=self.timbre), num_frames

    def stream(self, notes: Sequence[Note], seed: int = 0) -> Iterator[np.ndarray]:
        """Samples a piece: its log-mel float32 [t, M], a segment at a time; errors as of `sample_pieces`."""
        tokens, num_frames = self.tokenize(notes)
        for ((_, _, mel),) in self.sample_pieces([tokens], [seed]):
            yield mel[:num_frames]
            num_frames -= len(mel)

    def play(
        self,
        pieces: Sequence[Sequence[Note]],
        inverter: Inverter,
        seed: int = 0,
        batch_size: int = 1,
        on_segment: Callable[[Segment], object] = lambda segment: None,
    ) -> Iterator[Part]:
        """Plays pieces, `batch_size` sampled side by side, each as it would sound alone, up to rounding.

        Audio comes as soon as the inverter can make it, and memory does not grow with its length: only an inverter that
        cannot stream sees the whole mel of a piece first, and gives its audio at once.

        Args:
          on_segment: is told of every segment when it has been sampled, the last of a piece uncut.

        Raises:
          UserError: a piece without notes, or the model's output is not finite.
        """
        tokens, lengths = zip(*map(self.tokenize, pieces), strict=True)
        batches = self.sample_pieces(tokens, [seed] * len(pieces), batch_size)
        sampled: list[deque[np.ndarray]] = [deque() for _ in pieces]
        left = list(lengths)  # frames that the inverter has not seen
        compiling = threading.Thread(target=compile_inverter, args=(inverter, pieces[0]))
        compiling.start()  # beside the decoder: two cores do both in less time

        def advance() -> None:
            segments = next(batches)
            compiling.join()
            for segment in segments:
                on_segment(segment)
                sampled[segment.piece].append(segment.mel)

        def mels(piece: int) -> Iterator[np.ndarray]:
            while left[piece]:
                while not sampled[piece]:  # the inverter wants more than there is
                    advance()
                mel = sampled[piece].popleft()[: left[piece]]
                left[piece] -= len(mel)
                yield mel

        streams = {piece: stream_audio(inverter, mels(piece), notes) for piece, notes in enumerate(pieces)}
        while streams:
            ready = [piece for piece in streams if sampled[piece]]
            if not ready:
                advance()
            for piece in ready:
                audio = next(streams[piece], np.zeros(0, np.float32))
                ended = not left[piece]
                if ended:
                    audio = np.concatenate([audio, *streams.pop(piece)])
                yield Part(piece, audio, ended)


def compile_inverter(inverter: Inverter, notes: Sequence[Note]) -> None:
    """Plays a frame of silence to an inverter of ours, once, which compiles what it needs for a stream with notes."""
    if isinstance(inverter, NeuralInverter) and inverter.generator not in _compiled:
        _compiled.add(inverter.generator)
        with contextlib.suppress(Exception):  # it comes again where the inverter is needed
            list(inverter.stream([np.full((1, NUM_MELS), MIN_LOG_MEL, np.float32)], notes))


def whole_mels(batches: Iterable[list[Segment]], lengths: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Puts segments together, in whatever order they come: yields (piece, log-mel [T, M]) when it is whole.

    Args:
      lengths: frames of each piece, at which its last segment is cut.
    """
    mels: dict[int, np.ndarray] = {}
    missing = list(lengths)
    for piece, number, mel in itertools.chain.from_iterable(batches):
        whole = mels.setdefault(piece, np.empty((lengths[piece], mel.shape[1]), np.float32))
        place = whole[number * len(mel) :][: len(mel)]
        place[:] = mel[: len(place)]
        missing[piece] -= len(place)
        if not missing[piece]:
            yield piece, mels.pop(piece)


def piece_seed(piece_id: str, seed: int = 0) -> int:
    """Makes the seed of a piece from its id, so that order and batching of the pieces change nothing."""
    return zlib.crc32(f"{seed} {piece_id}".encode())


def powers_of_two(rows: Sequence) -> Iterator[Sequence]:
    """Cuts rows into batches whose sizes are powers of two, the largest first."""
    while rows:
        size = 1 << (len(rows).bit_length() - 1)
        yield rows[:size]
        rows = rows[size:]


def check_finite(mel: np.ndarray, where: str) -> np.ndarray:
    """Returns `mel`, or raises a UserError where it has values that are not numbers."""
    if not np.isfinite(mel).all():
        raise UserError(
            f"{where}: the model's output is not finite; the checkpoint is damaged or its training diverged "
            "(--step picks an earlier one)"
        )
    return mel
