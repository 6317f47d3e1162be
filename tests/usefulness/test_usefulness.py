"""Usefulness on a toy anatomy whose truth is known: a dark ball in a bright one, its radius is the covariate."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from brainsynth.config.evaluation import UsefulnessConfig
from brainsynth.errors import UserError
from brainsynth.records import from_dict, to_dict
from brainsynth.usefulness.arms import UsefulnessResult, run_usefulness
from brainsynth.usefulness.scores import METRICS, estimates, outcome_of, per_seed

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = UsefulnessConfig(steps=60, seeds=(0, 1), learning_rate=1e-2)


@cache
def balls(n: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(N, 16, 16, 16) volumes and their labels for each task."""
    rng = np.random.default_rng(seed)
    axis, radius = np.linspace(-1, 1, 16), rng.uniform(0.2, 0.6, n)
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    inner = distance[None] < radius[:, None, None, None]
    volumes = 0.8 * (distance < 0.9)[None] - 0.5 * inner + 0.05 * rng.standard_normal((n, 16, 16, 16))
    labels = {"continuous": 20 + 100 * radius, "binary": (radius > 0.4).astype(int), "segmentation": inner}
    return volumes.astype(np.float32), labels


@cache
def result(task: Any, useless: bool) -> UsefulnessResult:
    (made, made_labels), (train, train_labels), (test, test_labels) = balls(48, 1), balls(48, 2), balls(30, 3)
    labels = made_labels[task]
    if useless:
        rng = np.random.default_rng(0)
        labels = rng.random(labels.shape) < 0.05 if task == "segmentation" else rng.permutation(labels)
    return run_usefulness(task, made, labels, train, train_labels[task], test, test_labels[task], CONFIG)


def mean(found: UsefulnessResult, arm: str, metric: str) -> float:
    return next(a for a in found.arms if a.name == arm).metrics[metric].mean


def test_age_good_synthetic_is_near_real_and_useless_is_at_chance() -> None:
    good, bad = result("continuous", False), result("continuous", True)
    chance = good.chance["mae"]
    assert mean(good, "real", "mae") < 0.4 * chance
    assert mean(good, "synthetic", "mae") < 0.5 * chance
    assert mean(bad, "synthetic", "mae") > 0.85 * chance
    assert mean(bad, "real", "mae") == mean(good, "real", "mae")  # the same training


@pytest.mark.slow
def test_sex_good_synthetic_is_near_real_and_useless_is_at_chance() -> None:
    good, bad = result("binary", False), result("binary", True)
    assert mean(good, "real", "auc") > 0.95
    assert mean(good, "synthetic", "auc") > 0.95
    assert mean(good, "synthetic", "balanced_accuracy") > 0.8
    assert abs(mean(bad, "synthetic", "balanced_accuracy") - 0.5) < 0.15


@pytest.mark.slow
def test_segmentation_good_synthetic_is_near_real_and_useless_is_not() -> None:
    good, bad = result("segmentation", False), result("segmentation", True)
    assert mean(good, "real", "dice") > 0.8
    assert mean(good, "synthetic", "dice") > 0.8
    assert mean(good, "synthetic", "volume_r") > 0.9
    assert mean(bad, "synthetic", "dice") < 0.4
    assert good.chance == {"dice": 0.0, "volume_r": 0.0}


def test_the_record_says_what_was_done() -> None:
    found = result("continuous", True)
    assert [(arm.name, arm.n_real, arm.n_synthetic) for arm in found.arms] == [
        ("real", 48, 0),
        ("synthetic", 0, 48),
        ("few_real", 12, 0),
        ("few_real_and_synthetic", 12, 48),
    ]
    assert (found.n_test, found.n_test_people, found.config) == (30, 30, CONFIG)
    loss = next(d for d in found.differences if (d.first, d.minus) == ("synthetic", "real")).metrics["mae"]
    assert loss.mean == pytest.approx(mean(found, "synthetic", "mae") - mean(found, "real", "mae"))
    assert 0 < loss.people_low < loss.mean < loss.people_high
    assert from_dict(UsefulnessResult, to_dict(found), "test") == found


