"""Whole pieces from a decoder of one segment: each segment's context is the segment before it, as sampled.

What synthesis plays and evaluation scores comes from here (golden/README.md 3.17).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.errors import UserError
from music_synth.midi.segments import pad_tokens
from music_synth.models.seam import Batch, Seam

# Note tokens of a segment are padded to the next of these, so that a model compiles a few times at most.
TOKEN_BUCKETS = (128, 256, 512, 1024, 2048)


def token_bucket(num_tokens: int, max_tokens: int) -> int:
    """The shortest bucket that holds `num_tokens`; the last one is `max_tokens`, the network's limit."""
    if num_tokens > max_tokens:
        raise ValueError(f"{num_tokens} tokens in a segment, and the network takes at most {max_tokens}")
    return next((size for size in TOKEN_BUCKETS if num_tokens <= size < max_tokens), max_tokens)


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

    def sample_row(row: Batch, seed: jax.Array, segment: jax.Array) -> jax.Array:
        rng = jax.random.fold_in(jax.random.key(seed), segment)
        return model.sample(params, {name: array[None] for name, array in row.items()}, rng)[0]

    return jax.vmap(sample_row)(batch, seeds, index)


def sample_chain(
    model: Seam, params, pieces: Sequence[Sequence[np.ndarray]], seeds: Sequence[int]
) -> Iterator[np.ndarray]:
    """Samples several pieces side by side, segment after segment.

    Args:
      model: `Diffusion` or `Autoregressive`.
      pieces: for each piece the note tokens of its segments, unpadded, as `Tokenizer.encode` gives them. A
        piece that ends before the others is sampled on without notes; the caller drops that.
      seeds: one a piece.

    Yields:
      log-mel float32 [B, T, M]: segment 0 of all pieces, segment 1, ...

    Raises:
      UserError: the model's output is not finite.
    """
    network = model.network
    num_rows, no_notes = len(pieces), np.ones(1, np.int32)  # EOS alone
    context = jnp.zeros((num_rows, network.context_frames, network.num_mels))
    has_context = np.zeros((num_rows, network.context_frames), bool)  # the first segment: none
    seeds = jnp.asarray(np.asarray(seeds, np.uint32))
    for index in range(max(len(segments) for segments in pieces)):
        rows = [segments[index] if index < len(segments) else no_notes for segments in pieces]
        batch = {
            "note_tokens": pad_to_bucket(rows, network.max_tokens),
            "context_mel": context,
            "context_mask": has_context,
        }
        mel = sample_segment(model, params, batch, seeds, jnp.full(num_rows, index, jnp.uint32))
        context = mel[:, network.target_frames - network.context_frames :]
        has_context = np.ones_like(has_context)
        yield check_finite(np.asarray(mel), f"segment {index}")


def check_finite(mel: np.ndarray, where: str) -> np.ndarray:
    """`mel`, or a UserError where it has values that are not numbers."""
    if not np.isfinite(mel).all():
        raise UserError(
            f"{where}: the model's output is not finite; the checkpoint is damaged or its training diverged "
            "(--step picks an earlier one)"
        )
    return mel
