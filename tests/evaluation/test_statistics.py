"""Distances of embedding frames: golden numbers, known answers, and that parts and their order change nothing."""

import json

import numpy as np
import pytest

from music_synth.errors import UserError
from music_synth.evaluation import statistics
from music_synth.evaluation.statistics import (
    Gaussian,
    bootstrap_interval,
    frechet_distance,
    frechet_distance_at_infinity,
    kernel_distance,
    positive,
    reconstruction_distance,
)
from tests import golden_arrays

GOLDEN = golden_arrays.load("metrics")
SCORES = json.loads((golden_arrays.GOLDEN / "metrics_scores.json").read_text(encoding="utf-8"))
CASES = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("frechet/")})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def rng():
    return np.random.default_rng(0)


# --- golden numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_equals_the_reference(case, monkeypatch):
    golden = golden_arrays.tree(GOLDEN, f"frechet/{case}/")
    if golden["sigma_1"].ndim == 1:  # the reference kept the diagonal of 5 dims too
        monkeypatch.setattr(statistics, "MAX_FULL_DIMS", 4)
    x, y = Gaussian(), Gaussian.of(golden["y"])
    for first, last in zip(golden["update_cuts_x"], golden["update_cuts_x"][1:], strict=False):
        x.add(golden["x"][first:last])
    for gaussian, number in ((x, 1), (y, 2)):
        np.testing.assert_allclose(gaussian.mean, golden[f"mu_{number}"], atol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, golden[f"sigma_{number}"], atol=1e-11)
    tolerance = 1e-3 if "rank_deficient" in case else 1e-7
    assert frechet_distance(x, y) == pytest.approx(float(golden["distance"]), rel=tolerance, abs=1e-9)


def test_streaming_equals_the_reference():
    frames, gaussian = GOLDEN["streaming/x"], Gaussian()
    for first, last in ((0, 5), (5, 6), (6, 37)):
        gaussian.add(frames[first:last])
        golden = golden_arrays.tree(GOLDEN, f"streaming/after_{last}/")
        assert gaussian.n == golden["n"] == last
        np.testing.assert_allclose(gaussian.mean, golden["mu"], atol=1e-13)
        np.testing.assert_allclose(gaussian.covariance, golden["sigma"], atol=1e-13)


def test_distances_of_clips_equal_the_reference():
    golden = golden_arrays.tree(GOLDEN, "embedding_distance/")
    assert reconstruction_distance(golden["a"], golden["b"]) == pytest.approx(float(golden["value"]), rel=1e-12)
    clips = golden_arrays.tree(GOLDEN, "reconstruction/")
    for name in ("vggish", "trill"):
        pairs = [
            [clips[f"{which}{clip}"][f"{name}_embedding"] for which in ("target", "prediction")] for clip in range(3)
        ]
        distance = np.mean([reconstruction_distance(*pair) for pair in pairs])
        assert distance == pytest.approx(SCORES["reconstruction"][f"{name}_embedding_distance"], rel=1e-7)
        sides = [Gaussian.merged(map(Gaussian.of, side)) for side in zip(*pairs, strict=True)]
        expected = SCORES["reconstruction"][f"{name}_embedding_fréchet"]
        assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6, abs=1e-9)


# --- Gaussians ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [7, 1100])
def test_parts_and_their_order_change_nothing(dims):
    frames = normal(0, 60, dims) * 3 + 100  # an offset that a sum of squares would lose digits to
    whole = Gaussian.of(frames)
    assert whole.covariance.shape == ((7, 7) if dims == 7 else (1100,))
    expected = np.cov(frames.T, bias=True) if dims == 7 else frames.var(axis=0)
    np.testing.assert_allclose(whole.covariance, expected, rtol=1e-10, atol=1e-12)
    for cuts, order in (((1, 2, 50), 1), ((30,), -1), ((0, 20, 20), 1)):  # 0 and 20, 20: parts without frames
        parts = [Gaussian.of(part) for part in np.split(frames, cuts)[::order]]
        before = [part.n for part in parts]
        merged = Gaussian.merged(parts)
        assert merged.n == 60 and [part.n for part in parts] == before
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-11)


