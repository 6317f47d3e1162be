"""Scans of known tissue for the tests of preparation: a head in noisy air, the same head stripped, and how to store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainsynth.volume import VolumeSpec

SHAPE = (36, 40, 36)
GRID = VolumeSpec(shape_xyz=SHAPE, spacing_mm=(5.0, 5.0, 5.0), origin_mm=(-87.5, -97.5, -87.5))
Array = np.ndarray[Any, Any]


def radius(centre: tuple[float, float, float], semi: tuple[float, float, float]) -> Array:
    """1 on the surface of an ellipsoid, in units of half the grid."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    return np.sqrt(sum(((x - c) / s) ** 2 for x, c, s in zip(axes, centre, semi, strict=True)))


BRAIN = radius((0, 0, 0.1), (0.62, 0.7, 0.6)) < 1


def head(seed: int) -> Array:
    """White 800, grey 520, CSF 150, scalp 1000, one dark mark in the right hemisphere, smooth edges, Rician noise."""
    rng = np.random.default_rng(seed)
    image = np.zeros(SHAPE)
    image[radius((0, 0, 0.05), (0.78, 0.85, 0.78)) < 1] = 1000  # scalp
    image[radius((0, 0, 0.08), (0.7, 0.78, 0.68)) < 1] = 60  # skull
    image[radius((0, 0, 0.1), (0.65, 0.73, 0.63)) < 1] = 150  # CSF
    image[radius((0, 0, 0.1), (0.6, 0.68, 0.58)) < 1] = 520  # grey matter
    image[radius((0, 0, 0.1), (0.48, 0.55, 0.46)) < 1] = 800  # white matter
    image[radius((0, 0, 0.1), (0.16, 0.3, 0.14)) < 1] = 150  # ventricles
    image[radius((0.35, 0, 0.2), (0.1, 0.1, 0.1)) < 1] = 400
    image = ndimage.gaussian_filter(image, 0.5)
    return np.hypot(image + 15 * rng.standard_normal(SHAPE), 15 * rng.standard_normal(SHAPE))


def stripped(seed: int) -> Array:
    """The brain of `head`, exactly 0 around it."""
    return np.where(BRAIN, head(seed), 0.0)


def store(path: Path, image: Array, affine: Array | None = None) -> Path:
    """As NIfTI, in the type of the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, GRID.affine if affine is None else affine), path)
    return path


def padded(
    image: Array, before: tuple[int, int, int], after: tuple[int, int, int], value: float
) -> tuple[Array, Array]:
    """The image in a larger array, and the affine that leaves it where it was."""
    affine = GRID.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(before)
    return np.pad(image, list(zip(before, after, strict=True)), constant_values=value), affine