def test_the_same_seeds_give_the_same_result_and_leave_torch_alone() -> None:
    volumes, labels = balls(40, 4)
    config = UsefulnessConfig(steps=10, batch_size=4, seeds=(3, 5))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, two = (
        run_usefulness("continuous", volumes, labels["continuous"], volumes, labels["continuous"],
                       volumes[:20], lambda v: balls(40, 4)[1]["continuous"][: len(v)], config)
        for _ in range(2)
    )  # fmt: skip
    assert one == two
    assert torch.rand(1) == expected
    assert len(set(one.arms[0].metrics["mae"].per_seed)) == 2


def test_intervals_over_seeds_are_students() -> None:
    values = np.array([[3.0, 0.1], [4.0, 0.2], [5.0, 0.3]])
    found = estimates(METRICS["continuous"], values, np.repeat(values, 10, 0))
    assert (found["mae"].low, found["mae"].high) == pytest.approx((4 - 4.302653 / 3**0.5, 4 + 4.302653 / 3**0.5))
    wide = np.array([[0.2, 0.0], [0.9, 1.0]])
    assert estimates(METRICS["binary"], wide, wide)["auc"].low == 0
    assert estimates(METRICS["binary"], wide, wide, clip=False)["auc"].low < 0


def test_metrics_by_hand() -> None:
    truth = np.zeros((2, 2, 2, 2), np.float32)
    truth[0, 0] = 1
    odds = np.full(truth.shape, -1, np.float32)
    odds[0, 0, 0] = 1  # half of the four voxels; the empty one left empty
    assert outcome_of("segmentation", odds, truth).tolist() == [[pytest.approx(2 / 3), 2, 4], [1, 0, 0]]
    answers, sexes = np.array([2.0, 1.0, -1.0, -2.0], np.float32), np.array([1, 0, 1, 0], np.float32)
    assert per_seed("binary", [outcome_of("binary", answers, sexes)]).tolist() == [[0.75, 0.5]]


def test_few_are_whole_people_spread_over_the_labels() -> None:
    volumes, labels = balls(48, 2)
    people = np.repeat(np.arange(48), 2)
    doubled, ages = np.repeat(volumes, 2, 0), np.repeat(labels["continuous"], 2)
    config = UsefulnessConfig(steps=10, batch_size=4, seeds=(0, 1))
    found = run_usefulness(
        "continuous", volumes, labels["continuous"], doubled, ages, *(b[:10] for b in (doubled, ages)), config,
        real_train_groups=people, real_test_groups=np.arange(100, 110),
    )  # fmt: skip
    assert found.arms[2].n_real == 24


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"real_test_groups": np.arange(40, 70)}, "8 people are in training and test, 40"),
        ({"synthetic_labels": np.zeros(47)}, "do not fit"),
        ({"synthetic_labels": np.full(48, np.nan)}, "not finite"),
        ({"real_test_labels": np.zeros(30)}, "all real test labels"),
        ({"task": "age"}, "must be one of"),
        ({"task": "binary"}, "must be 0 and 1"),
        ({"synthetic": balls(48, 1)[0][:, 1:]}, "one grid"),
        ({"synthetic": np.zeros((48, 16, 16, 16), np.float32)}, "blank"),
        ({"config": UsefulnessConfig(batch_size=16)}, "64 real training people"),
    ],
)
def test_unfit_input_is_refused(change: dict[str, Any], word: str) -> None:
    (made, a), (train, b), (test, c) = balls(48, 1), balls(48, 2), balls(30, 3)
    arguments = {
        "task": "continuous",
        "synthetic": made,
        "synthetic_labels": a["continuous"],
        "real_train": train,
        "real_train_labels": b["continuous"],
        "real_test": test,
        "real_test_labels": c["continuous"],
        "config": UsefulnessConfig(steps=10),
        "real_train_groups": np.arange(48),
        "real_test_groups": np.arange(100, 130),
    }
    with pytest.raises(UserError, match=word):
        run_usefulness(**(arguments | change))


def test_budgets_that_make_no_sense_are_refused() -> None:
    for wrong in ({"seeds": (1,)}, {"seeds": (1, 1)}, {"few_fraction": 1.0}, {"steps": 1}):
        with pytest.raises(ValueError, match="must be|are needed"):
            UsefulnessConfig(**wrong)
