"""Distances between two sets of image features: Fréchet distance (FD, "FID"), its limit for infinite n, and KID.

Features are the rows of an (n, d) matrix, one image a row, from one and the same fixed network; units are the network's.
Every figure depends on that network, on crop and intensity scale and, for the plain FD, strongly on n: for two samples of
the standard Gaussian with d = 512 it is about 132 at n = 1,000 and 26 at n = 5,000. Quote n with it, and the distance
between two halves of the real scans at the same n; compare generators by `frechet_distance_infinity` or `kernel_distance`.

Memory: `GaussianStats` holds 8 d² bytes however many rows pass through it. The other functions read the features in blocks
and accept anything that indexes like an array, such as a memory map.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.metrics.manifold import feature_matrix, row_blocks
from brainsynth.records import record

F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class GaussianStats:
    """Count, mean and scatter of rows that stream by; merges with those of other workers, in any order.

    Pairwise update of Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances"), in float64: no large sums of squares, so a mean far from 0 costs no digits.
    """

    dimensions: int
    """d, the number of features."""
    count: int = 0
    """Rows so far."""
    mean: F64 = field(init=False)
    """(d,) mean of the rows."""
    scatter: F64 = field(init=False)
    """(d, d) sum of (row - mean)(row - mean)ᵀ."""

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.dimensions)
        self.scatter = np.zeros((self.dimensions, self.dimensions))

    @classmethod
    def of(cls, features: npt.ArrayLike, name: str = "given") -> GaussianStats:
        """Statistics of one (n, d) matrix."""
        matrix = feature_matrix(features, name)
        return cls(matrix.shape[1])._add(matrix)

    def update(self, batch: npt.ArrayLike) -> None:
        """Add an (n, d) batch. Raises UserError on another d, NaN or Inf; then nothing of the batch is added."""
        matrix = feature_matrix(batch, "batch's")
        _same_dimensions(matrix.shape[1], self.dimensions)
        self._add(matrix)

    def merge(self, other: GaussianStats) -> None:
        """Add the rows that `other` saw. Raises UserError on another d."""
        _same_dimensions(other.dimensions, self.dimensions)
        self._combine(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> F64:
        """(d, d) unbiased covariance. Raises UserError below 2 rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)

    def _add(self, matrix: npt.NDArray[np.floating]) -> GaussianStats:
        for rows in row_blocks(len(matrix)):
            block = matrix[rows].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            self._combine(len(block), mean, block.T @ block)
        return self

    def _combine(self, count: int, mean: F64, scatter: F64) -> None:
        total = max(self.count + count, 1)
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count += count


def frechet_distance(first: GaussianStats, second: GaussianStats) -> float:
    """Fréchet distance of two Gaussians, ‖m₁ - m₂‖² + tr(S₁ + S₂ - 2 (S₁ S₂)^½): the squared 2-Wasserstein distance.

    Formula: Dowson & Landau 1982; as an image metric, Heusel et al. 2017. The trace of the root is the sum of the singular
    values of S₁^½ S₂^½, with roots by symmetric eigendecomposition. So nothing is ever complex or badly conditioned, and
    covariances of less than full rank (n <= d, constant features) are as exact as others.

    Returns:
        Distance in squared feature units, >= 0. It is biased upwards at finite n; see the module's text.
    """
    _same_dimensions(first.dimensions, second.dimensions)
    return _distance(first, second, _root_factor(first.covariance), _root_factor(second.covariance))


def _distance(first: GaussianStats, second: GaussianStats, root: F64, other_root: F64) -> float:
    overlap = np.linalg.svd(root.T @ other_root, compute_uv=False).sum() if root.size and other_root.size else 0.0
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return max(0.0, float(np.square(first.mean - second.mean).sum() + spread))


