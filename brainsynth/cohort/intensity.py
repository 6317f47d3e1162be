"""Intensities of a scan → [0, 1], background 0, by the rule that the config names.

`percentiles` works on the resampled volume: values below the low percentile of all voxels become 0; the high percentile
of the foreground (voxels above 1 % of the remaining maximum) becomes 1; everything is clipped to [0, 1].

`robust` works on the scan itself and uses ranks and exact equality only, so that a*x + b with a > 0 gives the same volume:

- Padding: an exact value that fills a connected region at the border of the array. It becomes 0, whatever it is.
- Background: the air at the border; without air the value that surrounds the brain; if that level is not below the
  tissue (z-scored scans, a fill of -1000) a level below the darkest tissue, by a quarter of the tissue's range.
- White: a high quantile of the tissue; a few voxels of any size move no level. The config's high percentile of the
  foreground then becomes 1 on the resampled volume.
- A scan whose background is brighter than its tissue, whose tissue is darkest in its depth (inverted, or T2-weighted), or
  that is not an image of tissue, is refused with the reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats

F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
MAX_QUANTILE_VOXELS = 1 << 20
"""Quantiles are those of a regular subsample of this size."""
HEADROOM, MAX_WHITE = 2.0, 1.5
"""In units of the rough white: values are clipped at the first, so that the interpolation spreads no outlier, and white is
at most the second. 79 real scans: 0.96 to 1.31 at the percentile 99.8."""
MIN_MIDDLE = 0.25
"""Median of the foreground below which bright outliers have set the white; real scans: 0.38 to 0.64."""
FOREGROUND = 0.1
"""Foreground: more than this share of the way from background to white."""
MIN_FILL, MIN_FACE = 0.002, 0.5
"""A fill is a connected region of one value of at least this share of the volume; one that is not darker than the tissue
must also cover this share of a face of the array: saturated fat touches a face, padding covers it."""
BOX = 0.9
"""The scan proper is a box when it fills this share of its own bounding box."""
MAX_EQUAL = 0.25
"""Share of neighbouring voxels of one value: real scans in 8 bits have up to 0.12, label maps at 8 mm 0.4, at 2 mm 0.8."""
MIN_DEPTH_CORRELATION = -0.15
"""Rank correlation of intensity with depth in the tissue, up to half of the largest depth. Real scans (n = 91: stripped
brains of OASIS-1 and IXI, heads on two grids): 0.29 to 0.66; inverted brains and heads (n = 50): -0.60 to -0.28."""
FAR = 1.5
"""A fill further below the tissue than this many times the tissue's range is not a level of the scan."""


class ScanRejected(Exception):
    """Why a scan is not usable, in a few words for the rejects table."""


@dataclasses.dataclass(frozen=True)
class Brightness:
    """A scan's voxels with background 0 and rough white 1, and the two levels in the units of its file."""

    voxels: F32
    black: float
    white: float


def scale_intensities(image: F32, percentiles: tuple[float, float]) -> F32:
    """The rule `percentiles`: intensities in [0, 1]. Raises ScanRejected for a constant image."""
    shifted = np.maximum(image - np.percentile(image, percentiles[0]), 0.0)
    foreground = shifted[shifted > 0.01 * shifted.max()]
    if foreground.size == 0 or float(foreground.max()) == float(foreground.min()) == float(shifted.min()):
        raise ScanRejected("constant image")
    top = float(np.percentile(foreground, percentiles[1]))
    scaled: F32 = np.clip(shifted / top, 0.0, 1.0).astype(np.float32)
    return scaled


def robust_brightness(data: F32, mask: Mask | None = None) -> Brightness:
    """The rule `robust` on the scan's own grid: background, padding and what lies outside `mask` are exactly 0.

    Raises:
        ScanRejected: with the reason.
    """
    fills = _fills(data)
    rest = np.ones(data.shape, bool)
    for _, region in fills:
        rest &= ~region
    if rest.sum() < 64:
        raise ScanRejected("nearly constant image")
    low, high = (float(q) for q in np.quantile(_sample(data, rest), [0.01, 0.995]))
    air = _air(data, rest, fills, low, high)
    tissue = rest if mask is None else rest & mask
    if air is not None:
        tissue = tissue & (data > air + FOREGROUND * (high - air))
    if tissue.sum() < max(64, 0.002 * data.size):
        raise ScanRejected("nearly constant image: almost nothing differs from the background")
    dark, middle, bright = (float(q) for q in np.quantile(_sample(data, tissue), [0.01, 0.5, 0.995]))
    black = air if air is not None else _black(data, rest, tissue, fills, dark, bright)
    _check_tissue(data, tissue)
    _check_depth(data, tissue)
    if not black < middle < np.inf or bright <= black or (middle - black) < FOREGROUND * (bright - black):
        raise ScanRejected("most of the tissue is as dark as the background: outliers, or not a T1w scan")
    extreme = _rank(data[tissue], max(8, round(1e-5 * data.size)))
    top = min((extreme - black) / (bright - black), HEADROOM)
    voxels = ((data - np.float32(black)) / np.float32(bright - black)).clip(0.0, top).astype(np.float32)
    for _, region in fills:
        voxels[region] = 0.0
    if mask is not None:
        voxels[~mask] = 0.0
    return Brightness(voxels, black, bright)


