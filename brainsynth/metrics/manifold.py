"""Is each generated image realistic, is each real one covered: precision, recall, density, coverage in feature space.

The manifold of a set is the union of balls around its rows, each reaching to the row's k-th nearest other row. Precision
and recall: Kynkäänniemi et al. 2019 (there k = 3). Density and coverage, which one outlier cannot spoil: Naeem et al. 2020
(there k = 5). All depend on k and on both set sizes: compare at equal sizes, and with two halves of the real scans.

A row is in a ball when its distance is below the radius, or 0: so identical sets score 1, and copies need no special case.
Products are float32; every decision that float32 cannot make is made again in float64 from the differences, so results
are those of a float64 loop over all pairs. Memory: one float32 copy of either set and blocks of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError

Features = npt.NDArray[np.floating]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_ENTRIES = 1 << 22
"""Pairs per block."""
_GATHERED = 1 << 21
"""Numbers per gathered block of exact differences."""


def feature_matrix(values: npt.ArrayLike, name: str) -> npt.NDArray[np.floating]:
    """`values` as an (n, d) floating matrix, not copied when it is one. Raises UserError on shape, type, NaN and Inf."""
    matrix = np.asarray(values)
    if matrix.dtype.kind in "iub":
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.dtype.kind != "f":
        raise UserError(f"{name} features must be a filled (n, d) matrix of numbers, not {matrix.dtype} {matrix.shape}")
    lost = sum(int((~np.isfinite(matrix[rows])).any(axis=1).sum()) for rows in row_blocks(len(matrix)))
    if lost:
        raise UserError(
            f"{lost} of {len(matrix)} rows of the {name} features have NaN or Inf; leave them out and report how many"
        )
    return matrix


def row_blocks(n: int, size: int = 2048) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows that cover n rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifoldMembership:
    """Row by row, who is in whose manifold: average any part of it, a sex or an age band, for the metric of that part."""

    k: int
    generated_realistic: Flags
    """(n,) whether a generated row is in some real ball."""
    real_balls: npt.NDArray[np.int64]
    """(n,) how many real balls hold a generated row."""
    reference_reached: Flags
    """(m,) whether a real row is in some generated ball."""
    reference_covered: Flags
    """(m,) whether a real row's ball holds some generated row."""

    @property
    def precision(self) -> float:
        """Share of generated rows in the real manifold, in [0, 1]: fidelity (Kynkäänniemi et al. 2019, equation 2)."""
        return float(self.generated_realistic.mean())

    @property
    def recall(self) -> float:
        """Share of real rows in the generated manifold, in [0, 1]: diversity (Kynkäänniemi et al. 2019, equation 2)."""
        return float(self.reference_reached.mean())

    @property
    def density(self) -> float:
        """Mean number of real balls around a generated row, over k; 1 is expected for equal distributions, and there is no
        upper bound (Naeem et al. 2020, equation 4). Few rows are in very many balls, so it is noisy where d is large."""
        return float(self.real_balls.mean()) / self.k

    @property
    def coverage(self) -> float:
        """Share of real balls with a generated row, in [0, 1] (Naeem et al. 2020, equation 6)."""
        return float(self.reference_covered.mean())