def _root_factor(covariance: F64) -> F64:
    """(d, rank) matrix A with A Aᵀ = covariance; directions whose variance is rounding error are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _same_dimensions(first: int, second: int) -> None:
    if first != second:
        raise UserError(f"features of {first} and {second} dimensions do not compare or merge; use one feature network")


@record
class FrechetLimit:
    """Fréchet distance extrapolated to infinitely many images."""

    value: float
    """FD at 1/n → 0. Noise can make it slightly negative when both sets have one distribution."""
    standard_error: float
    """Of the fitted intercept, from the residuals. The subsets overlap, so it is a lower bound."""
    slope: float
    """Bias of the plain FD at the full n: FD(n) ≈ value + slope."""
    r_squared: float
    """Of the linear fit; far below 1 with a slope well above the residuals means that n is too small for it."""
    fractions: tuple[float, ...]
    """Share of the rows used at each point."""
    distances: tuple[float, ...]
    """Plain FD at each point."""


def frechet_distance_infinity(
    generated: npt.ArrayLike, reference: npt.ArrayLike | GaussianStats, points: int = 15, seed: int = 0
) -> FrechetLimit:
    """FD∞: the intercept of a straight line through FD against 1/n over random subsets (Chong & Forsyth 2020).

    With `reference` features, both sets shrink by the same share, so the bias of either goes; given as `GaussianStats` it
    stays whole (the paper's protocol, for a reference so large that it has no bias). Shares are even in 1/n, from all rows
    down to a fifth, but never fewer than 2 d rows: below, FD is no straight line.

    Args:
        generated: (n, d) features.
        reference: (m, d) features, or their statistics.
        points: subsets, >= 3.
        seed: of the subsets; the same seed gives the same result.

    Raises:
        UserError: a set has fewer than 4 d rows. Use `kernel_distance` then, or fewer features.
    """
    made = feature_matrix(generated, "generated")
    real = reference if isinstance(reference, GaussianStats) else feature_matrix(reference, "reference")
    dimensions = real.dimensions if isinstance(real, GaussianStats) else real.shape[1]
    _same_dimensions(made.shape[1], dimensions)
    rows = len(made) if isinstance(real, GaussianStats) else min(len(made), len(real))
    if rows < 4 * dimensions or points < 3:
        raise UserError(
            f"an extrapolation of the Fréchet distance of {dimensions} features needs 3 points (not {points}) and "
            f"{4 * dimensions} rows (not {rows}); use the kernel distance, which has no bias, or fewer features"
        )
    rng = np.random.default_rng(seed)
    inverse = np.linspace(1.0, min(5.0, rows / (2 * dimensions)), points)
    root = _root_factor(real.covariance) if isinstance(real, GaussianStats) else None
    distances = np.empty(points)
    for i, share in enumerate(1 / inverse):
        mine = _subset_stats(made, share, rng)
        other = real if isinstance(real, GaussianStats) else _subset_stats(real, share, rng)
        other_root = _root_factor(other.covariance) if root is None else root
        distances[i] = _distance(mine, other, _root_factor(mine.covariance), other_root)
    return _line(inverse, distances)


def _subset_stats(matrix: npt.NDArray[np.floating], share: float, rng: np.random.Generator) -> GaussianStats:
    stats = GaussianStats(matrix.shape[1])
    chosen = np.sort(rng.permutation(len(matrix))[: round(len(matrix) * share)])
    for rows in row_blocks(len(chosen)):
        stats._add(matrix[chosen[rows]])
    return stats


def _line(inverse: F64, distances: F64) -> FrechetLimit:
    """Ordinary least squares of distances on 1/share, and the intercept's standard error."""
    centred = inverse - inverse.mean()
    slope = float(centred @ distances / (centred @ centred))
    value = float(distances.mean() - slope * inverse.mean())
    left = distances - value - slope * inverse
    noise = float(left @ left) / (len(inverse) - 2)
    total = float(np.square(distances - distances.mean()).sum())
    return FrechetLimit(
        value=value,
        standard_error=float(np.sqrt(noise * (1 / len(inverse) + inverse.mean() ** 2 / (centred @ centred)))),
        slope=slope,
        r_squared=1 - float(left @ left) / total if total > 0 else 1.0,
        fractions=tuple((1 / inverse).tolist()),
        distances=tuple(distances.tolist()),
    )


def squared_mmd(first: npt.ArrayLike, second: npt.ArrayLike, degree: int = 3, coef: float = 1.0) -> float:
    """Unbiased squared maximum mean discrepancy under the polynomial kernel (x·y / d + coef)^degree.

    MMD²_u of Gretton et al. 2012, equation 3; with degree 3 and coef 1, the estimator of KID (Bińkowski et al. 2018).
    Expectation 0 for equal distributions, so it may be negative. Rows of (n, d) and (m, d), n and m >= 2. Time n², memory
    of one block; float64 throughout, for it is a small difference of large means.
    """
    x, y = feature_matrix(first, "first"), feature_matrix(second, "second")
    _same_dimensions(x.shape[1], y.shape[1])
    if min(len(x), len(y)) < 2:
        raise UserError(f"a kernel distance needs at least 2 rows in each set, not {len(x)} and {len(y)}")
    within = _within(x, degree, coef) + _within(y, degree, coef)
    across = sum(float(_kernel(x[i], y[j], degree, coef).sum()) for i in row_blocks(len(x)) for j in row_blocks(len(y)))
    return within - 2 * across / (len(x) * len(y))


def _kernel(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating], degree: int, coef: float) -> F64:
    product = x.astype(np.float64) @ y.astype(np.float64).T
    product /= x.shape[1]
    product += coef
    power = product.copy()
    for _ in range(degree - 1):
        power *= product
    return power


