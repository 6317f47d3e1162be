"""Precision, recall, density and coverage: a loop over all pairs, limits, planted faults, ties and blocks."""

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.metrics import manifold
from brainsynth.metrics.manifold import ManifoldMembership, manifold_membership


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def naive(reference: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()))

    def radius(rows: np.ndarray, i: int) -> float:
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    def within(d: float, r: float) -> bool:
        return d < r or d == 0

    real = [radius(reference, i) for i in range(len(reference))]
    made = [radius(generated, i) for i in range(len(generated))]
    pairs = [[distance(x, y) for y in generated] for x in reference]
    precision = np.mean([any(within(pairs[i][j], real[i]) for i in range(len(real))) for j in range(len(made))])
    recall = np.mean([any(within(pairs[i][j], made[j]) for j in range(len(made))) for i in range(len(real))])
    balls = [sum(within(pairs[i][j], real[i]) for i in range(len(real))) for j in range(len(made))]
    coverage = np.mean([any(within(pairs[i][j], real[i]) for j in range(len(made))) for i in range(len(real))])
    return float(precision), float(recall), float(np.mean(balls)) / k, float(coverage)


def figures(found: ManifoldMembership) -> tuple[float, float, float, float]:
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    ("d", "dtype", "offset"),
    [(3, np.float64, 0.0), (64, np.float32, 0.0), (8, np.float64, 1e4), (300, np.float16, 0.0)],
)
def test_it_is_a_loop_over_all_pairs(k, d, dtype, offset):
    x, y = gaussian(60, d, 0) + offset, gaussian(45, d, 1, 0.9, 0.1) + offset
    x, y = x.astype(dtype), y.astype(dtype)
    assert figures(manifold_membership(x, y, k)) == pytest.approx(naive(x, y, k), rel=1e-12)


def test_clusters_far_tighter_than_single_precision_can_tell():
    """Distances of 1e-5 at norms of 1e2: the float32 products alone would be noise."""
    centres = gaussian(4, 10, 2, 100.0)
    x = centres[np.arange(80) % 4] + 1e-5 * gaussian(80, 10, 3)
    y = centres[np.arange(60) % 4] + 1e-5 * gaussian(60, 10, 4)
    assert figures(manifold_membership(x, y, 3)) == pytest.approx(naive(x, y, 3), rel=1e-12)


def test_identical_sets_are_one():
    for x in (gaussian(200, 32, 5), gaussian(50, 600, 6).astype(np.float32), gaussian(100, 1, 7)):
        assert figures(manifold_membership(x, x.copy()[::-1], 5)) == (1.0, 1.0, 1.0, 1.0)


def test_disjoint_sets_are_zero():
    assert figures(manifold_membership(gaussian(100, 8, 8), gaussian(90, 8, 9) + 1000)) == (0.0, 0.0, 0.0, 0.0)


def test_constant_features_and_copies_have_an_answer():
    same = np.full((20, 3), 0.1)
    found = manifold_membership(same, same, 3)
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
    assert figures(manifold_membership(same, same + 1, 3)) == (0.0, 0.0, 0.0, 0.0)


def expected_coverage(reference_rows: int, generated_rows: int, k: int) -> float:
    """1 - Π_{i=1..k} (m - i) / (m + n - i) with m real and n generated rows (Naeem et al. 2020, lemma 2)."""
    steps = np.arange(1, k + 1)
    return float(1 - np.prod((reference_rows - steps) / (reference_rows + generated_rows - steps)))


def test_one_distribution_gives_density_one_and_the_expected_coverage():
    found = [manifold_membership(gaussian(150, 6, 20 + i), gaussian(200, 6, 90 + i), 5) for i in range(40)]
    for values, expected in (
        ([f.density for f in found], 1.0),
        ([f.coverage for f in found], expected_coverage(150, 200, 5)),
    ):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(len(values))


def test_mode_collapse_keeps_precision_and_loses_recall_and_coverage():
    real = gaussian(400, 6, 10)
    series = [manifold_membership(real, gaussian(400, 6, 11) * scale) for scale in (1.0, 0.7, 0.4, 0.1)]
    precision, recall, density, coverage = zip(*(figures(s) for s in series), strict=True)
    assert list(precision) == sorted(precision)
    assert list(density) == sorted(density)
    assert list(recall) == sorted(recall, reverse=True)
    assert list(coverage) == sorted(coverage, reverse=True)
    assert precision[-1] == 1
    assert recall[-1] < 0.1
    assert coverage[-1] < 0.3


def test_a_missing_group_shows_in_its_rows():
    """Real scans of two groups, generated images of one: covered are those of that group."""
    real = np.concatenate([gaussian(100, 5, 12), gaussian(100, 5, 13) + 20])
    found = manifold_membership(real, gaussian(200, 5, 14))
    assert found.reference_covered[:100].mean() > 0.9
    assert found.reference_covered[100:].sum() == 0
    assert found.reference_reached[100:].sum() == 0


def test_noise_loses_precision_and_an_outlier_misleads_precision_but_not_density():
    real, made = gaussian(400, 6, 15), gaussian(400, 6, 16)
    noise = gaussian(400, 6, 17)
    precision = [manifold_membership(real, made + s * noise).precision for s in (0.0, 0.7, 2.0, 6.0)]
    assert precision == sorted(precision, reverse=True)
    assert precision[-1] < 0.3
    outlier = np.concatenate([real, np.full((1, 6), 40.0)])
    away = gaussian(400, 6, 18) * 0.1 + 20
    assert manifold_membership(outlier, away).precision == 1
    assert manifold_membership(outlier, away).density < 0.25


def test_order_and_block_size_change_nothing(monkeypatch):
    x, y = gaussian(130, 20, 19).astype(np.float32), gaussian(110, 20, 20, 0.9).astype(np.float32)
    whole = manifold_membership(x, y, 4)
    order = np.random.default_rng(21).permutation(len(y))
    shuffled = manifold_membership(x[::-1], y[order], 4)
    assert figures(shuffled) == figures(whole)
    assert (shuffled.generated_realistic == whole.generated_realistic[order]).all()
    monkeypatch.setattr(manifold, "_ENTRIES", 700)
    monkeypatch.setattr(manifold, "_GATHERED", 64)
    blocked = manifold_membership(x, y, 4)
    assert (blocked.real_balls == whole.real_balls).all()
    assert (blocked.reference_reached == whole.reference_reached).all()
    assert (blocked.reference_covered == whole.reference_covered).all()


def test_what_cannot_be_compared_is_refused():
    x = gaussian(10, 4, 0)
    with pytest.raises(UserError, match="columns"):
        manifold_membership(x, gaussian(10, 5, 0))
    with pytest.raises(UserError, match="more than k"):
        manifold_membership(x, x[:5], 5)
    bad = x.copy()
    bad[0, 0] = np.inf
    with pytest.raises(UserError, match="1 of 10 rows of the generated"):
        manifold_membership(x, bad)
