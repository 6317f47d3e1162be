"""The classifier two-sample test on toy volumes: one distribution is at chance, another texture is found, nobody leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from brainsynth.config.evaluation import TwoSampleConfig
from brainsynth.evaluation.two_sample import accuracy
from tests.usefulness.test_usefulness import balls

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS, CPU = TwoSampleConfig(folds=3, steps=40, learning_rate=1e-2), torch.device("cpu")


def test_two_samples_of_one_distribution_are_not_distinguished() -> None:
    found = accuracy((balls(48, 1)[0], balls(48, 2)[0]), (np.arange(48), np.arange(48)), OPTIONS, CPU)
    assert 0.3 < found.value < 0.7
    assert found.low < 0.5 < found.high


def test_smoother_volumes_are_recognised() -> None:
    smooth = np.stack([gaussian_filter(volume, 0.7) for volume in balls(48, 2)[0]])
    found = accuracy((balls(48, 1)[0], smooth), (np.arange(48), np.arange(48)), OPTIONS, CPU)
    assert found.value > 0.9
    assert found.low > 0.75


def test_copies_of_a_person_do_not_leak_into_the_test() -> None:
    """Eight copies a person: by volume a network would know them all, by person it knows nobody."""
    first, second = (np.repeat(balls(6, seed)[0], 8, axis=0) for seed in (1, 2))
    people = np.repeat(np.arange(6), 8)
    by_volume = accuracy((first, second), (np.arange(48), np.arange(48)), OPTIONS, CPU)
    by_person = accuracy((first, second), (people, people), OPTIONS, CPU)
    assert by_volume.value > by_person.value + 0.15
