"""Do two sets of numbers have one distribution: voxel intensities by histogram, regional volumes by sample.

`IntensityHistogram` takes volumes one at a time and merges with those of other workers; it holds the same few megabytes
after 100,000 volumes as after one. Voxels of one head are not independent, so its intervals draw whole volumes again: each
volume enters replicate r with a weight drawn from Poisson(1), which is the bootstrap in the limit and needs no second pass
(the online bootstrap of Oza & Russell 2001; Chamandy et al. 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.metrics.intervals import ConfidenceInterval

F64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
_CHUNK = 1 << 16


@dataclass(slots=True, kw_only=True)
class IntensityHistogram:
    """Streaming histogram of voxel intensities over a dataset, with bootstrap replicates over its volumes."""

    low: float = 0.0
    high: float = 1.0
    """With `low`, the closed range of intensities; a value outside is refused."""
    bins: int = 1024
    """Equal bins; each is closed below, the last one above, too."""
    replicates: int = 200
    """Bootstrap replicates; 0 for none, and no intervals."""
    seed: int = 0
    """Of the weights. Histograms that merge must have one seed."""
    volumes: int = 0
    """Volumes so far."""
    counts: Counts = field(init=False)
    """(bins,) voxels per bin."""
    replicate_counts: Counts = field(init=False)
    """(replicates, bins) weighted voxels per bin."""

    def __post_init__(self) -> None:
        if not self.low < self.high or self.bins < 2 or self.replicates < 0:
            raise UserError(
                f"a histogram of {self.bins} bins over [{self.low}, {self.high}], {self.replicates} replicates"
            )
        self.counts = np.zeros(self.bins, np.int64)
        self.replicate_counts = np.zeros((self.replicates, self.bins), np.int64)

    def update(self, volume: npt.ArrayLike, row: int) -> None:
        """Add the voxels of one volume of any shape; `row`, >= 0, names it and seeds its weights: a row is added once.

        Raises:
            UserError: voxels are NaN or out of range; then nothing is added.
        """
        values = np.asarray(volume).ravel()
        if not values.size or not (values.min() >= self.low and values.max() <= self.high):
            raise UserError(
                f"the volume of row {row} has no voxels, NaN, or intensities outside [{self.low:g}, {self.high:g}]; scale "
                "it, or make the histogram wider"
            )
        found = np.zeros(self.bins, np.int64)
        for start in range(0, values.size, _CHUNK):
            scaled = values[start : start + _CHUNK].astype(np.float64) - self.low
            scaled *= self.bins / (self.high - self.low)
            found += np.bincount(np.minimum(scaled.astype(np.intp), self.bins - 1), minlength=self.bins)
        self.counts += found
        self.volumes += 1
        if self.replicates:
            weights = np.random.default_rng([self.seed, row]).poisson(1.0, self.replicates)
            self.replicate_counts += weights[:, None] * found

    def merge(self, other: IntensityHistogram) -> None:
        """Add the volumes that `other` saw. Raises UserError when its bins, replicates or seed differ."""
        _same_bins(self, other)
        if (self.replicates, self.seed) != (other.replicates, other.seed):
            raise UserError("histograms of different replicates or seeds cannot be merged")
        self.counts += other.counts
        self.replicate_counts += other.replicate_counts
        self.volumes += other.volumes

    @property
    def edges(self) -> F64:
        """(bins + 1,) edges of the bins, in the unit of the intensities."""
        return np.linspace(self.low, self.high, self.bins + 1)

    @property
    def density(self) -> F64:
        """(bins,) share of voxels per unit of intensity; it integrates to 1."""
        return _shares(self.counts) / ((self.high - self.low) / self.bins)


def _same_bins(first: IntensityHistogram, second: IntensityHistogram) -> None:
    if (first.low, first.high, first.bins) != (second.low, second.high, second.bins):
        raise UserError("histograms with different ranges or bins cannot be merged or compared; make both alike")


def _shares(counts: Counts) -> F64:
    total = counts.sum(axis=-1, keepdims=True)
    if not total.all():
        raise UserError("a histogram or one of its replicates is empty; add volumes (20 at least for an interval)")
    return np.asarray(counts / total)


def histogram_wasserstein(
    first: IntensityHistogram, second: IntensityHistogram, level: float = 0.95
) -> ConfidenceInterval:
    """Wasserstein-1 distance of two histograms, in the unit of the intensities, with a percentile bootstrap interval.

    ∫ |F₁ - F₂| (Vallender 1974), each voxel at its bin's middle: exact to one bin's width. One of
    the two may have no replicates: then it counts as fixed. Raises UserError when neither has any, or bins differ.
    """
    return _interval(first, second, level, lambda gap: np.abs(gap).sum(axis=-1) * (first.high - first.low) / first.bins)


def histogram_kolmogorov_smirnov(
    first: IntensityHistogram, second: IntensityHistogram, level: float = 0.95
) -> ConfidenceInterval:
    """Kolmogorov-Smirnov statistic of two histograms, max |F₁ - F₂| at the edges, in [0, 1]; interval as above.

    It has no p-value here: a million voxels make every difference significant.
    """
    return _interval(first, second, level, lambda gap: np.abs(gap).max(axis=-1))


def _interval(
    first: IntensityHistogram, second: IntensityHistogram, level: float, statistic: Callable[[F64], F64]
) -> ConfidenceInterval:
    _same_bins(first, second)
    if not 0 < level < 1:
        raise UserError(f"level = {level} must be in (0, 1)")
    used = min([h.replicates for h in (first, second) if h.replicates], default=0)
    if used < 2:
        raise UserError("an interval needs a histogram with replicates; make at least one with, say, 200")
    one, two = (_shares(h.replicate_counts[:used] if h.replicates else h.counts) for h in (first, second))
    # Shifted by one, for the same row has the same weight in replicate r of either when both have one seed.
    draws = statistic(np.cumsum(one - np.roll(two, 1, axis=0), axis=-1))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return ConfidenceInterval(
        value=float(statistic(np.cumsum(_shares(first.counts) - _shares(second.counts)))),
        low=float(low),
        high=float(high),
        standard_error=float(draws.std(ddof=1)),
        level=level,
        resamples=used,
        method="percentile",
    )


def wasserstein_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Wasserstein-1 distance ∫ |F₁ - F₂| of two samples of numbers, any lengths, in their unit (Vallender 1974)."""
    values, gap = _cdf_gap(first, second)
    return float(np.abs(gap[:-1]) @ np.diff(values))


