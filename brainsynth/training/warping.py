"""Pose, smooth warps and blur of volumes, for augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_CONTROL_MM = 24.0  # between the control points of a warp


def warp_grid(
    shape_xyz: Sequence[int],
    box: Sequence[slice],
    spacing_mm: Sequence[float],
    *,
    turn: Tensor,
    shift_mm: Tensor,
    scale: Tensor,
    warp_mm: float,
) -> Tensor:
    """(1, x, y, z, 3) places, for `grid_sample`, of the voxels of a box in a volume that is moved and warped.

    Args:
        turn: (3,) rad, about the volume's centre.
        shift_mm: (3,) along each axis.
        scale: (3,) size of what is sampled, over that of the result.
        warp_mm: a smooth random warp moves no voxel further; how far, is random, too.
    """
    half = torch.tensor(shape_xyz) * torch.tensor(spacing_mm) / 2
    lines = [
        (torch.arange(one.start, one.stop) + 0.5) * (2 / size) - 1 for one, size in zip(box, shape_xyz, strict=True)
    ]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)  # -1 to 1 between the outer faces
    control = torch.randn(1, 3, *(max(2, round(2 * float(h) / _CONTROL_MM)) for h in half))
    reach = control.square().sum(1).amax().sqrt()  # the warp is between its control points' values
    field = functional.grid_sample(control, places.flip(-1)[None], padding_mode="border", align_corners=True)[0]
    x, y, z = turn.tolist()
    turned = torch.linalg.matrix_exp(torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])) * scale
    moved = (places * half) @ turned.T + shift_mm + field.movedim(0, -1) * (warp_mm * torch.rand(()) / reach)
    grid: Tensor = (moved / half).flip(-1)[None]  # grid_sample's axes run backwards
    return grid


def blur(images: Tensor, sigma_mm: float, spacing_mm: tuple[float, ...]) -> Tensor:
    """(B, X, Y, Z) images convolved with a Gaussian."""
    out = images[:, None]
    for axis, spacing in enumerate(spacing_mm):
        width = sigma_mm / spacing
        reach = max(1, int(3 * width + 0.5))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / width) ** 2)
        shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[axis + 2], padding[axis] = -1, reach
        out = functional.conv3d(out, (kernel / kernel.sum()).view(shape), padding=padding)
    return out[:, 0]
