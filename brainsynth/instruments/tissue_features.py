"""What a ridge regression can read of a brain image: soft shares of CSF, grey and white matter, averaged over blocks.

Milliseconds a volume and no network. Images must be aligned to one grid, and of one kind (skull-stripped or not) throughout.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from brainsynth.errors import UserError
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]

BLOCK_MM = 8.0
# Ends of the ramps between tissues, as shares of white matter's intensity.
_AIR, _CSF, _WHITE = (0.10, 0.20), (0.35, 0.60), (0.72, 0.95)
_FIELD_MM = 20.0
"""Smoothing of the white-matter intensity that is divided out: scanner fields vary more slowly, tissues faster."""


def tissue_features(image: npt.NDArray[np.floating[Any]], grid: VolumeSpec) -> F32:
    """(F,) shares, in [0, 1], of CSF, grey and white matter in 8 mm blocks; left and right blocks are averaged.

    Args:
        image: (X, Y, Z) on any positive intensity scale, background near 0.
        grid: its grid; X must run across the midline. Blocks are centred on it and cut what does not fill one.

    Raises:
        UserError: another shape than the grid's, NaN or Inf, or nothing bright in the middle (a blank).
    """
    x = np.asarray(image, np.float32)
    if x.shape != grid.shape_xyz:
        raise UserError(f"an image of shape {x.shape} is not on the grid {grid.shape_xyz}; resample it")
    if not np.isfinite(x).all():
        raise UserError("the image has NaN or infinite voxels; a ruler measures only finite images")
    relative = x / np.float32(_white_level(x))
    relative = _without_field(relative, grid)
    csf, white, head = (_ramp(relative, ends) for ends in (_CSF, _WHITE, _AIR))
    np.subtract(1, csf, out=csf)
    grey = np.subtract(1, csf, out=relative)
    grey -= white
    shares = (np.multiply(csf, head, out=head), grey, white)
    blocks = np.stack([_block_means(share, grid) for share in shares])
    both = np.asarray((blocks + blocks[:, ::-1]) / 2, np.float32)
    return both[:, : (both.shape[1] + 1) // 2].ravel()


def tissue_length(grid: VolumeSpec) -> int:
    """F, the number of features of a grid."""
    x, y, z = (n // size for n, size in zip(grid.shape_xyz, _block(grid), strict=True))
    return 3 * ((x + 1) // 2) * y * z


def tissue_volumes(features: npt.NDArray[np.floating[Any]], grid: VolumeSpec) -> dict[str, npt.NDArray[np.float64]]:
    """CSF, grey and white matter in ml, (N,) each, of (N, F) `tissue_features` on `grid`: soft shares times volume."""
    counts = [n // size for n, size in zip(grid.shape_xyz, _block(grid), strict=True)]
    half = (counts[0] + 1) // 2
    # The features are means over left and right; where the number of blocks is odd, the midline has no partner.
    sides = np.full(half, 2.0)
    sides[-1] = 2.0 if counts[0] % 2 == 0 else 1.0
    block_ml = float(np.prod(_block(grid)) * np.prod(grid.spacing_mm)) / 1000
    shares = np.asarray(features, np.float64).reshape(-1, 3, half, counts[1] * counts[2]).sum(3)
    ml = shares @ sides * block_ml
    return dict(zip(("csf", "grey_matter", "white_matter"), ml.T, strict=True))


def left_right_difference(image: npt.NDArray[np.floating[Any]], grid: VolumeSpec) -> F32:
    """(A,) mean intensity of each 8 mm block minus that of its mirror block, one side only; a flip changes every sign.

    Args:
        image: (X, Y, Z) intensities; X runs across the midline, blocks are those of `tissue_features`.
        grid: its grid.
    """
    blocks = _block_means(np.asarray(image, np.float32), grid)
    difference: F32 = (blocks - blocks[::-1])[: blocks.shape[0] // 2].ravel()
    return difference


def _ramp(values: F32, ends: tuple[float, float]) -> F32:
    out: F32 = values - np.float32(ends[0])
    out *= np.float32(1 / (ends[1] - ends[0]))
    return out.clip(0, 1, out=out)


@lru_cache(maxsize=4)
def _middle(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """The ellipsoid that fills 70 % of the grid along each axis."""
    reach = [np.square(np.linspace(-1, 1, n) / 0.7) for n in shape]
    inside: npt.NDArray[np.bool_] = (reach[0][:, None, None] + reach[1][:, None] + reach[2]) < 1
    return inside


def _white_level(x: F32) -> float:
    """Mode of the bright half of the intensities in the middle of the grid, where no scalp is; white matter in T1w."""
    inside = x[_middle(x.shape)]
    bright = inside[inside > 0]
    top = float(np.percentile(bright, 99)) if len(bright) >= 100 else 0.0
    if top <= 0:
        raise UserError("there is nothing bright in the middle of the image: it is blank, or not centred on its grid")
    counts, edges = np.histogram(bright, bins=64, range=(0.5 * top, 1.15 * top))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(np.float64), 2.5)))
    return float(edges[peak] + edges[peak + 1]) / 2


def _without_field(relative: F32, grid: VolumeSpec) -> F32:
    """Divided by the smoothed intensity of what is white matter at first sight, known only per block."""
    likely = ((relative > 0.8) & (relative < 1.25)).astype(np.float32)
    sigma = [_FIELD_MM / (size * mm) for size, mm in zip(_block(grid), grid.spacing_mm, strict=True)]
    known = gaussian_filter(_block_means(likely, grid), sigma) + np.float32(0.01)
    level = gaussian_filter(_block_means(likely * relative, grid), sigma) + np.float32(0.01)
    field = level / known
    for axis, (size, n) in enumerate(zip(_block(grid), relative.shape, strict=True)):
        before = (n % size) // 2
        nearest = np.clip((np.arange(n) - before) // size, 0, field.shape[axis] - 1)
        field = field.take(nearest, axis)
    out: F32 = relative / field
    return out


def _block(grid: VolumeSpec) -> list[int]:
    return [max(1, min(n, round(BLOCK_MM / mm))) for n, mm in zip(grid.shape_xyz, grid.spacing_mm, strict=True)]


def _block_means(values: F32, grid: VolumeSpec) -> F32:
    sizes = _block(grid)
    counts = [n // size for n, size in zip(values.shape, sizes, strict=True)]
    starts = [(n % size) // 2 for n, size in zip(values.shape, sizes, strict=True)]
    cut = values[tuple(slice(a, a + c * s) for a, c, s in zip(starts, counts, sizes, strict=True))]
    for axis, (count, size) in enumerate(zip(counts, sizes, strict=True)):  # one after the other: six times as fast
        cut = cut.reshape(*cut.shape[:axis], count, size, *cut.shape[axis + 1 :]).sum(axis + 1, dtype=np.float32)
    means: F32 = cut / np.float32(np.prod(sizes))
    return means
