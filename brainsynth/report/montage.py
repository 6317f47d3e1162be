"""Volumes as pictures: three orthogonal slices each, in radiological layout's mirror (left is left), as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.floating[Any]]
_AT = (0.46, 0.5, 0.5)


def orthogonal_slices(
    volume_XYZ: Volume,  # noqa: N803
    at: tuple[float, float, float] = _AT,
) -> list[npt.NDArray[np.uint8]]:
    """Sagittal, coronal and axial slices (uint8, top row = superior or anterior) at fractions of each axis."""
    planes = _planes(volume_XYZ, at)
    return [np.rint(np.clip(np.nan_to_num(plane), 0, 1) * 255).astype(np.uint8) for plane in planes]


def strip(volume_XYZ: Volume, scale: int = 1) -> npt.NDArray[np.uint8]:  # noqa: N803
    """(H, W) the three slices of a volume side by side, enlarged by whole factors."""
    return _beside(orthogonal_slices(volume_XYZ)).repeat(scale, axis=0).repeat(scale, axis=1)


def overlay_strip(
    volume_XYZ: Volume,  # noqa: N803
    labels_XYZ: npt.NDArray[np.uint8],  # noqa: N803
    colors: npt.NDArray[np.uint8],
    opacity: float = 0.5,
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) as `strip`, with a label map over it. `colors` is (256, 3), by label; 0 stays transparent."""
    grey, labels = strip(volume_XYZ)[..., None], _beside(_planes(labels_XYZ, _AT))
    share = np.where(labels[..., None] == 0, 0.0, opacity)
    picture: npt.NDArray[np.uint8] = np.rint((1 - share) * grey + share * colors[labels]).astype(np.uint8)
    return picture


def value_strip(volume_XYZ: Volume) -> Volume:  # noqa: N803
    """(H, W) as `strip`, with the volume's own values; 0 next to smaller slices."""
    return _beside(_planes(volume_XYZ, _AT))


def _planes(volume_XYZ: npt.NDArray[Any], at: tuple[float, float, float]) -> list[npt.NDArray[Any]]:  # noqa: N803
    x, y, z = (min(int(f * n), n - 1) for f, n in zip(at, volume_XYZ.shape, strict=True))
    return [plane.T[::-1] for plane in (volume_XYZ[x], volume_XYZ[:, y], volume_XYZ[:, :, z])]


def _beside(planes: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    height = max(plane.shape[0] for plane in planes)
    return np.concatenate([np.pad(p, ((0, height - p.shape[0]), (0, 1))) for p in planes], axis=1)


def grid(rows: Sequence[Sequence[Volume]], scale: int = 2) -> npt.NDArray[np.uint8]:
    """(H, W, 3) picture of a table of volumes."""
    picture = np.concatenate([np.concatenate([strip(v, scale) for v in row], axis=1) for row in rows], axis=0)
    return np.repeat(picture[:, :, None], 3, axis=2)
