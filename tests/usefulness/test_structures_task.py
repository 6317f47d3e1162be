"""Segmenting all structures of label maps, on toy anatomy with sides: two halves of a ball in a bright one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from brainsynth.config.evaluation import UsefulnessConfig
from brainsynth.errors import UserError
from brainsynth.labels import Label, LabelTable
from brainsynth.records import from_dict, to_dict
from brainsynth.usefulness.arms import UsefulnessResult, run_usefulness
from brainsynth.usefulness.budgeted_training import Source, TrainingBudget, _augmented, _boxes, train_and_predict
from brainsynth.usefulness.scores import estimates, metrics_of, outcome_of, per_seed
from brainsynth.usefulness.structures import Structures, shared_structures

pytestmark = pytest.mark.usefixtures("one_thread")


def table(*names: str, first: int = 1) -> LabelTable:
    return LabelTable(labels=tuple(Label(index=i, name=n) for i, n in enumerate(names, first)), source="test")


SIDES = shared_structures({"toy": table("Left-Ventricle", "Right-Ventricle", "Tissue")})
CONFIG = UsefulnessConfig(steps=10, seeds=(0, 1), batch_size=4, box_xyz=(16, 16, 8))


@cache
def heads(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 16, 16, 16) volumes and classes: two halves of a dark ball in a bright one."""
    rng = np.random.default_rng(seed)
    axis, radius = np.linspace(-1, 1, 16), rng.uniform(0.4, 0.7, n)[:, None, None, None]
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)[None]
    left = np.broadcast_to((axis < 0)[:, None, None], distance.shape)
    classes = np.where(distance < radius, np.where(left, 1, 2), np.where(distance < 0.95, 3, 0)).astype(np.uint8)
    volumes = np.array([0.0, 0.4, 0.4, 0.9])[classes] + 0.03 * rng.standard_normal((n, 16, 16, 16))
    return volumes.astype(np.float32), classes


def test_the_tests_own_pairs_teach_and_shuffled_labels_do_not() -> None:
    volumes, truth = heads(12, 2)
    budget, scores = TrainingBudget(60, 4, 3e-2, 1e-2, (16, 16, 8)), []
    for labels in (truth, np.roll(truth, 8, (1, 2))):
        source = Source(volumes, labels)
        answer = train_and_predict("structures", [source], volumes, budget, 0, torch.device("cpu"), SIDES)
        scores.append(outcome_of("structures", answer, truth, SIDES).mean(0))
    assert (scores[0] > 0.8).all()  # left and right included, though half of the volumes were mirrored
    assert scores[1][0] < 0.4


def test_all_arms() -> None:
    (train, known), (test, truth) = heads(24, 1), heads(12, 2)
    found = run_usefulness("structures", train, known, train, known, test, truth, CONFIG, structures=SIDES)
    assert all(tuple(arm.metrics) == metrics_of("structures", SIDES) for arm in found.arms)
    assert found.config.box_xyz == (16, 16, 8)
    assert set(found.chance.values()) == {0.0}
    assert from_dict(UsefulnessResult, to_dict(found), "test") == found


def test_mirrored_structures_change_sides_and_nothing_is_mirrored_without_another_side() -> None:
    one_sided = shared_structures({"toy": table("Left-Ventricle", "Both", "Tissue")})
    assert one_sided.mirror is None
    for structures, seen in ((SIDES, {0.2, 0.5}), (one_sided, {0.2})):
        known = heads(32, 3)[1]
        drawn = np.array([0.0, 0.2, 0.5, 0.9], np.float32)[known]
        images, classes = _augmented((drawn, known), np.random.default_rng(0), structures)
        assert {round(float(x[k == 1].mean()), 1) for x, k in zip(images, classes, strict=True)} == seen
        assert np.flatnonzero((classes == 1).any((0, 2, 3))).max() <= 8  # left stays left; shifted by at most a voxel


def test_boxes_are_of_one_place_in_volume_and_labels() -> None:
    numbers = np.arange(2 * 16**3, dtype=np.float32).reshape(2, 16, 16, 16)
    image, known = _boxes((numbers, numbers + 1), (4, 99, 8), np.random.default_rng(0))
    assert image.shape == (2, 4, 16, 8)
    np.testing.assert_array_equal(known, image + 1)
    assert _boxes((numbers, np.zeros(2)), (4, 4, 4), np.random.default_rng(0))[0] is numbers  # one number each


