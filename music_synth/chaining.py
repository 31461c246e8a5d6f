"""Whole pieces from a decoder of one segment: each segment's context is the segment before it, as sampled.

What synthesis plays and evaluation scores comes from here (golden/README.md 3.17).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from music_synth.errors import UserError
from music_synth.midi.segments import pad_tokens, token_bucket
from music_synth.models.seam import Batch, Seam


def pad_to_bucket(rows: Sequence[np.ndarray], max_tokens: int) -> np.ndarray:
    """Token arrays of one segment of several pieces -> int32 [B, N], zeros after the end, N a bucket."""
    size = token_bucket(max(len(row) for row in rows), max_tokens)
    return np.stack([pad_tokens(row, size) for row in rows])


@functools.partial(jax.jit, static_argnames="model")
def sample_segment(model: Seam, params, batch: Batch, seeds: jax.Array, index: jax.Array) -> jax.Array:
    """One segment of several pieces: log-mel [B, T, M].

    Every row has random numbers of its own, from its seed [B] and the segment's index [B], so that how a
    piece sounds depends neither on the others in the batch nor on their number.
    """
    keys = jax.vmap(lambda seed, segment: jax.random.fold_in(jax.random.key(seed), segment))(seeds, index)
    return model.sample(params, batch, keys)


@dataclass
class Row:
    """A piece on its way: what its next segment starts from."""

    piece: int
    context: np.ndarray  # [C, M]
    has_context: bool = False  # not the first segment
    index: int = 0  # of the segment


def sample_pieces(
    model: Seam, params, pieces: Sequence[Sequence[np.ndarray]], seeds: Sequence[int], batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Samples any number of pieces, up to `batch_size` side by side; when one ends, another takes its row.

    Long pieces begin first, so that few are left alone at the end. What is compiled stays little: rows are sampled in
    batches of powers of two, without an idle one, and all segments of a piece are padded to one bucket, so that a
    piece alone compiles nothing after its first segment.

    Args:
      model: `Diffusion` or `Autoregressive`.
      pieces: for each piece the note tokens of its segments, unpadded, as `Tokenizer.encode` gives them.
      seeds: one a piece.

    Yields:
      (index of a piece, log-mel float32 [T, M] of its next segment).

    Raises:
      UserError: the model's output is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")
    network = model.network
    buckets = [token_bucket(max(map(len, segments)), network.max_tokens) for segments in pieces]
    waiting = sorted(range(len(pieces)), key=lambda piece: -len(pieces[piece]))
    no_context = np.zeros((network.context_frames, network.num_mels), np.float32)
    rows: list[Row] = []
    while waiting or rows:
        while waiting and len(rows) < batch_size:
            rows.append(Row(waiting.pop(0), no_context))
        for batch in powers_of_two(rows):
            bucket = max(buckets[row.piece] for row in batch)
            inputs = {
                "note_tokens": np.stack([pad_tokens(pieces[row.piece][row.index], bucket) for row in batch]),
                "context_mel": np.stack([row.context for row in batch]),
                "context_mask": np.stack([np.full(network.context_frames, row.has_context) for row in batch]),
            }
            row_seeds = np.array([seeds[row.piece] for row in batch], np.uint32)
            indices = np.array([row.index for row in batch], np.uint32)
            mels = np.asarray(sample_segment(model, params, inputs, row_seeds, indices))
            for row, mel in zip(batch, mels, strict=True):
                yield row.piece, check_finite(mel, f"segment {row.index}")
                row.context, row.has_context = mel[network.target_frames - network.context_frames :], True
                row.index += 1
        rows = [row for row in rows if row.index < len(pieces[row.piece])]


def powers_of_two(rows: Sequence) -> Iterator[Sequence]:
    """The rows in batches whose sizes are powers of two, the largest first."""
    while rows:
        size = 1 << (len(rows).bit_length() - 1)
        yield rows[:size]
        rows = rows[size:]


def sample_chain(
    model: Seam, params, pieces: Sequence[Sequence[np.ndarray]], seeds: Sequence[int]
) -> Iterator[np.ndarray]:
    """`sample_pieces` of all pieces side by side, as segments [B, T, M] of all; zeros where a piece has ended."""
    shape = (model.network.target_frames, model.network.num_mels)
    sampled = sample_pieces(model, params, pieces, seeds, len(pieces))
    for index in range(max(map(len, pieces))):
        mel = np.zeros((len(pieces), *shape), np.float32)
        for piece, segment in itertools.islice(sampled, sum(index < len(segments) for segments in pieces)):
            mel[piece] = segment
        yield mel


def check_finite(mel: np.ndarray, where: str) -> np.ndarray:
    """`mel`, or a UserError where it has values that are not numbers."""
    if not np.isfinite(mel).all():
        raise UserError(
            f"{where}: the model's output is not finite; the checkpoint is damaged or its training diverged "
            "(--step picks an earlier one)"
        )
    return mel
