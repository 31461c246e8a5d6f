"""Batches on their way from the feed to the devices."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

from music_synth.midi.segments import token_bucket
from music_synth.training import partitioning
from music_synth.training.step import Batch, HostBatch, Model

T = TypeVar("T")


def on_devices(
    batch: HostBatch, model: Model, mesh: Mesh, num_microbatches: int, token_buckets: Sequence[int]
) -> Batch:
    """Returns a batch with its tokens cut, spread over the mesh; UserError if it suits not the model or the devices."""
    partitioning.check_batch_size(mesh, len(batch["mel"]), num_microbatches)
    model.check_batch(batch)
    return partitioning.put(partitioning.over_data(mesh), cut_tokens(batch, token_buckets))


def cut_tokens(batch: HostBatch, buckets: Sequence[int]) -> HostBatch:
    """Cuts the padding of note_tokens [B, N], if there are any, to the shortest bucket that holds the longest row.

    Every process sees the whole batch, so all of them choose alike.
    """
    if "note_tokens" not in batch:
        return batch
    tokens = batch["note_tokens"]
    used = np.flatnonzero(np.any(tokens != 0, axis=0))
    longest = int(used[-1]) + 1 if used.size else 1
    return batch | {"note_tokens": tokens[:, : token_bucket(longest, tokens.shape[1], buckets)]}


def prefetch(items: Iterator[T], size: int = 2) -> Generator[T]:
    """Yields the items, made up to `size` ahead in a thread, so that the device never waits for the host."""
    made: queue.Queue = queue.Queue(size)
    closed = threading.Event()

    def offer(item: tuple[Any, BaseException | None]) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(item, timeout=0.1)

    def make() -> None:
        try:
            for item in items:
                offer((item, None))
                if closed.is_set():
                    return
            offer((None, StopIteration()))
        except BaseException as error:  # carried over to the thread that waits for the item
            offer((None, error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()  # an interpreter that ends under a thread inside JAX crashes