def robust_white(brightness: F32, high_percentile: float) -> F32:
    """Resampled brightness → intensities in [0, 1]: the percentile of the foreground becomes 1.

    At least 8 voxels are brighter than that, as far as the foreground goes: one voxel never is the white.
    """
    foreground = np.sort(brightness[brightness > FOREGROUND])
    if foreground.size < 64:
        raise ScanRejected("nothing of the image lies on the configured grid")
    rank = min(int(high_percentile / 100 * (foreground.size - 1)), foreground.size - 9)
    white = min(float(foreground[rank]), MAX_WHITE)
    if float(foreground[foreground.size // 2]) < MIN_MIDDLE * white:
        raise ScanRejected("most of the tissue is as dark as the background: outliers, or not a T1w scan")
    scaled: F32 = np.clip(brightness / np.float32(white), 0.0, 1.0).astype(np.float32)
    return scaled


def _sample(data: F32, where: Mask) -> F32:
    """A regular subsample of the voxels of a region."""
    values = data[where]
    return values[:: max(1, values.size // MAX_QUANTILE_VOXELS)]


def _rank(values: F32, dropped: int) -> float:
    """The largest value but for a number of voxels."""
    place = max(0, values.size - 1 - dropped)
    return float(np.partition(values, place)[place])


def _faces(values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [np.take(values, end, axis) for axis in range(3) for end in (0, -1)]


def _fills(data: F32) -> list[tuple[float, Mask]]:
    """Exact values that fill connected regions at the border: padding, or the background of a stripped brain."""
    found: list[tuple[float, Mask]] = []
    values, counts = np.unique(np.concatenate([face.ravel() for face in _faces(data)]), return_counts=True)
    common = np.argsort(counts)[::-1][:4]
    for value in values[common[counts[common] >= 0.01 * counts.sum()]]:
        region = _region_at(data == value, None)
        if region is not None:
            found.append((float(value), region))
    found = [
        (value, _with_holes(data, value, region)) for value, region in found if _is_fill(data, value, region, found)
    ]
    if not found:
        return found
    rest = ~np.logical_or.reduce([region for _, region in found])
    if rest.sum() < 64 or not _is_box(rest):
        return found
    # Padding around a scan that has a constant background of its own, which does not reach the border of the array.
    rim = rest & ~ndimage.binary_erosion(rest)
    values, counts = np.unique(data[rim], return_counts=True)
    value = float(values[counts.argmax()])
    if counts.max() >= 0.5 * counts.sum() and (region := _region_at((data == value) & rest, rim)) is not None:
        inner = rest & ~region
        if inner.sum() >= 64 and _is_background(value, _sample(data, inner)):
            found.append((value, region))
    return found


def _region_at(same: Mask, rim: Mask | None) -> Mask | None:
    """The large connected regions of `same` that touch the rim (without one: the border of the array)."""
    labels, _ = ndimage.label(same)
    touching = (
        np.unique(labels[rim]) if rim is not None else np.unique(np.concatenate([f.ravel() for f in _faces(labels)]))
    )
    sizes = np.bincount(labels.ravel())
    kept = [number for number in touching if number and sizes[number] >= max(27, MIN_FILL * same.size)]
    return np.isin(labels, kept) if kept else None


def _is_fill(data: F32, value: float, region: Mask, regions: list[tuple[float, Mask]]) -> bool:
    rest = ~np.logical_or.reduce([other for _, other in regions])
    if rest.sum() < 64 or value <= float(np.quantile(_sample(data, rest), 0.05)):
        return True
    return max(float(face.mean()) for face in _faces(region)) >= MIN_FACE


def _with_holes(data: F32, value: float, region: Mask) -> Mask:
    """Also what the mask of a z-scored brain left out inside of it: the same value, which is in the middle of the tissue."""
    rest = _sample(data, ~region)
    if rest.size < 64 or value <= float(np.quantile(rest, 0.05)):
        return region
    same = (data == value) & ~region
    if np.unique(rest).size < 0.5 * rest.size:  # of whole numbers, single voxels have it by chance
        labels, _ = ndimage.label(same)
        same &= np.bincount(labels.ravel())[labels] >= 8
    both: Mask = region | same
    return both


def _is_background(value: float, rest: F32) -> bool:
    """True for a level at or below the darkest twentieth of the rest, or in its middle (z-scored): not for a bright one."""
    return value <= float(np.quantile(rest, 0.75))


def _is_box(rest: Mask) -> bool:
    box = ndimage.find_objects(rest.astype(np.uint8))[0]
    return float(rest[box].mean()) >= BOX


def _air(data: F32, rest: Mask, fills: list[tuple[float, Mask]], low: float, high: float) -> float | None:
    """The level of the air around the head; None if the rim of the scan proper is not air. Raises ScanRejected."""
    if high <= low:
        return None
    rim = data[rest & ~ndimage.binary_erosion(rest)]
    threshold = _otsu(np.clip(_sample(data, rest), low, high))
    dark = rim[rim < threshold]
    share = dark.size / rim.size
    box = not fills or _is_box(rest)
    if box and share < 0.5:
        middle = data[tuple(slice(n // 4, n - n // 4) for n in data.shape)]
        if float(np.median(middle)) < float(np.median(rim)):
            raise ScanRejected("the background is brighter than the tissue: the contrast is inverted")
        return None
    if dark.size == 0:
        return None
    quarter, level, three = (float(q) for q in np.quantile(dark, [0.25, 0.5, 0.75]))
    width, span = three - quarter, high - low
    if level - low > max(3 * width, 0.05 * span):
        return None  # something inside is darker: that is not air
    if box:
        return level if width <= 0.2 * span else None
    # A stripped brain is rimmed by CSF, which is dark, too, but is not the larger part of what is there.
    near = np.abs(_sample(data, rest) - level) <= max(3 * width, 0.02 * span)
    return level if share >= 0.8 and width <= 0.05 * span and float(near.mean()) >= 0.4 else None


def _otsu(values: F32) -> float:
    """The threshold that separates two classes best (Otsu 1979), on 256 bins."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * weight / weight[-1] - total) ** 2 / (weight * (weight[-1] - weight))
    return float(edges[1:][np.nanargmax(between[:-1])])


def _black(data: F32, rest: Mask, tissue: Mask, fills: list[tuple[float, Mask]], dark: float, bright: float) -> float:
    """The background of a scan without air, by what surrounds it."""
    below_tissue = dark - 0.25 * (bright - dark)
    if not fills:
        return below_tissue
    around = ndimage.binary_dilation(rest)
    value, _ = max(fills, key=lambda fill: int((fill[1] & around).sum()))
    values = _sample(data, tissue)
    if value > float(np.quantile(values, 0.9)):
        raise ScanRejected("the background is brighter than the tissue: the contrast is inverted")
    is_level = value <= float(np.quantile(values, 0.05)) and dark - value <= FAR * (bright - dark)
    return value if is_level else below_tissue


def _check_tissue(data: F32, tissue: Mask) -> None:
    """Tissue varies from voxel to voxel, and neighbours resemble each other. Labels do not vary, noise resembles nothing."""
    equal, alike = [], []
    for axis in range(3):
        here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        there = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        pairs = tissue[here] & tissue[there]
        if pairs.sum() < 64:
            continue
        a, b = data[here][pairs].astype(np.float64), data[there][pairs].astype(np.float64)
        low, high = np.quantile(a[:: max(1, a.size // MAX_QUANTILE_VOXELS)], [0.005, 0.995])
        equal.append(float((np.abs(a - b) <= 1e-4 * (high - low)).mean()))
        a, b = a.clip(low, high), b.clip(low, high)
        alike.append(float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0)
    if not equal:
        raise ScanRejected("no tissue: the bright voxels do not hang together")
    distinct = np.unique(_sample(data, tissue)).size
    if distinct < 8 or min(equal) > (MAX_EQUAL if distinct >= 64 else MAX_EQUAL - 0.05):
        raise ScanRejected(
            f"not an image of tissue: {distinct} distinct values, {100 * min(equal):.0f} % of neighbouring voxels equal "
            "(a label map, a mask, or a saturated scan)"
        )
    if max(alike) < 0.2:
        raise ScanRejected("nearly constant tissue, or noise: neighbouring voxels have nothing in common")


def _check_depth(data: F32, tissue: Mask) -> None:
    """White matter, which is bright in a T1w scan, lies deep; CSF and grey matter lie outside. Raises ScanRejected."""
    step = max(1, round((data.size / (1 << 17)) ** (1 / 3)))
    some = (slice(None, None, step),) * 3
    solid = ndimage.binary_fill_holes(tissue[some])
    depth = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1, 1:-1][solid]
    values = data[some][solid]
    if values.size < 64 or values.min() == values.max() or depth.min() == depth.max():
        return
    if stats.spearmanr(values, np.minimum(depth, 0.5 * depth.max())).statistic < MIN_DEPTH_CORRELATION:
        raise ScanRejected("the tissue is darker in its depth than outside: the contrast is inverted, or not T1w")
