"""Distances between two sets of embedding frames, with float64 statistics.

Frames are float [n, D] as an `embeddings.Embedding` gives them. The first set is the reference (real audio), the second
what is judged. Everything random takes a `numpy.random.Generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from music_synth.errors import UserError
from music_synth.threads import one_blas_thread

MAX_FULL_DIMS = 1024  # above it only the diagonal of the covariance is kept
MIN_FRAMES_AT_INFINITY = 500  # the smallest sample of `frechet_distance_at_infinity`
SIZES_AT_INFINITY = 25
MAX_KERNEL_FRAMES = 2048  # of each set in `kernel_distance`: three matrices of that size in float64 are 100 MB
KERNEL_SCALE = 100  # the published kernel distance is given in hundredths


# --- Gaussians ---------------------------------------------------------------------------------------------------


class Gaussian:
    """Mean and population covariance of frames that come in parts, in any order, on any machine.

    The memory does not grow with the number of frames: D + D^2 numbers, or 2 D above 1024 dims, where only the diagonal
    of the covariance is kept. Parts are joined as Chan, Golub and LeVeque (1979) do.

    Attributes:
      n: frames so far.
      mean: float64 [D]; empty before the first frame.
    """

    def __init__(self):
        self.n = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros(0)  # sum of (x - mean)(x - mean)^T, or of its diagonal

    @classmethod
    def of(cls, frames: np.ndarray) -> Gaussian:
        gaussian = cls()
        gaussian.add(frames)
        return gaussian

    @classmethod
    def merged(cls, parts: Iterable[Gaussian]) -> Gaussian:
        """Joins all frames of the parts; the parts stay as they are."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    def add(self, frames: np.ndarray) -> None:
        """Frames [n, D]; none are allowed. UserError if they are not finite."""
        frames = checked_frames(frames)
        if not len(frames):
            return
        part = Gaussian()
        part.n, part.mean = len(frames), frames.mean(axis=0)
        centered = frames - part.mean
        full = frames.shape[1] <= MAX_FULL_DIMS
        part._scatter = centered.T @ centered if full else np.sum(centered**2, axis=0)
        self.merge(part)

    def merge(self, other: Gaussian) -> None:
        """Takes in all frames of `other`, which stays as it is."""
        if other.n == 0:
            return
        if self.n == 0:
            self.n, self.mean, self._scatter = other.n, other.mean.copy(), other._scatter.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"frames of {len(other.mean)} dims after frames of {len(self.mean)}")
        n = self.n + other.n
        step = other.mean - self.mean
        spread = np.outer(step, step) if self._scatter.ndim == 2 else step**2
        self._scatter += other._scatter + spread * (self.n * other.n / n)
        self.mean = self.mean + step * (other.n / n)
        self.n = n

    @property
    def covariance(self) -> np.ndarray:
        """Population covariance (over n, not n - 1), float64 [D, D]; above 1024 dims its diagonal [D]."""
        if self.n == 0:
            raise ValueError("a Gaussian of no frames has no covariance")
        return self._scatter / self.n


def frechet_distance(reference: Gaussian, judged: Gaussian) -> float:
    """Computes |mean_1 - mean_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians (Dowson and Landau 1982).

    The trace of the root is taken from the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which are those of S_1 S_2. That
    matrix is symmetric: they stay real and finite where the root of S_1 S_2 itself does not (fewer frames than dims).

    Raises:
      ValueError: one of them is empty, the dims differ, or a covariance is none (it has negative eigenvalues).
    """
    if not reference.n or not judged.n:
        raise ValueError("a Fréchet distance needs frames on both sides")
    if reference.mean.shape != judged.mean.shape:
        raise ValueError(f"a Fréchet distance of {len(reference.mean)} to {len(judged.mean)} dims")
    first, second = reference.covariance, judged.covariance
    shift = float(np.sum((reference.mean - judged.mean) ** 2))
    if first.ndim == 1:
        return shift + float(np.sum((np.sqrt(first) - np.sqrt(second)) ** 2))
    with one_blas_thread():
        values, vectors = np.linalg.eigh(first)
        root = vectors * np.sqrt(positive(values))  # S_1 = root root^T
        trace_of_root = float(np.sum(np.sqrt(positive(np.linalg.eigvalsh(root.T @ second @ root)))))
    return max(0.0, shift + float(np.trace(first) + np.trace(second)) - 2 * trace_of_root)


def positive(eigenvalues: np.ndarray) -> np.ndarray:
    """Sets rounding below 0 to 0; more than rounding is a ValueError."""
    if eigenvalues.min() < -1e-8 * max(eigenvalues.max(), 1e-300):
        raise ValueError(f"no covariance: its eigenvalues go from {eigenvalues.min():g} to {eigenvalues.max():g}")
    return np.maximum(eigenvalues, 0)


