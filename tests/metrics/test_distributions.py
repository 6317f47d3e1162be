"""Histograms that stream and merge, distances between distributions against SciPy and closed forms, and refusals."""

import numpy as np
import pytest
from scipy import stats

from brainsynth.errors import UserError
from brainsynth.metrics.distributions import (
    IntensityHistogram,
    cohens_d,
    histogram_kolmogorov_smirnov,
    histogram_wasserstein,
    kolmogorov_smirnov,
    wasserstein_distance,
)
from brainsynth.metrics.intervals import bootstrap_interval


def volumes(n: int, seed: int, shift: float = 0.0) -> list[np.ndarray]:
    """Each with a level of its own: voxels of one volume are not independent."""
    rng = np.random.default_rng(seed)
    return [
        np.clip(rng.normal(0.4 + shift + rng.normal(0, 0.05), 0.1, (6, 7, 8)), 0, 1).astype(np.float32)
        for _ in range(n)
    ]


def histogram(found: list[np.ndarray], start: int = 0, **settings: int) -> IntensityHistogram:
    made = IntensityHistogram(**settings)
    for row, volume in enumerate(found, start=start):
        made.update(volume, row)
    return made


def test_it_counts_every_voxel_where_numpy_does():
    found = volumes(5, 0)
    made = histogram(found, bins=50)
    expected, edges = np.histogram(np.concatenate([v.ravel() for v in found]).astype(np.float64), 50, (0, 1))
    assert (made.counts == expected).all()
    assert (made.edges == edges).all()
    assert (made.density * np.diff(edges)).sum() == pytest.approx(1)
    assert made.volumes == 5


def test_borders_belong_to_one_bin():
    made = IntensityHistogram(bins=4, replicates=0)
    made.update(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 0)
    assert made.counts.tolist() == [1, 1, 1, 2]


def test_merging_in_any_order_is_counting_at_once():
    found = volumes(12, 1)
    whole = histogram(found)
    parts = [histogram(found[i : i + 4], start=i) for i in (8, 0, 4)]
    merged = IntensityHistogram()
    for part in parts:
        merged.merge(part)
    assert (merged.counts == whole.counts).all()
    assert (merged.replicate_counts == whole.replicate_counts).all()
    assert merged.volumes == 12


def test_wasserstein_of_samples():
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1, 300), rng.exponential(2, 171)
    assert wasserstein_distance(x, y) == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-12)
    assert wasserstein_distance(x, x + 0.7) == pytest.approx(0.7, rel=1e-12)
    assert wasserstein_distance(x, x[::-1]) == 0
    assert wasserstein_distance([0.0, 1.0], [5.0]) == 4.5
    assert wasserstein_distance(np.zeros(3), np.zeros(4)) == 0


def test_kolmogorov_smirnov_of_samples_with_ties():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 9, 200) / 4, rng.integers(1, 9, 150) / 4
    assert kolmogorov_smirnov(x, y) == pytest.approx(stats.ks_2samp(x, y).statistic, rel=1e-12)
    assert kolmogorov_smirnov(x, x) == 0
    assert kolmogorov_smirnov([1.0, 2.0], [3.0]) == 1


def test_cohens_d_of_known_numbers():
    assert cohens_d([2.0, 4.0, 6.0], [1.0, 3.0, 5.0]) == pytest.approx(0.5)
    rng = np.random.default_rng(4)
    x, y = rng.normal(1.5, 3, 100_000), rng.normal(0, 3, 50_000)
    assert cohens_d(x, y) == pytest.approx(0.5, abs=0.02)
    assert cohens_d(y, x) == -cohens_d(x, y)
    found = bootstrap_interval(cohens_d, [x[:200], y[:200]], resamples=400)
    assert found.low < 0.5 < found.high
    assert found.low > 0


