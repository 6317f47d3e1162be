"""Membership inference against its control, and covariates that replay a participant."""

import math

import numpy as np
import pytest

from brainsynth.audit.disclosure import (
    area_under_curve,
    covariate_replay,
    membership_inference,
    membership_scores,
    true_positive_rate,
)
from brainsynth.errors import UserError


def rows(n: int, seed: int, d: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_the_area_is_a_count_of_pairs():
    members, others = np.array([1.0, 2, 2, 5]), np.array([2.0, 3, 0])
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert area_under_curve(members, others) == pytest.approx(np.mean(pairs))


def test_the_true_positive_rate_allows_one_in_a_hundred():
    others = np.arange(200.0)
    # 1 % of 200 are two: the threshold is the third lowest, and strictly below it are the members counted.
    assert true_positive_rate(np.array([-1.0, 1.5, 2.0, 50.0]), others) == 0.5


@pytest.mark.parametrize(("leak", "passes"), [(0.0, True), (0.7, False)])
def test_a_generator_that_leans_on_its_members_is_caught(leak, passes):
    people = rows(120, 0)
    noise = rows(300, 1)
    generated = noise if not leak else leak * people[np.arange(300) % 60] + math.sqrt(1 - leak**2) * noise
    scores = membership_scores(people[:, None], np.arange(120), generated)
    found = membership_inference(scores[:60], scores[60:], resamples=400)
    assert found.passed is passes
    assert found.auc.low < found.auc.value < found.auc.high
    assert found.control_auc_low < 0.5 < found.control_auc_high
    assert (found.auc.value > found.control_auc_high) is not passes
    assert found.tpr_at_1_percent_fpr > 0.3 or passes


def test_the_control_has_the_promised_size():
    """Members and non-members of one kind: it may fail about one dataset in twenty at that level."""
    rng = np.random.default_rng(2)
    failed = [
        not membership_inference(rng.standard_normal(30), rng.standard_normal(25), resamples=100, level=0.05).passed
        for _ in range(80)
    ]
    assert sum(failed) <= 12


def test_scores_use_the_nearest_view_and_nobody_is_their_own_neighbour():
    people, generated = rows(20, 3), rows(5, 4)
    views = np.stack([people, -people], 1)
    generated[0] = -people[7]
    scores = membership_scores(views, np.arange(20), generated)
    assert scores.argmin() == 7
    assert np.isfinite(scores).all()


def test_too_few_people():
    with pytest.raises(UserError, match="10 non-members"):
        membership_inference(np.arange(20.0), np.arange(9.0))
    with pytest.raises(UserError, match="finite"):
        membership_inference(np.full(20, np.nan), np.arange(20.0))


def people(n: int, seed: int) -> list[tuple[object, ...]]:
    rng = np.random.default_rng(seed)
    return [
        (round(float(rng.uniform(20, 80)), 2), "MF"[rng.integers(2)], round(float(rng.normal(30, 9)), 3))
        for _ in range(n)
    ]


def test_replayed_participants_are_counted():
    training, held_out, fresh = people(60, 5), people(60, 6), people(200, 7)
    clean = covariate_replay(fresh, training, held_out, (2, None, 3))
    assert (clean.rows_equal_to_training, clean.passed) == (0, True)
    # Written with more digits than participants have: still the same person.
    replayed = [(age + 0.001, sex, ml - 0.0002) for age, sex, ml in training[:10]] * 2
    found = covariate_replay(fresh + replayed, training, held_out, (2, None, 3))
    assert (found.rows_equal_to_training, found.training_tuples_replayed, found.held_out_tuples_hit) == (20, 10, 0)
    assert not found.passed


def test_coarse_covariates_coincide_without_replay():
    rng = np.random.default_rng(8)

    def coarse(n: int) -> list[tuple[object, ...]]:
        return [(int(rng.integers(20, 80)), "MF"[rng.integers(2)]) for _ in range(n)]

    found = covariate_replay(coarse(500), coarse(100), coarse(100), (0, None))
    assert found.rows_equal_to_training > 100
    assert found.passed


def test_missing_values_equal_missing_values():
    found = covariate_replay(
        [(math.nan, "F"), (None, "M"), (-0.0, "")], [(None, "F"), (0.0, None)], [(50.0, "F")], (1, None)
    )
    assert found.rows_equal_to_training == 2


def test_rows_of_another_length_and_no_reference():
    with pytest.raises(UserError, match="where 2 are declared"):
        covariate_replay([(1.0,)], [(1.0, 2.0)], [(1.0, 3.0)], (1, 1))
    with pytest.raises(UserError, match="held-out people"):
        covariate_replay([(1.0,)], [(1.0,)], [], (1,))