def _within(x: npt.NDArray[np.floating], degree: int, coef: float) -> float:
    """Mean of the kernel over all ordered pairs of different rows."""
    total = 0.0
    blocks = list(row_blocks(len(x)))
    for i, j in itertools.combinations_with_replacement(blocks, 2):
        block = _kernel(x[i], x[j], degree, coef)
        if i == j:
            np.fill_diagonal(block, 0.0)
        total += float(block.sum()) * (1 if i == j else 2)
    return total / (len(x) * (len(x) - 1))


@record
class KernelDistance:
    """KID: squared MMD, averaged over subsets."""

    value: float
    """Mean over the subsets; unbiased, so around 0 (also below) for equal distributions."""
    standard_deviation: float
    """Over the subsets."""
    standard_error: float | None
    """Of `value`; None when subsets share rows, for then they are not independent."""
    subsets: int
    subset_size: int


def kernel_distance(
    generated: npt.ArrayLike,
    reference: npt.ArrayLike,
    subset_size: int = 1000,
    subsets: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Kernel Inception Distance (Bińkowski et al. 2018): `squared_mmd`, degree 3, averaged over random subsets.

    By default the subsets are disjoint, as many as fit, at least 10 (smaller ones then, which changes the noise and not
    the expectation): their standard error is an honest one (the B-test of Zaremba et al. 2013). With `subsets`, that many
    are drawn, each without replacement but overlapping each other, as other implementations do (100 of 1,000).

    Args:
        generated: (n, d) features.
        reference: (m, d) features.
        subset_size: rows of either set in one subset, >= 2; at most min(n, m).
        subsets: None for disjoint ones.
        seed: of the subsets.
    """
    x, y = feature_matrix(generated, "generated"), feature_matrix(reference, "reference")
    _same_dimensions(x.shape[1], y.shape[1])
    rows, least = min(len(x), len(y)), 20 if subsets is None else 2
    size = min(subset_size, rows // 10) if subsets is None else min(subset_size, rows)
    if rows < least or size < 2 or (subsets is not None and subsets < 2):
        raise UserError(
            f"a kernel distance over {'disjoint' if subsets is None else subsets} subsets needs 2 subsets of 2 rows and at "
            f"least {least} rows in each set; there are {len(x)} and {len(y)}, and subset_size is {subset_size}"
        )
    rng = np.random.default_rng(seed)
    if subsets is None:
        parts = [rng.permutation(len(z))[: rows // size * size].reshape(-1, size) for z in (x, y)]
    else:
        parts = [np.stack([rng.choice(len(z), size, replace=False) for _ in range(subsets)]) for z in (x, y)]
    values = [squared_mmd(x[i], y[j]) for i, j in zip(*parts, strict=True)]
    deviation = float(np.std(values, ddof=1))
    return KernelDistance(
        value=float(np.mean(values)),
        standard_deviation=deviation,
        standard_error=deviation / len(values) ** 0.5 if subsets is None else None,
        subsets=len(values),
        subset_size=size,
    )
