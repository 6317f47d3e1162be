"""The standardised difference of two samples; other distances of samples are SciPy's (`scipy.stats`)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError

F64 = npt.NDArray[np.float64]


def cohens_d(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Standardised difference (mean of first - mean of second) / pooled standard deviation (Cohen 1988, section 2.5.1).

    By convention |d| below 0.2 is negligible, 0.2 small, 0.5 medium, 0.8 large. Hand it to `bootstrap_interval` for a CI.

    Raises:
        UserError: fewer than 2 values in a sample, NaN or Inf, or no variation at all.
    """
    a, b = _sample(first), _sample(second)
    within = float(np.square(a - a.mean()).sum() + np.square(b - b.mean()).sum())
    pooled = math.sqrt(within / (len(a) + len(b) - 2))
    if pooled <= 1e-12 * max(float(np.abs(a).max()), float(np.abs(b).max())):
        raise UserError("both samples are constant, so there is no standard deviation to divide by")
    return float(a.mean() - b.mean()) / pooled


def _sample(values: npt.ArrayLike) -> F64:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise UserError(f"a sample must be a list of at least 2 numbers, not of shape {sample.shape}")
    lost = int((~np.isfinite(sample)).sum())
    if lost:
        raise UserError(f"{lost} of {len(sample)} values are NaN or Inf; leave them out and report how many")
    return sample
