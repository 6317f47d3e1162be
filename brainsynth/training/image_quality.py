"""How near decoded images come to what they should be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor


def closeness(x_B1XYZ: Tensor, y_B1XYZ: Tensor) -> dict[str, float]:  # noqa: N803
    """Mean L1, PSNR (dB) and SSIM (3D, windows of 7 voxels) of images in [0, 1] to those they should be."""
    error = x_B1XYZ - y_B1XYZ
    square = error.pow(2).flatten(1).mean(1)
    ssim: Any = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=7, reduction="none")(x_B1XYZ, y_B1XYZ)
    return {
        "l1": float(error.abs().mean()),
        "psnr_db": float((-10 * torch.log10(square + 1e-12)).mean()),
        "ssim": float(ssim.mean()),
    }


def sharpness(x_B1XYZ: Tensor) -> float:  # noqa: N803
    """Mean absolute difference of neighbouring voxels, over the three axes: the evaluation's `gradient`."""
    return sum(float(x_B1XYZ.diff(dim=axis).abs().mean()) for axis in (2, 3, 4)) / 3


def mean_closeness(measured: Iterable[dict[str, float]]) -> dict[str, float]:
    """The means over volumes of what was measured on each; a number that some lack is averaged over the others."""
    columns: dict[str, list[float]] = {}
    for row in measured:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}
