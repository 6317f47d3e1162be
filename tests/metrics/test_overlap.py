"""Dice against MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice
from torch.nn import functional

from brainsynth.metrics.overlap import dice


def test_it_is_monais_dice() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (9, 8, 7)).astype(np.uint8)
    made = np.where(rng.random(truth.shape) < 0.4, rng.integers(0, 6, truth.shape), truth).astype(np.uint8)
    one_hot = [functional.one_hot(torch.from_numpy(m).long(), 6).movedim(-1, 0)[None] for m in (made, truth)]
    wanted = compute_dice(*one_hot, include_background=False)[0].numpy()
    np.testing.assert_allclose(dice(made, truth, (1, 2, 3, 4, 5)), wanted, rtol=1e-6)


def test_a_label_that_neither_map_has_has_no_dice_and_one_that_only_one_has_is_0() -> None:
    first, second = np.array([0, 3, 3, 7], np.uint8), np.array([0, 3, 5, 7], np.uint8)
    scores = dice(first, second, (3, 5, 7, 200))
    assert scores[:3].tolist() == pytest.approx([2 / 3, 0.0, 1.0])
    assert np.isnan(scores[3])
    with pytest.raises(ValueError, match="cannot be compared"):
        dice(first, second[:3], (3,))
