"""Metrics of single segments."""

import numpy as np
import pytest

from music_synth.evaluation.segment_metrics import mel_distances


def test_distances_of_sampled_mels():
    target = np.random.default_rng(0).normal(-5, 1, (2, 60, 4)).astype(np.float32)
    same = mel_distances(target, target)
    assert same == pytest.approx({"error_db": 0, "frechet_log_mel": 0, "reconstruction_log_mel": 0}, abs=1e-9)
    louder = mel_distances(target, target + 1)  # the means of 4 bins move by 1, their deviations do not
    assert louder == pytest.approx(
        {"error_db": 8.685889638, "frechet_log_mel": 4, "reconstruction_log_mel": 2}, rel=1e-4
    )
    assert mel_distances(target[:, :49], target[:, :49] + 1).keys() == {"error_db"}
    assert mel_distances(target[:, :0], target[:, :0]) == {}
    assert np.isnan(mel_distances(target, target * np.nan)["error_db"])
