"""Distances between two sets of image features: Fréchet distance (FD, "FID") and KID.

Features are the rows of an (n, d) matrix, one image a row, from one and the same fixed network; units are the network's.
Every figure depends on that network, on crop and intensity scale and, for the plain FD, strongly on n: for two samples of
the standard Gaussian with d = 512 it is about 132 at n = 1,000 and 26 at n = 5,000. Quote n with it, and the distance
between two halves of the real scans at the same n; compare generators by `squared_mmd`, which has no bias at any n.

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

F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class GaussianStats:
    """Count, mean and scatter of rows that stream by, in any order.

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
    covariances of less than full rank (n <= d, constant features) are as exact as others. MONAI's FIDMetric takes the
    root of the product, which is unstable there.

    Returns:
        Distance in squared feature units, >= 0. It is biased upwards at finite n; see the module's text.
    """
    _same_dimensions(first.dimensions, second.dimensions)
    root, other_root = _root_factor(first.covariance), _root_factor(second.covariance)
    overlap = np.linalg.svd(root.T @ other_root, compute_uv=False).sum() if root.size and other_root.size else 0.0
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return max(0.0, float(np.square(first.mean - second.mean).sum() + spread))


def frechet_of_rows(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Fréchet distance of two (n, d) sets of features; exact and quick also where d is far above n.

    Rows and their means span a space of n + m dimensions at most, and turning it changes no distance.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(x) + len(y) < x.shape[1]:
        both = np.concatenate([x, y])
        centre = both.mean(axis=0)
        basis = np.linalg.qr((both - centre).T)[0]
        x, y = (x - centre) @ basis, (y - centre) @ basis
    return frechet_distance(GaussianStats.of(x), GaussianStats.of(y))


def _root_factor(covariance: F64) -> F64:
    """(d, rank) matrix A with A Aᵀ = covariance; directions whose variance is rounding error are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _same_dimensions(first: int, second: int) -> None:
    if first != second:
        raise UserError(f"features of {first} and {second} dimensions do not compare; use one feature network")


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
