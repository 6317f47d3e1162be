"""What the quality gate measures on one volume: some fifty numbers and three coarse maps, and no network.

All intensities are first divided by the volume's own white level, so nothing here depends on how a cohort was scaled.
Frequencies are in cycles per voxel: a gate is fitted for one grid and used on that grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from brainsynth.gate.passes import F32, F64, Mask, Ranked, areas_of, eroded, neighbourhoods, pooled, slabs, sums_along

COARSE_MM, REGION_MM = 8.0, 4.0
FOREGROUND = 0.35
"""Share of the white level from which a voxel counts as brain: above CSF, below grey matter."""
SIGNAL, FAINT, WHITEST = 0.15, 0.5, 1.1
DARK = 0.1
"""Of the volume as it is: what is not brighter has no part in its white level."""
BACKGROUND_OFFSET = 0.01
"""Background brighter than a hundredth of white matter is where anything begins to be seen."""
AXES = "xyz"


@dataclass(frozen=True, slots=True)
class Measured:
    """One volume in numbers."""

    numbers: dict[str, float]
    """Name → value; the part before the dot is the check that it belongs to."""
    bright: F32
    """(I, J, K) mean brightness of blocks of about 8 mm; beyond white matter it counts no more (eyes, vessels)."""
    filled: F32
    """(I, J, K) share of their voxels with any signal."""
    void: F32
    """(I, J, K) share of their volume without signal though there is signal beyond it in four or more of six directions."""
    skew: F32
    """(I, J, K) mean brightness minus its mirror image about the brain's own middle, halved."""


def blocks(shape: tuple[int, ...], spacing_mm: tuple[float, ...], size_mm: float) -> tuple[int, ...]:
    """Voxels along each axis of a block of about `size_mm`, at least 1."""
    return tuple(max(1, min(n, round(size_mm / mm))) for n, mm in zip(shape, spacing_mm, strict=True))


def _pool_mean(u: F32, block: tuple[int, ...], of: Callable[[F32], npt.NDArray[Any]] | None = None) -> F32:
    """(I, J, K) mean of each block of u, or of what is made `of` it; what does not fill a block is padded with 0."""
    return pooled(u, block, of) / np.float32(np.prod(block))


def _capped(u: F32) -> F32:
    """Brightness that beyond white matter counts no more."""
    return np.minimum(u, np.float32(WHITEST))


def white_level(bright: Ranked, of: int) -> float:
    """The 90th percentile of all that is not dark: bright white matter in a T1w brain; NaN if hardly anything is there."""
    if len(bright) < max(20, 0.01 * of):
        return float("nan")
    return float(bright[int(0.9 * len(bright))])


def measure(volume: F32, spacing_mm: tuple[float, float, float]) -> Measured | None:
    """Everything about a finite (X, Y, Z) volume in [0, 1]; None when it is all but empty."""
    bright = Ranked(volume[volume > DARK])
    level = white_level(bright, volume.size)
    if not level > 0:
        return None
    u = volume / np.float32(level)
    mask = u > FOREGROUND
    count = int(np.count_nonzero(mask))
    if count < 0.01 * mask.size:
        return None
    inside = bright if level * FOREGROUND > 1.001 * DARK else Ranked(volume[mask])
    coarse_block = blocks(u.shape, spacing_mm, COARSE_MM)
    areas = areas_of(mask)
    inner = eroded(mask, max(1, round(4 / min(spacing_mm))))
    steps, between = _steps(u, inner)
    numbers = {"foreground.share": float(np.log(count / mask.size))}
    numbers |= _edges(areas, spacing_mm) | _background(u, spacing_mm) | _spectrum(u) | _slices(u, mask, areas, steps)
    numbers |= _grain(u, mask) | _detail(u, inner, between, spacing_mm)
    numbers |= _histogram(u, inside, level, count) | _bias(u, coarse_block)
    flat = pooled(u, (1, *coarse_block[1:]), _capped)  # (X, J, K)
    return Measured(
        numbers=numbers,
        bright=_mean_along_x(flat, coarse_block),
        filled=_pool_mean(u, coarse_block, lambda part: part > SIGNAL),
        void=_void(u, spacing_mm, coarse_block),
        skew=_skew(flat, areas[0], coarse_block),
    )


