"""What a ridge regression can read of a brain image: soft shares of CSF, grey and white matter, averaged over blocks.

Milliseconds a volume and no network. Images must be aligned to one grid, and of one kind (skull-stripped or not) throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
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
_TILE = 70_000
"""Voxels of the parts that are looked at one by one: a few arrays of that size fit into a cache."""
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
    level = np.float32(_white_level(x))
    field = _field(x, level, grid)
    blocks = np.empty((3, *field.shape), np.float32)
    for at, tile in _tiles(x, grid):
        blocks[:, *at] = _shares(tile / level, field[at])
    both = np.asarray((blocks + blocks[:, ::-1]) / 2, np.float32)
    return both[:, : (both.shape[1] + 1) // 2].ravel()


def tissue_length(grid: VolumeSpec) -> int:
    """F, the number of features of a grid."""
    x, y, z = _counts(grid)
    return 3 * ((x + 1) // 2) * y * z


def tissue_volumes(features: npt.NDArray[np.floating[Any]], grid: VolumeSpec) -> dict[str, npt.NDArray[np.float64]]:
    """CSF, grey and white matter in ml, (N,) each, of (N, F) `tissue_features` on `grid`: soft shares times volume."""
    counts = _counts(grid)
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


def _shares(relative: F32, field: F32) -> F32:
    """(3, J, K) CSF, grey and white matter in the blocks of a tile, of intensities relative to white matter's."""
    sizes = [n // count for n, count in zip(relative.shape, (1, *field.shape), strict=True)]
    relative /= field.repeat(sizes[1], 0).repeat(sizes[2], 1)
    csf, white, head = (_ramp(relative, ends) for ends in (_CSF, _WHITE, _AIR))
    np.subtract(1, csf, out=csf)
    grey = np.subtract(1, csf, out=relative)
    grey -= white
    return np.stack([_tile_means(share, sizes) for share in (np.multiply(csf, head, out=head), grey, white)])


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
    bright = x[_middle(x.shape)]
    bright = bright[bright > 0]
    top = _percentile_99(bright) if len(bright) >= 100 else 0.0
    if top <= 0:
        raise UserError("there is nothing bright in the middle of the image: it is blank, or not centred on its grid")
    counts, edges = np.histogram(bright, bins=64, range=(0.5 * top, 1.15 * top))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(np.float64), 2.5)))
    return float(edges[peak] + edges[peak + 1]) / 2


def _percentile_99(values: F32) -> float:
    """`np.percentile(values, 99)` several times as fast: NumPy looks up two places at a time the slow way."""
    at = float(np.float32(len(values) - 1) * np.float32(0.99))
    upper = np.partition(values, int(at))[int(at) :]
    low, high = upper[0], upper[1:].min()
    return float(low + (high - low) * np.float32(at - int(at)))


def _field(x: F32, level: np.float32, grid: VolumeSpec) -> F32:
    """(I, J, K) smoothed intensity, relative to `level`, of what is white matter at first sight."""
    sizes = _block(grid)
    known, bright = np.empty((2, *_counts(grid)), np.float32)
    for at, tile in _tiles(x, grid):
        relative = tile / level
        likely = ((relative > 0.8) & (relative < 1.25)).astype(np.float32)
        known[at] = _tile_means(likely, sizes)
        bright[at] = _tile_means(np.multiply(likely, relative, out=likely), sizes)
    sigma = [_FIELD_MM / (size * mm) for size, mm in zip(sizes, grid.spacing_mm, strict=True)]
    level_of_blocks = gaussian_filter(bright, sigma) + np.float32(0.01)
    field: F32 = level_of_blocks / (gaussian_filter(known, sigma) + np.float32(0.01))
    return field


def _block(grid: VolumeSpec) -> list[int]:
    return [max(1, min(n, round(BLOCK_MM / mm))) for n, mm in zip(grid.shape_xyz, grid.spacing_mm, strict=True)]


def _counts(grid: VolumeSpec) -> list[int]:
    """Whole blocks along each axis."""
    return [n // size for n, size in zip(grid.shape_xyz, _block(grid), strict=True)]


def _tiles(values: F32, grid: VolumeSpec) -> Iterator[tuple[tuple[int, slice], F32]]:
    """Which blocks along X and Y, and their voxels: parts of a volume that fit into a processor's cache."""
    sizes, counts = _block(grid), _counts(grid)
    starts = [(n % size) // 2 for n, size in zip(values.shape, sizes, strict=True)]
    cut = values[tuple(slice(a, a + c * s) for a, c, s in zip(starts, counts, sizes, strict=True))]
    rows = max(1, _TILE // (sizes[0] * sizes[1] * cut.shape[2]))
    for i in range(counts[0]):
        for j in range(0, counts[1], rows):
            tile = cut[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + rows) * sizes[1]]
            yield (i, slice(j, min(j + rows, counts[1]))), tile


def _tile_means(tile: F32, sizes: list[int]) -> F32:
    """(J, K) means of the blocks of a tile; one axis after the other: six times as fast."""
    sums = tile.sum(0)
    sums = sums.reshape(-1, sizes[1], sums.shape[1]).sum(1)
    sums = sums.reshape(len(sums), -1, sizes[2]).sum(2)
    means: F32 = sums / np.float32(tile.size / sums.size)
    return means


def _block_means(values: F32, grid: VolumeSpec) -> F32:
    means = np.empty(_counts(grid), np.float32)
    for at, tile in _tiles(values, grid):
        means[at] = _tile_means(tile, _block(grid))
    return means
