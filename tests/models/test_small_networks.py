"""The small networks: sizes that fit, outputs that depend on what they should."""

from __future__ import annotations

import pytest
import torch

from brainsynth.models.small_networks import VolumeRegressor, VolumeSegmenter


@pytest.mark.parametrize("shape", [(40, 56, 40), (20, 26, 20), (17, 19, 15)])
def test_any_grid_fits(shape: tuple[int, int, int]) -> None:
    volume = torch.randn(2, 1, *shape)
    assert VolumeRegressor()(volume).shape == (2,)
    assert VolumeSegmenter()(volume).shape == volume.shape
    assert VolumeSegmenter(5)(volume).shape == (2, 5, *shape)


def test_they_are_small() -> None:
    networks = VolumeRegressor(), VolumeSegmenter(), VolumeSegmenter(18)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [73825, 28493, 129408]  # as their docstrings say, rounded


def test_the_place_of_a_structure_reaches_the_answer() -> None:
    torch.manual_seed(0)
    network = VolumeRegressor().eval()
    front, back = torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32)
    front[..., 22:26, 14:18], back[..., 6:10, 14:18] = 5, 5
    assert not torch.allclose(network(front), network(back), atol=1e-4)
