"""Confidence intervals by the bootstrap (Efron & Tibshirani 1993), seeded, for any statistic; and by the jackknife.

The rows are what is drawn again, so they must be independent: subjects, or pairs of subjects, never voxels. A statistic
that cannot be negative (a distance between distributions) has an interval above 0 even when nothing differs: compare it
with the same statistic between two halves of the real data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.stats
from scipy.special import stdtrit

from brainsynth.errors import UserError
from brainsynth.records import record

Array = npt.NDArray[Any]
Method = Literal["bca", "percentile", "jackknife"]
_BATCH = 64
"""Resamples in memory at a time."""


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

    @property
    def figure(self) -> tuple[float, float, float]:
        """Value, low and high."""
        return self.value, self.low, self.high


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
    correct (Efron 1987; chapter 14 of the book). Both are SciPy's; where BCa is not defined, the percentiles are taken.

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

    def of_rows(*rows: npt.NDArray[Any]) -> float:
        each = rows * len(arrays) if paired else rows
        return _finite(statistic(*(array[i.astype(np.intp)] for array, i in zip(arrays, each, strict=True))))

    # SciPy draws along the last axis of numbers only, so it draws indices: then rows may be of any shape and dtype.
    indices = [np.arange(len(array)) for array in (arrays[:1] if paired else arrays)]
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        drawn = scipy.stats.bootstrap(
            indices,
            of_rows,
            n_resamples=resamples,
            batch=_BATCH if len(indices) == 1 else 1,  # of several samples, larger batches draw other numbers
            vectorized=False,
            confidence_level=level,
            method=method,
            rng=np.random.default_rng(seed),
        )
    low, high = drawn.confidence_interval
    if not math.isfinite(low + high):  # BCa has no answer where all resamples are on one side of the value, or equal it
        method = "percentile"
        low, high = np.quantile(drawn.bootstrap_distribution, ((1 - level) / 2, (1 + level) / 2))
    return ConfidenceInterval(
        value=value, low=float(low), high=float(high), standard_error=float(drawn.standard_error),
        level=level, resamples=resamples, method=method,
    )  # fmt: skip


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
    standard error of a Fréchet or kernel distance comes out 1.3 to 1.7 times too large): no fault is reported too soon.

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
        raise UserError(f"the statistic is {value} on a resample; leave rows with NaN out before, and report how many")
    return float(value)
