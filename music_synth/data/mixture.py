"""Training on several prepared folders at once, each with its share of the examples. No TensorFlow.

    --gin.TASK="'prepared/freedoom=3,prepared/composed=1'"

Three examples of four are then of the first folder. Without numbers every frame of all folders is as likely. Held-out
pieces are those of all folders, one folder after the other.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from music_synth.data.examples import Batch, Piece, Row, SegmentSettings, stack
from music_synth.data.prepared import PreparedWindows
from music_synth.errors import UserError

ROUND = 1000  # examples in which each folder has its share exactly
MIXING_STREAM = 2  # random stream of a seed, besides those of `prepared`


def members_of(task: str) -> dict[str, float | None]:
    """Gives the members of a task with their weights, None where none is said; a task that is no mixture is one."""
    if "," not in task or Path(task).expanduser().exists():
        return {task: None}
    members: dict[str, float | None] = {}
    for part in filter(None, (part.strip() for part in task.split(","))):
        name, _, weight = part.rpartition("=") if "=" in part else (part, "", None)
        try:
            members[name] = None if weight is None else float(weight)
        except ValueError as error:
            raise UserError(f"{part} in {task!r}: write FOLDER=WEIGHT, with a number") from error
        if weight is not None and not 0 < float(weight) < math.inf:
            raise UserError(f"{part} in {task!r}: a weight must be a positive number")
    if len({weight is None for weight in members.values()}) > 1:
        raise UserError(f"{task!r}: give all members a weight, or none")
    return members


class Mixture:
    """The training windows, and the pieces, of prepared folders.

    Example number i is a pure function of (seed, i): of each `ROUND` examples a folder has its share, in random order,
    and its own examples come in the order that they have without the others.
    """

    def __init__(
        self, members: Sequence[PreparedWindows | Mixture], weights: Sequence[float | None], settings: SegmentSettings
    ):
        self._members, self._weights, self._settings = members, weights, settings
        self._round = functools.lru_cache(maxsize=2)(self._draw_round)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How many of `ROUND` examples are of each member: its share, rounded, but at least one."""
        weights = [
            weight or float(member.num_frames) for member, weight in zip(self._members, self._weights, strict=True)
        ]
        bounds = np.rint(np.cumsum([0.0, *weights]) / sum(weights) * (ROUND - len(weights)))
        return np.diff(bounds).astype(int) + 1

    @property
    def num_frames(self) -> int:
        return sum(member.num_frames for member in self._members)

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Makes batches start_step, start_step + 1, ... without end."""
        rows = self._settings.batch_size
        for step in itertools.count(start_step):
            yield stack([self.train_row(step * rows + row) for row in range(rows)])

    def pieces(self, split: str, audio: bool = True) -> Iterator[Piece]:
        """Reads the whole pieces of `split`, in order; with audio, if their folder holds it."""
        return itertools.chain.from_iterable([member.pieces(split, audio) for member in self._members])

    def train_row(self, index: int) -> Row:
        """Makes training example number `index` of the endless stream."""
        if len(self._members) == 1:
            return self._members[0].train_row(index)
        number, position = divmod(index, ROUND)
        order = self._round(number)
        member = int(order[position])
        before = int(np.count_nonzero(order[:position] == member))
        return self._members[member].train_row(number * int(self.counts[member]) + before)

    def _draw_round(self, number: int) -> np.ndarray:
        order = np.repeat(np.arange(len(self._members)), self.counts)
        return np.random.default_rng([self._settings.seed, MIXING_STREAM, number]).permutation(order)