def test_frechet_distance_of_known_gaussians():
    """Frames at +-s sqrt(D) e_i have mean 0 and covariance diag(s^2)."""

    def spread(s):
        return np.concatenate([np.diag(s), -np.diag(s)]) * np.sqrt(len(s))

    s, t = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
    a = Gaussian.of(spread(s))
    np.testing.assert_allclose(a.covariance, np.diag(s**2), atol=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    # Commuting covariances: |m1 - m2|^2 + sum (s - t)^2.
    b = Gaussian.of(spread(t) + np.array([1.0, -2.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + np.sum((s - t) ** 2), rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    # Turning both changes nothing; covariances that do not commute in two dims have a closed form of their own:
    # tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 S2)).
    turn = np.linalg.qr(normal(1, 3, 3))[0]
    turned = [Gaussian.of(frames @ turn) for frames in (spread(s), spread(t) + np.array([1.0, -2.0, 0.0]))]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    x, y = Gaussian.of(normal(2, 50, 2) * [1, 3]), Gaussian.of(normal(3, 50, 2) @ [[1.0, 0.8], [0.0, 1.0]])
    product = x.covariance @ y.covariance
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.sum((x.mean - y.mean) ** 2) + np.trace(x.covariance) + np.trace(y.covariance) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_fewer_frames_than_dims_is_finite():
    point = Gaussian.of(np.zeros((1, 40)))
    other = Gaussian.of(normal(0, 5, 40))
    expected = np.sum(other.mean**2) + np.trace(other.covariance)
    assert frechet_distance(point, other) == pytest.approx(expected, rel=1e-12)


def test_what_is_no_gaussian_is_refused():
    with pytest.raises(UserError, match="embedding frame 3 of 5 is not finite"):
        Gaussian.of(np.where(np.arange(5)[:, None] == 3, np.nan, np.ones((5, 2))))
    with pytest.raises(ValueError, match=r"must be \[n, dims\]"):
        Gaussian.of(np.zeros(4))
    with pytest.raises(ValueError, match="3 dims after frames of 2"):
        Gaussian.of(np.zeros((4, 2))).add(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="frames on both sides"):
        frechet_distance(Gaussian(), Gaussian.of(np.zeros((4, 2))))
    with pytest.raises(ValueError, match="2 to 3 dims"):
        frechet_distance(Gaussian.of(np.zeros((4, 2))), Gaussian.of(np.zeros((4, 3))))
    with pytest.raises(ValueError, match="no covariance"):
        positive(np.array([-0.1, 1.0]))
    assert positive(np.array([-1e-12, 1.0])).tolist() == [0, 1]


# --- the limit in the number of frames ---------------------------------------------------------------------------


def test_the_limit_removes_the_bias_of_the_draws():
    reference, judged = normal(0, 20_000, 16), normal(1, 1000, 16)
    plain = frechet_distance(Gaussian.of(reference), Gaussian.of(judged))
    limit, fit = frechet_distance_at_infinity(reference, judged, rng())
    assert plain > 0.05 and limit == pytest.approx(plain, rel=0.2) and 0 < fit < 1
    far, _ = frechet_distance_at_infinity(reference, judged + 1, rng())
    assert far == pytest.approx(16, rel=0.05)


def test_the_limit_of_few_or_equal_frames():
    with pytest.raises(UserError, match=r"500 frames are too few .*more than 500; score more audio"):
        frechet_distance_at_infinity(normal(0, 600, 2), normal(1, 500, 2), rng())
    limit, fit = frechet_distance_at_infinity(np.ones((3, 2)), np.ones((600, 2)), rng())
    assert (limit, fit) == (0, 1)


# --- kernel distance ---------------------------------------------------------------------------------------------


def test_kernel_distance_by_hand():
    """Reference 0, 1, 3 (distances 1, 2, 3: median 2), judged 1, 4."""

    def k(d):
        return np.exp(-(d**2) / 8)

    within_x, within_y = (k(1) + k(2) + k(3)) / 3, k(3)
    across = (k(1) + k(4) + k(0) + k(3) + k(2) + k(1)) / 6

    def column(*values):
        return np.array(values, float)[:, None]

    got = kernel_distance(column(0, 1, 3), column(1, 4), rng())
    assert got == pytest.approx(100 * (within_x + within_y - 2 * across), rel=1e-12)
    # Pairs (0, 1), (1, 4), (3, 0): the pairs themselves stay out.
    within_y, across = (k(3) + k(1) + k(4)) / 3, (k(4) + k(0) + k(0) + k(1) + k(2) + k(1)) / 6
    got = kernel_distance(column(0, 1, 3), column(1, 4, 0), rng())
    assert got == pytest.approx(100 * (within_x + within_y - 2 * across), rel=1e-12)


def test_kernel_distance_is_zero_for_equal_sets_and_about_zero_for_equal_distributions():
    x = normal(0, 3000, 8)
    assert kernel_distance(x, x, rng()) == pytest.approx(0, abs=1e-10)
    values = [kernel_distance(normal(seed, 300, 8), normal(seed + 100, 299, 8), rng()) for seed in range(20)]
    assert abs(np.mean(values)) < 2 * np.std(values) / np.sqrt(20) + 1e-3  # unbiased
    assert kernel_distance(x, normal(1, 3000, 8) + 0.5, rng()) > 10 * np.std(values)


def test_large_sets_are_thinned_out(monkeypatch):
    x, y = normal(0, 4000, 4), normal(1, 5000, 4) + 0.5
    large = kernel_distance(x, y, rng())
    monkeypatch.setattr(statistics, "MAX_KERNEL_FRAMES", 500)
    small = kernel_distance(x, y, rng())
    assert small == kernel_distance(x, y, rng())
    assert small == pytest.approx(large, rel=0.3)


def test_kernel_distance_without_a_bandwidth():
    with pytest.raises(UserError, match="reference frames are equal"):
        kernel_distance(np.ones((5, 2)), normal(0, 5, 2), rng())
    with pytest.raises(UserError, match="two frames on each side, not 1 and 5"):
        kernel_distance(np.ones((1, 2)), normal(0, 5, 2), rng())


# --- clips -------------------------------------------------------------------------------------------------------


def test_reconstruction_distance():
    a = np.array([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    assert reconstruction_distance(a, a) == 0
    assert reconstruction_distance(a, np.array([[3.0, 4.0], [1.0, 1.0]])) == 2.5  # the third frame is cut
    with pytest.raises(UserError, match="too short for this embedding"):
        reconstruction_distance(a, a[:0])


def test_bootstrap_interval_of_a_mean():
    values = normal(0, 200) * 2 + 5
    low, high = bootstrap_interval(values, rng(), np.mean)
    error = values.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)
    assert (low, high) == bootstrap_interval(values, rng(), np.mean)
    assert np.isnan(bootstrap_interval([1.0], rng(), np.mean)).all()


def test_bootstrap_interval_of_a_frechet_distance():
    clips = [(Gaussian.of(normal(i, 40, 4)), Gaussian.of(normal(i + 100, 40, 4) + 1)) for i in range(20)]

    def distance(pairs):
        return frechet_distance(*(Gaussian.merged(side) for side in zip(*pairs, strict=True)))

    low, high = bootstrap_interval(clips, rng(), distance, num_resamples=100)
    assert 3 < low < distance(clips) < high < 5  # 4 is true
