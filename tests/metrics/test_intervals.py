"""Bootstrap intervals: SciPy's, known coverage, pairs of sets, seeds and refusals."""

import numpy as np
import pytest
from scipy import stats

from brainsynth.errors import UserError
from brainsynth.metrics.frechet import GaussianStats, frechet_distance
from brainsynth.metrics.intervals import bootstrap_interval, jackknife_interval


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean(first) - np.mean(second))


def test_a_normal_mean_has_the_textbook_interval():
    x = np.random.default_rng(0).normal(10, 2, 400)
    half = 1.96 * x.std(ddof=1) / 20
    for method in ("bca", "percentile"):
        found = bootstrap_interval(np.mean, [x], method=method, resamples=4000)
        assert found.value == x.mean()
        assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
        assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)
        assert found.standard_error == pytest.approx(half / 1.96, rel=0.1)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("paired", [True, False])
def test_it_is_the_interval_of_scipy(method, paired):
    """Skewed data, where the correction matters; the same method with other random numbers."""
    rng = np.random.default_rng(1)
    x = rng.lognormal(0, 1, 60)
    y = 0.5 * x + rng.lognormal(0, 0.5, 60) if paired else rng.lognormal(0.2, 1, 35)

    def statistic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if paired else float(np.mean(a) / np.mean(b))

    reference = stats.bootstrap(
        (x, y),
        statistic,
        n_resamples=6000,
        paired=paired,
        vectorized=False,
        method=method,
        rng=np.random.default_rng(2),
    )
    found = bootstrap_interval(statistic, [x, y], paired=paired, method=method, resamples=6000)
    expected = reference.confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.15 * reference.standard_error)
    assert found.high == pytest.approx(expected.high, abs=0.25 * reference.standard_error)


def test_a_biased_statistic_is_corrected_as_scipy_does():
    x = np.random.default_rng(6).exponential(1, 12)
    found = bootstrap_interval(np.std, [x], resamples=20_000)
    expected = stats.bootstrap((x,), np.std, n_resamples=20_000, method="BCa", rng=np.random.default_rng(7))
    plain = bootstrap_interval(np.std, [x], resamples=20_000, method="percentile")
    interval = expected.confidence_interval
    assert found.low == pytest.approx(interval.low, abs=0.05 * (found.high - found.low))
    assert found.high == pytest.approx(interval.high, abs=0.05 * (found.high - found.low))
    assert found.low > plain.low + 0.05 * (found.high - found.low)


@pytest.mark.slow
def test_it_covers_as_often_as_it_says():
    rng = np.random.default_rng(3)
    found = [
        bootstrap_interval(
            mean_difference, [rng.exponential(1.0, 40), rng.exponential(1.0, 40)], level=0.9, resamples=300
        )
        for _ in range(150)
    ]
    assert 0.8 < np.mean([f.low <= 0 <= f.high for f in found]) < 0.98


def test_pairing_removes_what_pairs_share():
    rng = np.random.default_rng(4)
    subject = rng.normal(0, 10, 100)
    x, y = subject + rng.normal(0, 1, 100) + 1, subject + rng.normal(0, 1, 100)
    together = bootstrap_interval(mean_difference, [x, y], paired=True, resamples=500)
    apart = bootstrap_interval(mean_difference, [x, y], resamples=500)
    assert together.low > 0
    assert together.high - together.low < 0.3 * (apart.high - apart.low)


def test_rows_of_matrices_and_seeds():
    """Rows may be anything."""
    x = np.random.default_rng(5).exponential(size=(2500, 2))

    def ratio(rows: np.ndarray) -> float:
        return float(rows[:, 0].mean() / rows[:, 1].mean())

    found = bootstrap_interval(ratio, [x], resamples=300, seed=1)
    assert found == bootstrap_interval(ratio, [x], resamples=300, seed=1)
    assert found != bootstrap_interval(ratio, [x], resamples=300, seed=2)
    assert found.low < found.value < found.high


def test_a_statistic_without_variation_is_a_point():
    found = bootstrap_interval(np.mean, [np.ones(10)], resamples=100)
    assert (found.low, found.value, found.high, found.standard_error) == (1.0, 1.0, 1.0, 0.0)


def test_where_bca_is_not_defined_the_percentiles_are_given():
    """No resample of the maximum lies above it."""
    x = np.arange(50.0)
    found = bootstrap_interval(np.ptp, [x], resamples=200)
    assert np.isfinite([found.low, found.high]).all()
    assert found.low <= found.high <= found.value
    assert bootstrap_interval(np.min, [np.zeros(30)], resamples=100).method == "percentile"


def test_what_has_no_interval_is_refused():
    x = np.arange(10.0)
    with pytest.raises(UserError, match="at least 2 rows"):
        bootstrap_interval(np.mean, [x[:1]])
    with pytest.raises(UserError, match="same number of rows"):
        bootstrap_interval(mean_difference, [x, x[:5]], paired=True)
    with pytest.raises(UserError, match="level"):
        bootstrap_interval(np.mean, [x], level=95)
    with pytest.raises(UserError, match="statistic is nan"):
        bootstrap_interval(np.mean, [np.array([1.0, np.nan])])


def test_the_jackknife_of_a_mean_is_the_textbook_standard_error():
    """Leaving out one row at a time: exactly s / √n, and for a difference of means the root of both squares."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(3, 2, 40), rng.normal(1, 1, 40)
    found = jackknife_interval(np.mean, [x], groups=40)
    assert found.standard_error == pytest.approx(x.std(ddof=1) / 40**0.5, rel=1e-9)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 39) * found.standard_error, rel=1e-9)
    both = jackknife_interval(mean_difference, [x, y], groups=40)
    assert both.standard_error == pytest.approx(((x.var(ddof=1) + y.var(ddof=1)) / 40) ** 0.5, rel=1e-9)


def test_the_jackknife_of_a_distance_is_near_its_spread_over_samples_and_never_below():
    def draw(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.normal(0, 1, (60, 4)), rng.normal(0.4, 1.3, (60, 4))]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(GaussianStats.of(a), GaussianStats.of(b))

    spread = np.std([distance(*draw(seed)) for seed in range(200)])
    errors = [jackknife_interval(distance, draw(seed)).standard_error for seed in range(20)]
    assert 0.9 * spread < np.mean(errors) < 1.6 * spread


def test_the_jackknife_refuses_too_few_rows():
    with pytest.raises(UserError, match="3 groups of rows"):
        jackknife_interval(np.mean, [np.arange(2.0)])
