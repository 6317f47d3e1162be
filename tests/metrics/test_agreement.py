"""Agreement and discrimination: closed forms, naive counts, and coverage of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.metrics.agreement import agreement, auc_of, discrimination
from brainsynth.records import from_dict, to_dict


def pairs(n: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.normal(50, 10, n)
    return 0.5 * true + 30 + rng.normal(0, noise, n), true


def test_values_are_those_of_the_definitions() -> None:
    m, t = pairs(40, 0)
    found = agreement(m, t)
    assert found.n == found.n_groups == 40
    assert found.r == pytest.approx(np.corrcoef(m, t)[0, 1], abs=1e-12)
    assert found.mae == pytest.approx(np.abs(m - t).mean(), abs=1e-12)
    assert found.slope == pytest.approx(np.polyfit(t, m, 1)[0], abs=1e-12)
    assert found.bias == pytest.approx((m - t).mean(), abs=1e-12)
    low, high = (math.tanh(math.atanh(found.r) + side * 1.959964 / math.sqrt(37)) for side in (-1, 1))
    assert (found.r_low, found.r_high) == pytest.approx((low, high))


def test_perfect_agreement_has_intervals_without_width() -> None:
    t = np.arange(10.0) * 1e6
    found = agreement(t, t)
    assert (found.r, found.mae, found.bias) == (pytest.approx(1), 0, 0)
    assert (found.slope_low, found.slope_high) == (pytest.approx(1), pytest.approx(1))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = np.zeros(3)
    for seed in range(100):
        m, t = pairs(60, seed + 10, noise=5.0)
        found = agreement(m, t, seed=seed)
        r = 5 / math.sqrt(50)
        inside += [found.r_low <= r <= found.r_high, found.slope_low <= 0.5 <= found.slope_high,
                   found.bias_low <= 5.0 <= found.bias_high]  # fmt: skip
    assert (inside >= 87).all()
    assert (inside <= 100).all()


def test_rows_of_one_person_do_not_narrow_an_interval() -> None:
    m, t = pairs(30, 2, noise=5.0)
    once, people = agreement(m, t), np.repeat(np.arange(30), 4)
    copied = agreement(np.repeat(m, 4), np.repeat(t, 4), groups=people)
    wrong = agreement(np.repeat(m, 4), np.repeat(t, 4))
    assert (copied.n, copied.n_groups) == (120, 30)
    for low, high in (("r_low", "r_high"), ("mae_low", "mae_high"), ("slope_low", "slope_high")):
        width = getattr(once, high) - getattr(once, low)
        assert getattr(copied, high) - getattr(copied, low) == pytest.approx(width, rel=0.1)
        assert getattr(wrong, high) - getattr(wrong, low) < 0.6 * width


def test_records_survive_json() -> None:
    m, t = pairs(20, 3)
    for found in (agreement(m, t), discrimination(m, t > 50)):
        assert from_dict(type(found), to_dict(found), "test") == found


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(4)
    score, positive = np.round(rng.normal(size=50), 1), rng.random(50) < 0.4  # with ties
    naive = np.mean([(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]])
    assert auc_of(score, positive) == pytest.approx(naive, abs=1e-12)
    assert discrimination(score, positive).auc == pytest.approx(naive, abs=1e-12)


def test_auc_interval_is_delongs() -> None:
    rng = np.random.default_rng(5)
    positive = np.arange(80) < 30
    score = rng.normal(size=80) + positive
    found = discrimination(score, positive, threshold=0.5)
    placed = (score[positive][:, None] > score[~positive]).astype(float)
    error = math.sqrt(placed.mean(1).var(ddof=1) / 30 + placed.mean(0).var(ddof=1) / 50)
    a = placed.mean()
    ends = [1 / (1 + math.exp(-(math.log(a / (1 - a)) + s * error / (a * (1 - a))))) for s in (-1.959964, 1.959964)]
    assert (found.auc_low, found.auc_high) == pytest.approx(ends, abs=1e-9)
    right = (score >= 0.5) == positive
    assert found.balanced_accuracy == pytest.approx((right[positive].mean() + right[~positive].mean()) / 2)
    assert found.balanced_accuracy_low < found.balanced_accuracy < found.balanced_accuracy_high


def test_people_not_scans_carry_the_auc_interval() -> None:
    rng = np.random.default_rng(6)
    positive = np.arange(40) < 20
    score = rng.normal(size=40) + positive
    once = discrimination(score, positive)
    copied = discrimination(np.repeat(score, 3), np.repeat(positive, 3), groups=np.repeat(np.arange(40), 3))
    assert copied.auc == pytest.approx(once.auc)
    assert copied.auc_high - copied.auc_low == pytest.approx(once.auc_high - once.auc_low, rel=0.05)


def test_complete_separation_is_not_certainty() -> None:
    found = discrimination(np.arange(20.0), np.arange(20) >= 10, threshold=9.5)
    assert (found.auc, found.auc_high, found.balanced_accuracy) == (1, 1, 1)
    assert found.auc_low == pytest.approx(0.025**0.1)


@pytest.mark.parametrize(
    ("measured", "true", "word"),
    [
        ([1, 2, 3], [1, 2, 3], "at least 4"),
        ([1, 2, 3, 4], [1, 2, 3], "same length"),
        ([1, 2, 3, np.nan], [1, 2, 3, 4], "not finite"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "all the same|the same"),
    ],
)
def test_unusable_pairs_are_refused(measured: list[float], true: list[float], word: str) -> None:
    with pytest.raises(UserError, match=word):
        agreement(measured, true)


def test_unusable_categories_and_groups_are_refused() -> None:
    with pytest.raises(UserError, match="0 and 1"):
        discrimination([1, 2, 3, 4], [0, 1, 2, 1])
    with pytest.raises(UserError, match="0 and 1"):
        discrimination([1, 2, 3, 4], [0, 0, 0, 1])
    with pytest.raises(UserError, match="groups"):
        agreement([1, 2, 3, 5], [1, 2, 3, 4], groups=[1, 1, 2, 3])
    with pytest.raises(UserError, match="both categories"):
        auc_of([1, 2], [1, 1])
