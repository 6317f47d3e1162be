"""What keeps the texture of a renderer's images from becoming noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brainsynth.training.losses import excess_energy


@pytest.fixture
def scan() -> Tensor:
    """Two smooth volumes with a little grain."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(2, 1, 8, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, size=(32, 32, 32), mode="trilinear", align_corners=False)
    return 0.5 + 0.1 * smooth + 0.01 * torch.randn(smooth.shape, generator=generator)


def checkerboard(like: Tensor, amount: float) -> Tensor:
    x, y, z = torch.meshgrid(*[torch.arange(n) for n in like.shape[2:]], indexing="ij")
    return amount * (1.0 - 2.0 * ((x + y + z) % 2))


def noise(like: Tensor, amount: float) -> Tensor:
    return amount * torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


def test_only_more_energy_than_the_scan_has_costs(scan: Tensor) -> None:
    softer = torch.nn.functional.avg_pool3d(scan, 3, 1, 1, count_include_pad=False)
    assert excess_energy(scan, scan) == 0
    assert excess_energy(softer, scan) < 1e-4
    costs = [float(excess_energy(scan + noise(scan, amount), scan)) for amount in (0.01, 0.02, 0.04)]
    assert 0.001 < costs[0] < costs[1] / 1.5 < costs[2] / 3
    assert excess_energy(scan + checkerboard(scan, 0.02), scan) > 0.01


def test_the_same_texture_elsewhere_costs_little(scan: Tensor) -> None:
    """Two draws of the same noise."""
    once, again = scan + noise(scan, 0.03), scan + noise(scan, 0.03).flip(2)
    assert excess_energy(once, again) < (once - again).abs().mean() / 8


def test_small_crops_and_gradients(scan: Tensor) -> None:
    small = (scan[:, :, :8, :8, :8] + noise(scan[:, :, :8, :8, :8], 0.05)).requires_grad_()
    target = scan[:, :, :8, :8, :8]
    excess_energy(small, target).backward()  # type: ignore[no-untyped-call]
    assert small.grad is not None
    assert torch.isfinite(small.grad).all()
    assert small.grad.abs().max() > 0
