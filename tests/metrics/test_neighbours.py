"""Nearest neighbours: a loop over all pairs, ties, copies, rows that single precision cannot tell, and whose scan it is."""

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.metrics import neighbours
from brainsynth.metrics.neighbours import nearest_neighbours, nearest_subjects


def gaussian(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def loop(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.array([[np.linalg.norm(q.astype(np.float64) - r) for r in references] for q in queries])
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, 1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_QUERIES", 7)
    monkeypatch.setattr(neighbours, "_REFERENCES", 11)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("k", "d", "offset"), [(1, 3, 0.0), (5, 40, 0.0), (5, 8, 1e3), (50, 4, 0.0)])
def test_it_is_a_loop_over_all_pairs(k, d, offset):
    queries, references = gaussian(30, d, 0) + offset, gaussian(50, d, 1) + offset
    found = nearest_neighbours(queries, references, k)
    indices, distances = loop(queries, references, k)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


def test_one_block_or_many(small_blocks):
    queries, references = gaussian(40, 16, 2), gaussian(60, 16, 3)
    many = nearest_neighbours(queries, references, 6)
    neighbours._QUERIES = neighbours._REFERENCES = 1000
    one = nearest_neighbours(queries, references, 6)
    np.testing.assert_array_equal(many.indices, one.indices)
    np.testing.assert_array_equal(many.distances, one.distances)


def test_exact_copies_have_distance_0_and_ties_go_to_the_lower_index(small_blocks):
    references = np.repeat(gaussian(3, 64, 4) * 100, 20, axis=0)
    found = nearest_neighbours(references[[45]], references, 15)
    assert (found.distances == 0).all()
    assert found.indices[0].tolist() == list(range(40, 55))


def test_far_from_the_origin_and_tighter_than_single_precision_can_tell():
    rng = np.random.default_rng(5)
    references = np.concatenate([1e4 + 1e-3 * rng.standard_normal((80, 6)), rng.standard_normal((5, 6))])
    queries = 1e4 + 1e-3 * rng.standard_normal((10, 6))
    found = nearest_neighbours(queries, references, 3)
    np.testing.assert_array_equal(found.indices, loop(queries, references, 3)[0])


def naive_subjects(views, references, subjects, k, own):
    out = []
    for i, query in enumerate(views):
        best = {}
        for scan, subject in zip(references, subjects, strict=True):
            if subject != own[i]:
                near = min(np.linalg.norm(v.astype(np.float64) - scan) for v in query)
                best[subject] = min(near, best.get(subject, np.inf))
        out.append(sorted((d, s) for s, d in best.items())[:k])
    return [[s for _, s in row] for row in out], [[d for d, _ in row] for row in out]


@pytest.mark.parametrize("leave_out", [True, False])
def test_a_subject_is_as_near_as_the_nearest_scan_to_any_view(leave_out):
    rng = np.random.default_rng(6)
    references = gaussian(40, 5, 7)
    subjects = rng.integers(0, 9, 40)
    subjects[:12] = 3  # one person was scanned often
    views = rng.standard_normal((25, 2, 5)).astype(np.float32)
    own = rng.integers(0, 9, 25) if leave_out else np.full(25, -1)
    found = nearest_subjects(views, references, subjects, 4, own if leave_out else None)
    who, far = naive_subjects(views, references, subjects, 4, own)
    assert found.indices.tolist() == who
    np.testing.assert_allclose(found.distances, far, rtol=1e-12)


def test_mistakes_are_explained():
    rows = gaussian(5, 3, 8)
    with pytest.raises(UserError, match="ask for 1 to 5"):
        nearest_neighbours(rows, rows, 6)
    with pytest.raises(UserError, match="columns"):
        nearest_neighbours(rows[:, :2], rows, 1)
    with pytest.raises(UserError, match="NaN"):
        nearest_neighbours(np.full((1, 3), np.nan), rows, 1)
    with pytest.raises(UserError, match="need 3 subjects"):
        nearest_subjects(rows[:, None], rows, [0, 0, 1, 1, 1], 2, [0, 0, 1, 1, 1])
