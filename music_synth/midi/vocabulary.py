"""The ids of note tokens (docs/spec.md 3.3), and of timbres, which are ours."""

from __future__ import annotations

from dataclasses import dataclass

from music_synth.errors import check_range

PAD_ID, EOS_ID = 0, 1
NUM_SPECIAL_IDS = 3  # with 2, unknown
NUM_EXTRA_IDS = 100  # unused ids after the vocabulary, which published checkpoints have
NUM_PITCHES = NUM_PROGRAMS = 128
MAX_VELOCITY = 127
EMBEDDING_MULTIPLE = 128  # embedding tables are rounded up to this many rows


@dataclass(frozen=True)
class Vocabulary:
    """Token ids (docs/spec.md 3.3): 0 padding, 1 EOS, 2 unknown, then shift, pitch, velocity, tie, program, drum.

    Timbres, which published vocabularies have not, take the first of the ids that those leave unused.

    Every `*_id` property is the first id of its kind, so `pitch_id + 60` is the token of middle C.
    """

    velocity_bins: int = 1  # 1: only on and off; 127: every MIDI velocity
    max_shift_steps: int = 1000  # longest single shift, in steps of 10 ms
    timbres: tuple[str, ...] = ()  # names of SoundFonts, rooms, players: what a segment may be said to sound like

    def __post_init__(self):
        if not 1 <= self.velocity_bins <= MAX_VELOCITY:
            raise ValueError(f"velocity_bins={self.velocity_bins}: must be 1..{MAX_VELOCITY}")
        check_range(self, 1, 2**16, "max_shift_steps")
        if len(self.timbres) > NUM_EXTRA_IDS or len(set(self.timbres)) < len(self.timbres) or not all(self.timbres):
            raise ValueError(f"timbres={self.timbres}: must be at most {NUM_EXTRA_IDS} different names")

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
        """One past the last id that is about notes; there timbres begin."""
        return self.drum_id + NUM_PITCHES

    def timbre_ids(self, name: str) -> list[int]:
        """Gives the token of a timbre; none of a name that is not in `timbres`, such as "", for unknown."""
        return [self.end_id + self.timbres.index(name)] if name in self.timbres else []

    def is_timbre(self, tokens):
        """Says which tokens are timbres. Takes ints and integer arrays."""
        return (tokens >= self.end_id) & (tokens < self.end_id + len(self.timbres))

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
