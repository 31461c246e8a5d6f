import math

import numpy as np
import pytest

from music_synth.midi import segments


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [(0.0, 1), (319 / 16000, 1), (0.02, 2), (5.119, 256), (5.12, 257), (15.36, 769), (25.6, 1281)],
)
def test_num_frames_adds_a_frame_where_the_samples_fill_the_last_one(seconds, frames):
    assert segments.num_frames(seconds) == frames


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_num_frames_rejects(seconds):
    with pytest.raises(ValueError, match=str(seconds)):
        segments.num_frames(seconds)


def test_num_segments():
    assert [segments.num_segments(frames, 256) for frames in (1, 256, 257, 512, 600)] == [1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="0 frames"):
        segments.num_segments(0, 256)


def test_pad_tokens():
    padded = segments.pad_tokens(np.array([7, 1]), 4)
    np.testing.assert_array_equal(padded, [7, 1, 0, 0])
    assert padded.dtype == np.int32
    with pytest.raises(segments.SegmentTooLong, match="5 tokens do not fit into 4"):
        segments.pad_tokens(np.ones(5), 4)