def test_wasserstein_of_histograms_is_that_of_the_voxels_to_a_bin():
    one, two = volumes(8, 5), volumes(9, 6, 0.07)
    found = histogram_wasserstein(histogram(one), histogram(two))
    x, y = (np.concatenate([v.ravel() for v in part]) for part in (one, two))
    assert found.value == pytest.approx(stats.wasserstein_distance(x, y), abs=1 / 1024)
    steps = histogram_kolmogorov_smirnov(histogram(one), histogram(two))
    assert steps.value == pytest.approx(stats.ks_2samp(x, y).statistic, abs=0.01)
    shifted = IntensityHistogram(bins=100), IntensityHistogram(bins=100)
    shifted[0].update(np.full(10, 0.205), 0)
    shifted[1].update(np.full(10, 0.505), 0)
    gap = np.cumsum(shifted[0].density - shifted[1].density) / 100
    assert np.abs(gap).sum() / 100 == pytest.approx(0.3)


def test_intervals_see_volumes_and_not_voxels():
    """The Poisson bootstrap against whole volumes drawn again: the width is that of 40 volumes, not of 13,440 voxels."""
    one, two = volumes(40, 7), volumes(40, 8, 0.2)
    found = histogram_wasserstein(histogram(one, replicates=600), histogram(two, replicates=600))
    x, y = (np.stack([v.ravel() for v in part]) for part in (one, two))
    expected = bootstrap_interval(
        lambda a, b: wasserstein_distance(a.ravel(), b.ravel()), [x, y], method="percentile", resamples=500
    )
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.15 * width)
    assert found.high == pytest.approx(expected.high, abs=0.15 * width)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.15)
    assert found.low < 0.2 < found.high
    fixed = histogram_wasserstein(histogram(one, replicates=600), histogram(two, replicates=0))
    assert 0.5 * width < fixed.high - fixed.low < width
    assert fixed.value == found.value


def test_one_seed_for_both_does_not_tie_their_replicates():
    """The same rows have the same weights in both: without care, a set would have no distance at all from itself."""
    found = volumes(30, 11)
    one, two = histogram(found), histogram(volumes(30, 12))
    own, other = histogram_wasserstein(one, one), histogram_wasserstein(one, histogram(found, seed=1))
    assert own.value == other.value == 0
    assert own.high == pytest.approx(other.high, rel=0.3)
    assert histogram_wasserstein(one, two).high > own.high / 2


def test_distances_grow_with_a_shift():
    base = histogram(volumes(10, 9))
    found = [histogram(volumes(10, 9, s)) for s in (0.0, 0.05, 0.1, 0.3)]
    for distance in (histogram_wasserstein, histogram_kolmogorov_smirnov):
        values = [distance(base, other).value for other in found]
        assert values == sorted(values)
        assert values[0] == 0


def test_memory_stays_what_it_was():
    made = IntensityHistogram(bins=64, replicates=20)
    before = made.counts.nbytes + made.replicate_counts.nbytes
    for row, volume in enumerate(volumes(50, 10)):
        made.update(volume, row)
    assert made.counts.nbytes + made.replicate_counts.nbytes == before


def test_what_is_no_intensity_is_refused_and_nothing_is_added():
    made = IntensityHistogram()
    for bad in (np.array([0.5, np.nan]), np.array([1.5]), np.array([-0.1]), np.array([])):
        with pytest.raises(UserError, match="row 3"):
            made.update(bad, 3)
    assert made.volumes == made.counts.sum() == made.replicate_counts.sum() == 0
    with pytest.raises(UserError, match="empty"):
        histogram_wasserstein(made, made)
    with pytest.raises(UserError, match="ranges or bins"):
        made.merge(IntensityHistogram(bins=10))
    with pytest.raises(UserError, match="replicates or seeds"):
        made.merge(IntensityHistogram(seed=1))
    with pytest.raises(UserError, match="with replicates"):
        histogram_wasserstein(histogram(volumes(2, 0), replicates=0), histogram(volumes(2, 1), replicates=0))
    with pytest.raises(UserError, match="bins"):
        IntensityHistogram(low=1.0, high=0.0)


def test_samples_without_an_answer_are_refused():
    for statistic in (wasserstein_distance, kolmogorov_smirnov, cohens_d):
        with pytest.raises(UserError, match="1 of 3 values"):
            statistic([1.0, np.nan, 2.0], [1.0, 2.0])
        with pytest.raises(UserError, match="list of at least"):
            statistic(np.zeros((2, 2)), [1.0, 2.0])
    with pytest.raises(UserError, match="constant"):
        cohens_d(np.ones(5), np.full(5, 2.0))
