"""The ids of note tokens (docs/spec.md 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from music_synth.errors import check_range
from music_synth.midi import segments as seg

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
NUM_SPECIAL_IDS = 3
NUM_EXTRA_IDS = 100  # unused ids after the vocabulary, which published checkpoints have
NUM_PITCHES = NUM_PROGRAMS = 128
MAX_VELOCITY = 127
EMBEDDING_MULTIPLE = 128  # embedding tables are rounded up to this many rows


@dataclass(frozen=True)
class Vocabulary:
    """Token ids (docs/spec.md 3.3): 0 padding, 1 EOS, 2 unknown, then shift, pitch, velocity, tie, program, drum.

    Every `*_id` property is the first id of its kind, so `pitch_id + 60` is the token of middle C.
    """

    velocity_bins: int = 1  # 1: only on and off; 127: every MIDI velocity
    max_shift_steps: int = 1000  # longest single shift, in steps of 10 ms
    steps_per_second: ClassVar[int] = seg.STEPS_PER_SECOND

    def __post_init__(self):
        if not 1 <= self.velocity_bins <= MAX_VELOCITY:
            raise ValueError(f"velocity_bins={self.velocity_bins}: must be 1..{MAX_VELOCITY}")
        check_range(self, 1, 2**16, "max_shift_steps")

    @property
    def shift_id(self) -> int:
        return NUM_SPECIAL_IDS

    @property
    def pitch_id(self) -> int:
        return self.shift_id + self.max_shift_steps + 1

    @property
    def velocity_id(self) -> int:
        return self.pitch_id + NUM_PITCHES

    @property
    def tie_id(self) -> int:
        return self.velocity_id + self.velocity_bins + 1  # bin 0 is note-off

    @property
    def program_id(self) -> int:
        return self.tie_id + 1

    @property
    def drum_id(self) -> int:
        return self.program_id + NUM_PROGRAMS

    @property
    def end_id(self) -> int:
        """One past the last id that means something."""
        return self.drum_id + NUM_PITCHES

    @property
    def size(self) -> int:
        """Ids, with the unused extra ones: 1491 for 1 velocity bin."""
        return self.end_id + NUM_EXTRA_IDS

    @property
    def num_embeddings(self) -> int:
        """Rows of an embedding table: `size` rounded up, 1536 for 1 velocity bin."""
        return -(-self.size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE

    def velocity_to_bin(self, velocity):
        """ceil(bins * velocity / 127); 0 stays 0. Takes ints and integer arrays."""
        return -(-self.velocity_bins * velocity // MAX_VELOCITY)

    def bin_to_velocity(self, velocity_bin):
        """Returns floor(127 * bin / bins). Takes ints and integer arrays."""
        return MAX_VELOCITY * velocity_bin // self.velocity_bins
