"""Invented brains for tests of the audit: an ellipsoid with a texture of its own, at 8 mm."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SHAPE, SPACING = (20, 26, 20), (8.0, 8.0, 8.0)


def heads(count: int, seed: int) -> np.ndarray:
    """(count, 20, 26, 20) float32 in [0, 1]: a shared layered ellipsoid and texture of a voxel's width, one per head."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1.25, 1.25, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt((axes[0] / 0.9) ** 2 + axes[1] ** 2 + (axes[2] * 1.05 + 0.15 * axes[1]) ** 2)
    shared = np.clip((1 - radius) / 0.15, 0, 1) * (0.55 + 0.2 * np.cos(7 * radius))
    texture = np.stack([ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.0) for _ in range(count)])
    out = shared * (1 + 1.2 * texture / texture.std() * 0.25)
    return np.clip(out, 0, 1).astype(np.float32)


def moved(head: np.ndarray, degrees: tuple[float, float, float], shift_mm: tuple[float, float, float]) -> np.ndarray:
    """A head turned about its centre, then shifted."""
    for angle, plane in zip(degrees, ((1, 2), (0, 2), (0, 1)), strict=True):
        head = ndimage.rotate(head, angle, plane, reshape=False, order=1)
    return ndimage.shift(head, np.array(shift_mm) / 8.0, order=1)