def frechet_distance_at_infinity(
    reference: np.ndarray, judged: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Estimates the Fréchet distance of infinitely many judged frames: the published limit, and how well it fits.

    The bias of the distance falls as 1 / n in the number of frames (Chong and Forsyth 2020). So it is taken
    of draws of 25 sizes from 500 frames to all of them against the whole reference, and a line in 1 / n is fitted,
    whose value at 0 is the limit (Gui et al. 2024). Draws are with replacement, as theirs: what is removed is the bias
    of the draws alone, which comes on top of that of the judged frames, and the limit is near the plain distance.

    Returns:
      (limit, R^2 of the fit). An R^2 well below 1 says that the limit is not to be trusted.

    Raises:
      UserError: there are not more than 500 judged frames.
    """
    judged = checked_frames(judged)
    if len(judged) <= MIN_FRAMES_AT_INFINITY:
        raise UserError(
            f"{len(judged)} frames are too few for the Fréchet distance at infinity: it needs more than"
            f" {MIN_FRAMES_AT_INFINITY}; score more audio"
        )
    whole = Gaussian.of(reference)
    sizes = np.linspace(MIN_FRAMES_AT_INFINITY, len(judged), SIZES_AT_INFINITY).astype(int)
    distances = np.array([frechet_distance(whole, Gaussian.of(rng.choice(judged, size))) for size in sizes])
    slope, limit = np.polyfit(1 / sizes, distances, 1)
    residual = float(np.sum((distances - limit - slope / sizes) ** 2))
    total = float(np.sum((distances - distances.mean()) ** 2))
    return float(limit), 1 - residual / total if total else 1.0


# --- distances of the frames themselves --------------------------------------------------------------------------


def kernel_distance(reference: np.ndarray, judged: np.ndarray, rng: np.random.Generator) -> float:
    """Computes the unbiased squared maximum mean discrepancy (Gretton et al. 2012), Gaussian kernel, times 100.

    The kernel exp(-|x - y|^2 / (2 s^2)) has as its bandwidth s the median distance within the reference (Chung et al.
    2025, "KAD"). Being unbiased it is about 0, and may be below, where both sets have the same distribution.

    Sets of the same size are taken as pairs, frame by frame, and eq. 4 of Gretton et al. leaves the pairs themselves
    out: equal sets are at 0 exactly. Sets of different sizes are compared by eq. 3. Sets of more than 2,048 frames are
    thinned out to that many, drawn without replacement, pairs staying together.

    Raises:
      UserError: a set has fewer than two frames, or all frames of the reference are equal (silence).
    """
    x, y = checked_frames(reference), checked_frames(judged)
    if min(len(x), len(y)) < 2:
        raise UserError(f"the kernel distance needs two frames on each side, not {len(x)} and {len(y)}")
    paired = len(x) == len(y)
    chosen = [drawn(len(frames), MAX_KERNEL_FRAMES, rng) for frames in ((x,) if paired else (x, y))]
    x, y = x[chosen[0]], y[chosen[-1]]
    within = squared_distances(x, x)
    bandwidth2 = float(np.median(np.sqrt(within[np.triu_indices(len(x), 1)]))) ** 2
    if bandwidth2 == 0:
        raise UserError("at least half of the reference frames are equal: the kernel distance has no bandwidth")

    def kernel(squares: np.ndarray) -> np.ndarray:
        return np.exp(-squares / (2 * bandwidth2))

    def mean_of_others(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    across = kernel(squared_distances(x, y))
    mean_across = mean_of_others(across) if paired else across.mean()
    mmd2 = mean_of_others(kernel(within)) + mean_of_others(kernel(squared_distances(y, y))) - 2 * mean_across
    return float(KERNEL_SCALE * mmd2)


def drawn(n: int, max_n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `max_n` of n things, or of all if they are not more."""
    return rng.choice(n, max_n, replace=False) if n > max_n else np.arange(n)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Computes |x_i - y_j|^2, float64 [len(x), len(y)]."""
    center = x.mean(axis=0)  # distances do not change, and less of their digits cancels
    x, y = x - center, y - center
    squares = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)[None, :] - 2 * (x @ y.T)
    return np.maximum(squares, 0)


def reconstruction_distance(reference: np.ndarray, judged: np.ndarray) -> float:
    """Computes the mean Euclidean distance of frames, pair by pair; the longer set is cut. UserError if none."""
    a, b = checked_frames(reference), checked_frames(judged)
    n = min(len(a), len(b))
    if not n:
        raise UserError("no frames to compare: the clip is too short for this embedding")
    return float(np.mean(np.linalg.norm(a[:n] - b[:n], axis=1)))


def checked_frames(frames: np.ndarray) -> np.ndarray:
    """Returns frames as float64 [n, D]; UserError if they are not finite."""
    frames = np.asarray(frames, np.float64)
    if frames.ndim != 2:
        raise ValueError(f"embedding frames must be [n, dims], not {frames.shape}")
    if not np.isfinite(frames).all():
        bad = int((~np.isfinite(frames)).any(axis=1).argmax())
        raise UserError(f"embedding frame {bad} of {len(frames)} is not finite (NaN or infinity)")
    return frames


# --- intervals ---------------------------------------------------------------------------------------------------


def bootstrap_interval(
    clips: Sequence, rng: np.random.Generator, statistic: Callable[[list], float], num_resamples: int = 1000
) -> tuple[float, float]:
    """Draws a 95 % percentile bootstrap over clips (Efron and Tibshirani 1993, section 13.3): (low, high).

    Clips, not frames, are what is drawn: the frames of a clip resemble each other.

    Args:
      clips: what `statistic` takes, for instance a pair of `Gaussian`s each.
      statistic: of a list of as many clips, drawn with replacement. A Fréchet distance is higher on drawn clips than on
        all of them, since fewer are different; its interval may lie above it.

    Returns:
      (nan, nan) for fewer than two clips: nothing is known about their spread.
    """
    if len(clips) < 2:
        return float("nan"), float("nan")
    draws = rng.integers(len(clips), size=(num_resamples, len(clips)))
    low, high = np.quantile([statistic([clips[index] for index in draw]) for draw in draws], [0.025, 0.975])
    return float(low), float(high)