def kolmogorov_smirnov(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kolmogorov-Smirnov statistic max |F₁ - F₂| of two samples of numbers, in [0, 1]."""
    return float(np.abs(_cdf_gap(first, second)[1]).max())


def cohens_d(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Standardised difference (mean of first - mean of second) / pooled standard deviation (Cohen 1988, section 2.5.1).

    By convention |d| below 0.2 is negligible, 0.2 small, 0.5 medium, 0.8 large. Hand it to `bootstrap_interval` for a CI.

    Raises:
        UserError: fewer than 2 values in a sample, NaN or Inf, or no variation at all.
    """
    a, b = _sample(first, 2), _sample(second, 2)
    within = float(np.square(a - a.mean()).sum() + np.square(b - b.mean()).sum())
    pooled = math.sqrt(within / (len(a) + len(b) - 2))
    if pooled <= 1e-12 * max(float(np.abs(a).max()), float(np.abs(b).max())):
        raise UserError("both samples are constant, so there is no standard deviation to divide by")
    return float(a.mean() - b.mean()) / pooled


def _cdf_gap(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[F64, F64]:
    """All values in order, and F₁ - F₂ from each (inclusive) to the next."""
    a, b = np.sort(_sample(first, 1)), np.sort(_sample(second, 1))
    values = np.sort(np.concatenate([a, b]))
    return values, np.searchsorted(a, values, "right") / len(a) - np.searchsorted(b, values, "right") / len(b)


def _sample(values: npt.ArrayLike, least: int) -> F64:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or len(sample) < least:
        raise UserError(f"a sample must be a list of at least {least} numbers, not of shape {sample.shape}")
    lost = int((~np.isfinite(sample)).sum())
    if lost:
        raise UserError(f"{lost} of {len(sample)} values are NaN or Inf; leave them out and say how many")
    return sample