def _steps(u: F32, inner: Mask) -> tuple[list[F64], float]:
    """How much each slice differs from the next along each axis, summed; and neighbouring voxels inside, on average.

    Neighbours are looked up in the order of memory. Where that leads from the end of a row or a slice to the next one, the
    sums are cut off afterwards; nothing inside is there.
    """
    strides = (u[0].size, u.shape[2], 1)
    along_x = np.zeros(len(u))
    planes, of_inner = np.zeros((2, *u.shape[1:])), np.zeros(3)
    for part in slabs(u):
        inside = inner[part].astype(np.float32)
        here, ahead = u[part].ravel(), u[part.start : part.stop + 1].ravel()
        step = np.zeros_like(here)
        for axis, stride in enumerate(strides):
            nearest = ahead[stride:][: len(here)] if axis == 0 else here[stride:]
            np.subtract(nearest, here[: len(nearest)], out=step[: len(nearest)])
            step[len(nearest) :] = 0
            np.abs(step, out=step)
            slices = step.reshape(inside.shape)
            if axis == 0:
                along_x[part] = slices.reshape(len(slices), -1).sum(1)
            else:
                planes[axis - 1] += slices.sum(0)
            of_inner[axis] += np.einsum("xyz,xyz", slices, inside)
    summed = [along_x[:-1], planes[0].sum(1)[:-1], planes[1].sum(0)[:-1]]
    return summed, float(np.mean(of_inner)) / max(1, int(np.count_nonzero(inner)))