def manifold_membership(reference: npt.ArrayLike, generated: npt.ArrayLike, k: int = 5) -> ManifoldMembership:
    """Compare (n, d) generated with (m, d) reference features; time n² + m² + n m.

    Args:
        reference: features of real scans, m > k rows.
        generated: features of generated images from the same network, n > k rows.
        k: neighbours that set a radius, >= 1; 3 for the published precision and recall, 5 for density and coverage.

    Raises:
        UserError: too few rows, different widths, NaN or Inf.
    """
    real, made = feature_matrix(reference, "reference"), feature_matrix(generated, "generated")
    if real.shape[1] != made.shape[1]:
        raise UserError(f"reference features have {real.shape[1]} columns and generated ones {made.shape[1]}")
    if k < 1 or min(len(real), len(made)) <= k:
        raise UserError(f"k = {k} neighbours need more than k >= 1 rows in each set, not {len(real)} and {len(made)}")
    centre = real.mean(axis=0, dtype=np.float64)
    real_near, made_near = _Rounded.of(real, centre), _Rounded.of(made, centre)
    real_radii, made_radii = _squared_radii(real, real_near, k), _squared_radii(made, made_near, k)
    balls, realistic = np.zeros(len(made), np.int64), np.zeros(len(made), bool)
    reached, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, squared, margin in _distance_blocks(real_near, made_near):
        inside = _inside(real, made, rows, squared, margin, real_radii[rows, None])
        balls += inside.sum(axis=0)
        realistic |= inside.any(axis=0)
        covered[rows] = inside.any(axis=1)
        reached[rows] = _inside(real, made, rows, squared, margin, made_radii[None, :]).any(axis=1)
    return ManifoldMembership(
        k=k, generated_realistic=realistic, real_balls=balls, reference_reached=reached, reference_covered=covered
    )


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Centred rows in float32, and their squared norms."""

    rows: F32
    squares: F32

    @classmethod
    def of(cls, features: Features, centre: F64) -> _Rounded:
        rows = np.empty(features.shape, np.float32)
        for part in row_blocks(len(features)):
            rows[part] = features[part] - centre
        return cls(rows, np.einsum("ij,ij->i", rows, rows))


def _distance_blocks(first: _Rounded, second: _Rounded) -> Iterator[tuple[slice, F32, F32]]:
    """Per block of first's rows: float32 squared distances to all of second's, and a bound on their error.

    ‖x‖² + ‖y‖² - 2 x·y loses what ‖x‖² + ‖y‖² rounds to; the sums of d products add √d roundings (random, not all one
    way), and so do centring and rounding the rows themselves.
    """
    step = max(1, _ENTRIES // len(second.rows))
    unit = np.float32((4 + np.sqrt(first.rows.shape[1])) * np.finfo(np.float32).eps)
    for start in range(0, len(first.rows), step):
        rows = slice(start, min(start + step, len(first.rows)))
        squared = first.squares[rows, None] + second.squares
        margin = squared * unit
        squared -= 2 * (first.rows[rows] @ second.rows.T)
        yield rows, squared, margin


def _squared_radii(features: Features, near: _Rounded, k: int) -> F64:
    """(n,) exact squared distance of each row to its k-th nearest other row."""
    radii = np.empty(len(features))
    for rows, squared, margin in _distance_blocks(near, near):
        count = squared.shape[0]
        squared[np.arange(count), np.arange(rows.start, rows.stop)] = np.inf
        reach = np.partition(squared + margin, k - 1, axis=1)[:, k - 1]
        i, j = np.nonzero(squared - margin <= reach[:, None])
        exact = _exact_squares(features, features, i + rows.start, j)
        order = np.lexsort((exact, i))
        first = np.searchsorted(i, np.arange(count))
        radii[rows] = exact[order][first + k - 1]
    return radii


def _inside(
    first: Features, second: Features, rows: slice, squared: F32, margin: F32, radii: npt.NDArray[np.float64]
) -> Flags:
    """Which pairs of a block are nearer than a squared radius, given per row (b, 1) or per column (1, n)."""
    bound = radii.astype(np.float32)
    inside: Flags = squared < bound
    # Rounding the radius to float32 moves it by less than an ulp: one more margin than the distance's own.
    i, j = np.nonzero(np.abs(squared - bound) <= margin + bound * np.float32(2.0**-23))
    if len(i):
        exact = _exact_squares(first, second, i + rows.start, j)
        limit = np.broadcast_to(radii, squared.shape)[i, j]
        inside[i, j] = (exact < limit) | (exact == 0)
    return inside


def _exact_squares(first: Features, second: Features, i: npt.NDArray[np.int64], j: npt.NDArray[np.int64]) -> F64:
    """Squared distances of the pairs (i, j) from float64 differences: the same bits for a pair wherever it is asked."""
    out = np.empty(len(i))
    step = max(1, _GATHERED // first.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = first[i[part]].astype(np.float64) - second[j[part]]
        out[part] = np.square(difference, out=difference).sum(axis=1)
    return out