def test_metrics_by_hand() -> None:
    truth = np.zeros((2, 2, 2, 2), np.uint8)
    truth[0, 0], truth[0, 1, 0], truth[1, 0] = 1, 3, 1
    answer = truth.copy()
    answer[0, 0, 0] = 2  # half of the left one goes to the right; nothing of the second volume's
    answer[1, 1] = 2
    found = outcome_of("structures", answer, truth, SIDES)
    assert metrics_of("structures", SIDES) == (
        "dice", "dice_all_ventricles", "dice_left_ventricle", "dice_right_ventricle", "dice_tissue"
    )  # fmt: skip
    np.testing.assert_allclose(found[0], [(2 / 3 + 1) / 2, 1, 2 / 3, np.nan, 1])
    np.testing.assert_allclose(found[1], [1, 2 * 4 / (8 + 4), 1, np.nan, np.nan])
    seeds = per_seed("structures", [found, found])
    known = estimates(metrics_of("structures", SIDES), seeds, seeds)
    assert "dice_right_ventricle" not in known  # no test volume has one
    assert known["dice_tissue"].mean == 1
    assert known["dice"].mean == pytest.approx((5 / 6 + 1) / 2)


def test_ventricles_are_those_that_the_names_say() -> None:
    names = ("Left-Inf-Lat-Vent", "3rd-Ventricle", "Left-VentralDC", "Ventricles", "Preventricular")
    found = Structures(names=tuple(label.key for label in table(*names).labels), mirror=None)
    assert found.ventricles == (1, 2, 4)
    other = Structures(names=("thalamus",), mirror=None)
    assert metrics_of("structures", other) == ("dice", "dice_thalamus")
    assert outcome_of("structures", *np.ones((2, 1, 2, 2, 2), np.uint8), other).tolist() == [[1, 1]]


def test_tables_may_differ_in_integers_and_order_but_not_in_structures() -> None:
    mine, other = table("Thalamus", "Caudate"), table("caudate", "thalamus", first=7)
    found = shared_structures({"dataset: a": mine, "reference: b": other})
    assert found.names == ("thalamus", "caudate")
    assert found.classes(other)[[0, 1, 7, 8]].tolist() == [0, 0, 2, 1]
    for tables, message in (
        ({"dataset: a": mine, "reference: b": None}, "reference: b has no label maps; generate it with labels: true"),
        (
            {"dataset: a": mine, "reference: b": table("Thalamus", "Putamen")},
            "of reference: b have other structures than those of dataset: a: it lacks caudate and also has putamen; make",
        ),
        ({"a": mine, "b": table("Thalamus")}, "it lacks caudate; make both with one labeller"),
    ):
        with pytest.raises(UserError, match=message):
            shared_structures(tables)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"structures": None}, "needs `structures`"),
        ({"task": "segmentation"}, "needs `structures`"),
        ({"synthetic_labels": heads(24, 1)[1][:9]}, "do not fit volumes"),
        ({"real_test_groups": np.arange(12)}, "12 people are in training and test"),
    ],
)
def test_unfit_input_is_refused(change: dict[str, Any], word: str) -> None:
    (train, known), (test, truth) = heads(24, 1), heads(12, 2)
    arguments = {
        "task": "structures",
        "synthetic": train,
        "synthetic_labels": known,
        "real_train": train,
        "real_train_labels": known,
        "real_test": test,
        "real_test_labels": truth,
        "config": CONFIG,
        "structures": SIDES,
        "real_train_groups": np.arange(24),
        "real_test_groups": np.arange(100, 112),
    }
    with pytest.raises(UserError, match=word):
        run_usefulness(**(arguments | change))


def test_a_box_must_hold_something() -> None:
    with pytest.raises(ValueError, match="box_xyz must be at least 8 voxels"):
        UsefulnessConfig(box_xyz=(48, 48, 4))
    assert "box_xyz" not in to_dict(UsefulnessConfig())  # older records keep their digests