def _edges(areas: list[npt.NDArray[np.int64]], spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """Brain area at each face of the field of view, and the largest step of area from one slice to the next (cm, roots)."""
    numbers = {}
    for axis, name in enumerate(AXES):
        mm2 = float(np.prod(spacing_mm)) / spacing_mm[axis]
        area = areas[axis] * mm2 / 100
        depth = max(1, round(4 / spacing_mm[axis]))
        numbers[f"cut.{name}_low"] = float(np.sqrt(area[:depth].max()))
        numbers[f"cut.{name}_high"] = float(np.sqrt(area[-depth:].max()))
        numbers[f"cut.{name}_step"] = float(np.sqrt(np.abs(np.diff(area)).max()))
    return numbers


def _background(u: F32, spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """Brightness away from the brain, and the share of the brain that hangs apart from its largest piece."""
    block = blocks(u.shape, spacing_mm, REGION_MM)
    mean = _pool_mean(u, block)
    dark = mean[~ndimage.binary_dilation(pooled(u, block, join=np.maximum) > FOREGROUND)]
    labels, _ = ndimage.label(mean > FOREGROUND)
    sizes = np.bincount(labels.ravel())[1:]
    apart = 1 - sizes.max() / sizes.sum() if sizes.size else 1.0
    typical, top = (float(dark.mean()), float(np.quantile(dark, 0.95))) if dark.size else (0.0, 0.0)
    return {
        "background.mean": float(np.log(typical + BACKGROUND_OFFSET)),
        "background.top": float(np.log(top + 2 * BACKGROUND_OFFSET)),
        "pieces.apart": float(np.sqrt(apart)),
    }


@lru_cache(maxsize=4)
def _bands(shape: tuple[int, int, int]) -> npt.NDArray[np.int8]:
    """Radial band of every bin of the half spectrum: edges in cycles per voxel 0.05, 0.12, 0.2, 0.3, 0.4, 0.5."""
    k = [fft.fftfreq(shape[0]), fft.fftfreq(shape[1]), fft.rfftfreq(shape[2])]
    radius = np.sqrt(k[0][:, None, None] ** 2 + k[1][None, :, None] ** 2 + k[2][None, None, :] ** 2)
    bands: npt.NDArray[np.int8] = np.digitize(radius, [0.05, 0.12, 0.2, 0.3, 0.4, 0.5]).astype(np.int8)
    return bands


@lru_cache(maxsize=4)
def _runs(shape: tuple[int, int, int]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int8]]:
    """Where in the raveled half spectrum another row or another band begins, and the band of each such run."""
    bands = _bands(shape)
    begins = np.ones(bands.shape, bool)
    np.not_equal(bands[:, :, 1:], bands[:, :, :-1], out=begins[:, :, 1:])
    starts = np.flatnonzero(begins)
    return starts, bands.ravel()[starts]


def _peak(power: F32, bands: npt.NDArray[np.int8], floor: np.float32) -> float:
    """The largest power outside the two lowest bands, relative to the mean of the 7 x 7 x 7 bins around it."""
    peak = 0.0
    around = neighbourhoods(np.pad(power, 3, mode="wrap"), (7, 7, 7), np.float64)
    for here, mean, band in zip(power, around, bands, strict=True):
        mean += floor
        np.divide(here, mean, out=mean)
        mean *= band >= 2
        peak = max(peak, float(mean.max()))
    return peak


def _spectrum(u: F32) -> dict[str, float]:
    """Shares of energy by frequency: blur and noise change the bands, motion one axis, stripes and boards single points."""
    spectrum = fft.rfftn(u)
    power = spectrum.real**2
    power += spectrum.imag**2
    starts, band = _runs(u.shape)
    total = np.bincount(band, weights=np.add.reduceat(power.ravel(), starts), minlength=7) + 1e-12
    numbers = {f"sharpness.band{i}": float(np.log(total[i] / total[1])) for i in range(2, 7)}
    numbers["stripes.peak"] = float(np.log(_peak(power, _bands(u.shape), np.float32(1e-9 * total[1] / power.size))))
    corner = power
    for axis, (name, profile) in enumerate(zip(AXES, sums_along(power), strict=True)):
        n = len(profile)
        half = profile[: n // 2 + 1] if axis < 2 else profile
        numbers[f"sharpness.{name}"] = float(np.log(half[int(0.6 * len(half)) :].sum() / total[1] + 1e-9))
        numbers[f"checkerboard.{name}"] = float(np.log((half[-1] + 1e-12) / (half[-4:-1].mean() + 1e-12)))
        high = np.minimum(np.arange(n), n - np.arange(n)) if axis < 2 else np.arange(n)
        corner = np.take(corner, np.flatnonzero(high >= 0.84 * high.max()), axis)
    numbers["checkerboard.corner"] = float(np.log(corner.sum(dtype=np.float64) / total[1] + 1e-9))
    return numbers


def _slices(u: F32, mask: Mask, areas: list[npt.NDArray[np.int64]], steps: list[F64]) -> dict[str, float]:
    """The largest jump of mean brightness, and of what differs between neighbours, along each axis."""
    numbers, inside = {}, u * mask
    for axis, name in enumerate(AXES):
        others = tuple(a for a in range(3) if a != axis)
        count = areas[axis]
        thick = count > 0.3 * count.max()
        mean = inside.sum(others)[thick] / count[thick]
        bend = np.abs(mean[1:-1] - (mean[:-2] + mean[2:]) / 2)
        step = steps[axis][np.flatnonzero(thick[1:] & thick[:-1])] / count.max()
        calm = ndimage.median_filter(step, 5, mode="nearest")
        numbers[f"slices.{name}_level"] = float(np.log(bend.max() + 0.005)) if bend.size else 0.0
        numbers[f"slices.{name}_change"] = float(np.log((step / (calm + 1e-3)).max())) if step.size else 0.0
    return numbers


def _grain(u: F32, mask: Mask) -> dict[str, float]:
    """Noise inside the brain: the typical finest diagonal detail (Haar) of 2 x 2 x 2 voxels that are all brain."""
    even = tuple(slice(0, n // 2 * 2) for n in u.shape)
    v, m = u[even], mask[even]
    found = []
    for part in slabs(v):
        d = v[part][::2] - v[part][1::2]
        d = d[:, ::2] - d[:, 1::2]
        d = d[:, :, ::2] - d[:, :, 1::2]
        inner = m[part][::2] & m[part][1::2]
        inner = inner[:, ::2] & inner[:, 1::2]
        inner = inner[:, :, ::2] & inner[:, :, 1::2]
        found.append(d[inner])
    detail = np.abs(np.concatenate(found)) if found else np.empty(0, np.float32)
    typical = float(np.median(detail)) / (8**0.5 * 0.6745) if detail.size else 0.0
    return {"noise.grain": float(np.log(typical + 0.002))}


def _detail(u: F32, inner: Mask, between: float, spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """Contrast of gyri (against their 12 mm neighbourhood) and of neighbouring voxels, away from the brain's outline."""
    held = [np.flatnonzero(area) for area in areas_of(inner)]
    if np.count_nonzero(inner) < 30:
        return {"sharpness.gyri": 0.0, "sharpness.voxels": 0.0}
    widths = [max(3, round(12 / mm)) for mm in spacing_mm]
    box = tuple(slice(int(at[0]), int(at[-1]) + 1) for at in held)
    # Neighbourhoods of what lies inside are asked for alone; beyond its edges the volume is reflected.
    reach = [(part.start - n // 2, part.stop + n - n // 2 - 1) for part, n in zip(box, widths, strict=True)]
    short = [(max(0, -low), max(0, high - n)) for (low, high), n in zip(reach, u.shape, strict=True)]
    around = np.pad(u[tuple(slice(max(0, low), high) for low, high in reach)], short, mode="symmetric")
    count, total, squares = np.count_nonzero(inner), 0.0, 0.0
    for here, inside, mean in zip(u[box], inner[box], neighbourhoods(around, widths), strict=True):
        away = np.subtract(here, mean, out=mean)
        away *= inside
        total += float(away.sum())
        squares += float(np.square(away, out=away).sum())
    spread = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return {
        "sharpness.gyri": float(np.log(spread + 0.005)),
        "sharpness.voxels": float(np.log(between + 0.005)),
    }


def _histogram(u: F32, values: Ranked, level: float, count: int) -> dict[str, float]:
    """Shape of the brain's histogram, relative to its white level; the brain are the `count` brightest values."""
    places = len(values) - count + (np.array([0.5, 0.75, 0.99]) * (count - 1)).astype(int)
    quantiles = [values[place] / np.float32(level) for place in places]
    faint = sum(np.count_nonzero((u[p] > SIGNAL) & (u[p] < FAINT)) for p in slabs(u)) / count
    numbers = {f"contrast.q{q}": float(v) for q, v in zip((50, 75, 99), quantiles, strict=True)}
    return numbers | {"contrast.faint": float(np.log(faint + 0.01))}


def _bias(u: F32, block: tuple[int, ...]) -> dict[str, float]:
    """Slopes and bends of the bright level of each block (log) across the brain, per 100 % of the field of view."""
    bright = pooled(u, block, join=np.maximum)
    inside = _pool_mean(u, block, lambda part: part > FOREGROUND) > 0.7
    if inside.sum() < 30:
        return {f"bias.{name}": 0.0 for name in ("x", "y", "z", "bend")}
    p = [c / max(1, n - 1) - 0.5 for c, n in zip(np.nonzero(inside), inside.shape, strict=True)]
    linear = np.stack([np.ones_like(p[0]), *p], 1)
    bent = np.concatenate([linear, np.stack([p[i] * p[j] for i in range(3) for j in range(i, 3)], 1)], 1)
    y = np.log(bright[inside])
    slope: Any = np.linalg.lstsq(linear, y, rcond=None)[0]
    fitted = bent @ np.linalg.lstsq(bent, y, rcond=None)[0]
    return {f"bias.{name}": float(s) for name, s in zip(AXES, slope[1:], strict=True)} | {
        "bias.bend": float(np.log(fitted.std() + 0.01))
    }


def _void(u: F32, spacing_mm: tuple[float, ...], block: tuple[int, ...]) -> F32:
    """(I, J, K) where a hole may be: see `Measured.void`; found on blocks of about 4 mm."""
    region = blocks(u.shape, spacing_mm, REGION_MM)
    filled = _pool_mean(u, region, _capped) > SIGNAL
    walls = np.zeros(filled.shape, np.int8)
    for axis in range(3):
        walls += np.logical_or.accumulate(filled, axis)
        walls += np.flip(np.logical_or.accumulate(np.flip(filled, axis), axis), axis)
    void = (~filled & (walls >= 4)).astype(np.float32)
    for axis, (n, fine, coarse) in enumerate(zip(u.shape, region, block, strict=True)):
        void = np.moveaxis(np.tensordot(void, _shared(n, fine, coarse), (axis, 0)), -1, axis)
    return void / np.float32(np.prod(block))


def _shared(n: int, fine: int, coarse: int) -> F32:
    """(I, J) of n voxels in a row, how many are in both the i-th block of `fine` and the j-th of `coarse` voxels."""
    at = np.arange(n)
    shared = np.zeros((-(-n // fine), -(-n // coarse)), np.float32)
    np.add.at(shared, (at // fine, at // coarse), 1)
    return shared


def _mean_along_x(flat: F32, block: tuple[int, ...]) -> F32:
    return pooled(flat, (block[0], 1, 1)) / np.float32(np.prod(block))


def _skew(flat: F32, area: npt.NDArray[np.int64], block: tuple[int, ...]) -> F32:
    """(I, J, K) coarse volume minus its mirror image, after the brain's middle was brought to the grid's along X."""
    middle = float(area @ np.arange(len(area)) / area.sum())
    coarse = _mean_along_x(np.roll(flat, round((len(area) - 1) / 2 - middle), 0), block)
    return np.asarray((coarse - coarse[::-1]) / 2, np.float32)
