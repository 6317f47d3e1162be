"""Confidence intervals by the bootstrap (Efron & Tibshirani 1993), seeded, for any statistic; and by the jackknife.

The rows are what is drawn again, so they must be independent: subjects, or pairs of subjects, never voxels. A statistic
that cannot be negative (a distance between distributions) has an interval above 0 even when nothing differs: read it
beside the same statistic between two halves of the real data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtrit

from brainsynth.errors import UserError
from brainsynth.records import record

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Method = Literal["bca", "percentile", "jackknife"]
_JACKKNIFE_GROUPS = 1000


@record
class ConfidenceInterval:
    """A statistic and where it may lie, in its own unit."""

    value: float
    """On the samples as given."""
    low: float
    high: float
    standard_error: float
    """Standard deviation over the resamples, or the jackknife's."""
    level: float
    """Nominal coverage, in (0, 1)."""
    resamples: int
    method: Method


def bootstrap_interval(
    statistic: Callable[..., float],
    samples: Sequence[npt.ArrayLike],
    *,
    paired: bool = False,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ConfidenceInterval:
    """Interval of `statistic(*samples)`, with rows drawn with replacement.

    `percentile`: quantiles of the resampled statistic. `bca`: those quantiles corrected for bias and skewness, second-order
    correct (Efron 1987; chapter 14 of the book); its acceleration is a jackknife, over at most 1,000 groups of rows.

    Args:
        statistic: takes one array per sample, returns one number.
        samples: arrays of any shape, any dtype; rows are along axis 0, at least 2.
        paired: draw the same rows from every sample (pairs, or columns of one table); else each for itself.
        method: `bca`, or `percentile` where the statistic is slow or far from smooth.
        level: nominal coverage, in (0, 1).
        resamples: draws, >= 100.
        seed: the same seed gives the same interval.

    Raises:
        UserError: too few rows or resamples, unequal lengths of paired samples, or a statistic that is not finite.
    """
    arrays = [np.asarray(sample) for sample in samples]
    _check(arrays, paired, level, resamples)
    value = _finite(statistic(*arrays))
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        if paired:
            rows = rng.integers(0, len(arrays[0]), len(arrays[0]))
            drawn = [array[rows] for array in arrays]
        else:
            drawn = [array[rng.integers(0, len(array), len(array))] for array in arrays]
        draws[i] = _finite(statistic(*drawn))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, draws, value, _acceleration(statistic, arrays, paired))
    low, high = np.quantile(draws, tails)
    return ConfidenceInterval(
        value=value,
        low=float(low),
        high=float(high),
        standard_error=float(draws.std(ddof=1)),
        level=level,
        resamples=resamples,
        method=method,
    )


def jackknife_interval(
    statistic: Callable[..., float],
    samples: Sequence[npt.ArrayLike],
    *,
    groups: int = 20,
    level: float = 0.95,
    seed: int = 0,
    least: float = -math.inf,
) -> ConfidenceInterval:
    """Interval of `statistic(*samples)`, independent samples, from leaving out one group of rows after the other.

    For statistics whose bias depends on the number of different rows, such as distances between distributions: drawing rows
    again makes doubles and moves the whole bootstrap distribution upwards, leaving out a few rows hardly moves it. The
    variance is the sum over samples of (g - 1) / g Σ (θᵢ - θ̄)² (Shao & Tu 1995, section 2.3); the interval is
    θ ± t(g - 1) times its root, the statistic's own bias included. Between samples of one distribution it is too wide (the
    standard error of a Fréchet or kernel distance comes out 1.3 to 1.7 times too large), so a fault is not cried too soon.

    Args:
        statistic: takes one array per sample, returns one number; smooth in the rows.
        samples: arrays, rows along axis 0, at least 3.
        groups: of equal size (to one row) and random, at least 3; at most one per row.
        level: nominal coverage, in (0, 1).
        seed: of the groups.
        least: what the statistic can never be below, where the interval ends; 0 for a distance.
    """
    arrays = [np.asarray(sample) for sample in samples]
    _check(arrays, False, level, 100)
    if groups < 3 or min(map(len, arrays)) < 3:
        raise UserError(f"a jackknife needs 3 groups of rows, not {groups} of {[len(array) for array in arrays]} rows")
    value, variance, rng = _finite(statistic(*arrays)), 0.0, np.random.default_rng(seed)
    smallest = min(groups, *map(len, arrays))
    for which, array in enumerate(arrays):
        parts = np.array_split(rng.permutation(len(array)), smallest)
        left = ([*arrays[:which], np.delete(array, part, axis=0), *arrays[which + 1 :]] for part in parts)
        without = np.array([_finite(statistic(*some)) for some in left])
        variance += (smallest - 1) / smallest * float(np.square(without - without.mean()).sum())
    error = math.sqrt(variance)
    reach = float(stdtrit(smallest - 1, (1 + level) / 2)) * error
    return ConfidenceInterval(
        value=value,
        low=max(value - reach, least),
        high=value + reach,
        standard_error=error,
        level=level,
        resamples=smallest * len(arrays),
        method="jackknife",
    )


def mean_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Mean of first minus mean of second, in their unit: a statistic to hand to `bootstrap_interval`."""
    return float(np.mean(np.asarray(first, np.float64)) - np.mean(np.asarray(second, np.float64)))


def _check(arrays: list[Array], paired: bool, level: float, resamples: int) -> None:
    lengths = [len(array) if array.ndim else 0 for array in arrays]
    if not lengths or min(lengths) < 2:
        raise UserError(f"a bootstrap needs samples of at least 2 rows, not {lengths}")
    if paired and len(set(lengths)) > 1:
        raise UserError(f"paired samples must have the same number of rows, not {lengths}")
    if not 0 < level < 1 or resamples < 100:
        raise UserError(f"level = {level} must be in (0, 1) and resamples = {resamples} at least 100")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"the statistic is {value} on a resample; leave rows with NaN out before, and say how many")
    return float(value)


def _bca_tails(tails: F64, draws: F64, value: float, acceleration: float) -> F64:
    """Quantiles to read instead of `tails`: Φ(z₀ + (z₀ + z) / (1 - a (z₀ + z))), equation 14.10 of Efron & Tibshirani."""
    # Half of the ties count as below, and half a draw keeps z₀ finite when all lie on one side.
    below = float((draws < value).sum() + 0.5 * (draws == value).sum())
    bias = float(ndtri(np.clip(below, 0.5, len(draws) - 0.5) / len(draws)))
    shifted = bias + ndtri(tails)
    corrected: F64 = ndtr(bias + shifted / np.maximum(1 - acceleration * shifted, 1e-6))
    return corrected


def _acceleration(statistic: Callable[..., float], arrays: list[Array], paired: bool) -> float:
    """Skewness of the statistic's influence values, by the jackknife (equation 14.15), over all samples together.

    With several independent samples the cubes and squares of each are weighed by 1 / n³ and 1 / n² before they add up.
    """
    cubes = squares = 0.0
    for which in range(1 if paired else len(arrays)):
        groups = np.array_split(np.arange(len(arrays[which])), min(len(arrays[which]), _JACKKNIFE_GROUPS))
        without = np.empty(len(groups))
        for g, rows in enumerate(groups):
            left = [np.delete(a, rows, axis=0) if paired or i == which else a for i, a in enumerate(arrays)]
            without[g] = _finite(statistic(*left))
        influence = (len(groups) - 1) * (without.mean() - without)
        cubes += float((influence**3).sum()) / len(groups) ** 3
        squares += float((influence**2).sum()) / len(groups) ** 2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0
