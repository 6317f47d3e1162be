"""Fréchet distance and KID: closed forms, batches, small n, and what they say about planted faults."""

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.metrics.frechet import GaussianStats, frechet_distance, squared_mmd


def of_moments(mean: np.ndarray, covariance: np.ndarray, count: int = 1000) -> GaussianStats:
    stats = GaussianStats(len(mean))
    stats.count, stats.mean, stats.scatter = count, mean, covariance * (count - 1)
    return stats


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_covariances_that_commute_have_a_closed_form():
    rng = np.random.default_rng(0)
    d = 40
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a, b, shift = rng.uniform(0.1, 9, d), rng.uniform(0.1, 9, d), rng.normal(size=d)
    found = frechet_distance(of_moments(np.zeros(d), turn * a @ turn.T), of_moments(shift, turn * b @ turn.T))
    assert found == pytest.approx(shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-10)


def test_two_by_two_covariances_that_do_not_commute():
    """tr (S T)^½ = sqrt(tr(S T) + 2 sqrt(det(S T))) in two dimensions, by Cayley and Hamilton."""
    s, t = np.array([[4.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    found = frechet_distance(of_moments(np.zeros(2), s), of_moments(np.array([3.0, 4.0]), t))
    assert found == pytest.approx(25 + np.trace(s + t) - 2 * root, rel=1e-10)


def test_a_matrix_with_a_known_root():
    """(S T)^½ for S = I is the ordinary root of T, whose eigenvalues are known."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    values = np.logspace(-8, 3, 64)
    found = frechet_distance(of_moments(np.zeros(64), np.eye(64)), of_moments(np.zeros(64), basis * values @ basis.T))
    assert found == pytest.approx(np.square(1 - np.sqrt(values)).sum(), rel=1e-8)


def test_equal_sets_are_at_distance_zero_also_with_fewer_rows_than_features():
    for n in (400, 30, 2):
        stats = GaussianStats.of(gaussian(n, 100, 2))
        assert frechet_distance(stats, stats) <= 1e-10 * np.trace(stats.covariance)


def test_fewer_rows_than_features_against_the_factors():
    """tr (S T)^½ is the nuclear norm of X Yᵀ for centred data X, Y: no covariance needed."""
    x, y = gaussian(20, 200, 3), gaussian(30, 200, 4, 2.0, 0.5)
    xc, yc = x - x.mean(0), y - y.mean(0)
    root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt(19 * 29)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (xc**2).sum() / 19 + (yc**2).sum() / 29 - 2 * root
    assert frechet_distance(GaussianStats.of(x), GaussianStats.of(y)) == pytest.approx(expected, rel=1e-9)


def test_constant_features_count_by_their_means_only():
    x, y = np.full((5, 7), 2.0), np.full((9, 7), 3.0)
    assert frechet_distance(GaussianStats.of(x), GaussianStats.of(y)) == pytest.approx(7)
    half = gaussian(50, 7, 5)
    half[:, 3:] = 1.0
    assert frechet_distance(GaussianStats.of(half), GaussianStats.of(half)) == pytest.approx(0, abs=1e-12)


def test_batches_and_order_change_nothing_even_far_from_zero():
    x = gaussian(5000, 16, 6, scale=0.01, shift=1000.0)
    whole = GaussianStats.of(x)
    assert whole.covariance == pytest.approx(np.cov(x, rowvar=False), rel=1e-9, abs=1e-15)
    batches = np.array_split(np.random.default_rng(7).permutation(5000), 36)
    forwards, backwards = GaussianStats(16), GaussianStats(16)
    for batch in batches:
        forwards.update(x[batch])
    for batch in batches[::-1]:
        backwards.update(x[batch])
    size = np.abs(whole.covariance).max()
    for stats in (forwards, backwards):
        assert stats.count == 5000
        assert np.abs(stats.mean / whole.mean - 1).max() < 1e-12
        assert np.abs(stats.covariance - whole.covariance).max() < 1e-10 * size


def test_single_precision_input_is_summed_in_double():
    x = gaussian(3000, 8, 8, shift=100.0).astype(np.float32)
    assert GaussianStats.of(x).covariance == pytest.approx(
        np.cov(x.astype(np.float64), rowvar=False), rel=1e-9, abs=1e-12
    )


def naive_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_mmd_is_that_of_a_loop_and_blocks_change_nothing(monkeypatch):
    x, y = gaussian(37, 6, 13), gaussian(23, 6, 14, 1.2, 0.3)
    expected = naive_mmd(x, y)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-10)
    blocks = [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 40)]
    monkeypatch.setattr("brainsynth.metrics.frechet.row_blocks", lambda n: [b for b in blocks if b.start < n])
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-10)


def test_mmd_of_known_gaussians():
    """E k for x ~ N(a, I), y ~ N(b, I), k = (x·y + 1)³ with d = 1: from the moments of x y."""

    def expected_kernel(a: float, b: float) -> float:
        one, two, three = (lambda m: m), (lambda m: m**2 + 1), (lambda m: m**3 + 3 * m)
        return three(a) * three(b) + 3 * two(a) * two(b) + 3 * one(a) * one(b) + 1

    true = expected_kernel(0, 0) + expected_kernel(1, 1) - 2 * expected_kernel(0, 1)
    found = [squared_mmd(gaussian(500, 1, 100 + i), gaussian(500, 1, 300 + i, shift=1.0)) for i in range(40)]
    error = np.std(found, ddof=1) / np.sqrt(40)
    assert abs(np.mean(found) - true) < 4 * error
    assert error < 0.1 * true


def test_kid_is_zero_on_average_for_one_distribution():
    found = [squared_mmd(gaussian(400, 16, 100 + i), gaussian(500, 16, 300 + i)) for i in range(60)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.mark.parametrize("fault", ["shift", "noise", "collapse"])
def test_both_grow_with_a_fault(fault):
    real = gaussian(600, 12, 19)

    def made(strength: float) -> np.ndarray:
        x = gaussian(600, 12, 20)
        if fault == "shift":
            return x + strength
        if fault == "noise":
            return x + strength * gaussian(600, 12, 21)
        return x * (1 - 0.5 * strength)

    series = [made(s) for s in (0.0, 0.4, 0.8, 1.6)]
    distances = [frechet_distance(GaussianStats.of(x), GaussianStats.of(real)) for x in series]
    kernels = [squared_mmd(x, real) for x in series]
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]
    assert kernels == sorted(kernels)


def test_what_cannot_be_compared_is_refused():
    bad = gaussian(10, 4, 0)
    bad[3, 2] = np.nan
    stats = GaussianStats.of(gaussian(10, 4, 0))
    with pytest.raises(UserError, match="1 of 10 rows"):
        stats.update(bad)
    assert stats.count == 10
    with pytest.raises(UserError, match="1 of 10 rows"):
        squared_mmd(bad, bad)
    with pytest.raises(UserError, match="4 and 5 dimensions"):
        frechet_distance(stats, GaussianStats.of(gaussian(10, 5, 0)))
    with pytest.raises(UserError, match="at least 2 rows"):
        frechet_distance(stats, GaussianStats.of(gaussian(1, 4, 0)))
    for wrong in (np.zeros(4), np.zeros((0, 4)), np.array([["a"]])):
        with pytest.raises(UserError, match="matrix of numbers"):
            GaussianStats.of(wrong)
    with pytest.raises(UserError, match="at least 2 rows in each set"):
        squared_mmd(gaussian(1, 4, 0), gaussian(10, 4, 0))
