"""How a piece is cut into segments: frames, segment lengths, padding, and what to do with too many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from music_synth.errors import UserError

if TYPE_CHECKING:
    from music_synth.midi.notes import Note

SAMPLE_RATE = 16000  # samples a second
HOP_LENGTH = 320  # samples between the starts of frames
FRAME_RATE = SAMPLE_RATE // HOP_LENGTH  # 50 frames a second
RING_OUT_SECONDS = 1.0  # what is kept of a played piece after the end of its last note
STEPS_PER_SECOND = 100  # resolution of event times
STEPS_PER_FRAME = STEPS_PER_SECOND // FRAME_RATE
# Note tokens of a segment are padded to the next of these, so that a model compiles a few times at most.
TOKEN_BUCKETS = (128, 256, 384, 512, 1024, 2048)


class SegmentTooLong(ValueError):
    """More than `max_tokens` tokens where the caller asked for an error (training skips and counts)."""


class OverlongSegmentWarning(UserWarning):
    """A segment was cut to `max_tokens` tokens; the message says where, and how many notes are left out."""


def num_frames(seconds: float) -> int:
    """Frames of a piece of `seconds` (docs/spec.md 3.5.1): floor(n / 320) + 1 for n = floor(16000 * seconds).

    An event at the very end of the piece thus lies in a frame. This is one more than the ceil(n / 320) frames
    of a mel where n is a multiple of 320.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a piece cannot last {seconds} seconds")
    return math.floor(seconds * SAMPLE_RATE) // HOP_LENGTH + 1


def frames_of(notes: Sequence[Note]) -> int:
    """Counts the frames of a piece, which ends `RING_OUT_SECONDS` after its last note.

    The published code keeps the whole last segment instead. UserError if there are no notes.
    """
    if not notes:
        raise UserError("no notes to play")
    return math.ceil((max(note.offset for note in notes) + RING_OUT_SECONDS) * FRAME_RATE)


def num_segments(num_frames: int, segment_frames: int) -> int:
    """Counts the segments of a piece, ceil(num_frames / segment_frames): all full but the last."""
    if num_frames < 1 or segment_frames < 1:
        raise ValueError(f"{num_frames} frames in segments of {segment_frames}; both must be at least 1")
    return -(-num_frames // segment_frames)


def token_bucket(num_tokens: int, max_tokens: int, buckets: Sequence[int] = TOKEN_BUCKETS) -> int:
    """Chooses the shortest bucket that holds `num_tokens`; the last one is `max_tokens`, the network's limit.

    Raises:
      SegmentTooLong: there are more.
    """
    if num_tokens > max_tokens:
        raise SegmentTooLong(f"{num_tokens} tokens in a segment, and the network takes at most {max_tokens}")
    return next((size for size in buckets if num_tokens <= size < max_tokens), max_tokens)


def pad_tokens(tokens: np.ndarray, length: int) -> np.ndarray:
    """`tokens` [n] with zeros appended, int32 [length]. Raises `SegmentTooLong` where n > length."""
    if len(tokens) > length:
        raise SegmentTooLong(f"{len(tokens)} tokens do not fit into {length}")
    padded = np.zeros(length, np.int32)
    padded[: len(tokens)] = tokens
    return padded
