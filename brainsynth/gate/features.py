"""What the quality gate measures on one volume: some fifty numbers and three coarse maps, and no network.

All intensities are first divided by the volume's own white level, so nothing here depends on how a cohort was scaled.
Frequencies are in cycles per voxel: a gate is fitted for one grid and used on that grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

COARSE_MM, REGION_MM = 8.0, 4.0
FOREGROUND = 0.35
"""Share of the white level from which a voxel counts as brain: above CSF, below grey matter."""
SIGNAL, FAINT, WHITEST = 0.15, 0.5, 1.1
BACKGROUND_OFFSET = 0.01
"""Background brighter than a hundredth of white matter is where anything begins to be seen."""
AXES = "xyz"
_SLAB = 8


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


def _pool(x: npt.NDArray[Any], block: tuple[int, ...], join: np.ufunc = np.add) -> F32:
    """(X, Y, Z) → (I, J, K): the sum, or the maximum, of each block; what does not fill a block is padded with 0."""
    short = [(0, -n % b) for n, b in zip(x.shape, block, strict=True)]
    if any(after for _, after in short):
        x = np.pad(x, short)
    for axis, size in enumerate(block):  # slices instead of a reshape: six times as fast on blocks of 2 to 4 voxels
        view = np.moveaxis(x, axis, 0)
        joined = view[::size]
        for i in range(1, size):
            joined = join(joined, view[i::size])
        x = np.moveaxis(joined, 0, axis)
    return x.astype(np.float32)


def _pool_mean(x: npt.NDArray[Any], block: tuple[int, ...]) -> F32:
    return _pool(x.astype(np.float32, copy=False), block) / np.float32(np.prod(block))


def white_level(x: F32) -> float:
    """The 90th percentile of all that is not dark: bright white matter in a T1w brain; NaN if hardly anything is there."""
    bright = x[x > 0.1]
    if bright.size < max(20, 0.01 * x.size):
        return float("nan")
    return float(np.partition(bright, int(0.9 * bright.size))[int(0.9 * bright.size)])


def measure(volume: F32, spacing_mm: tuple[float, float, float]) -> Measured | None:
    """Everything about a finite (X, Y, Z) volume in [0, 1]; None when it is all but empty."""
    level = white_level(volume)
    if not level > 0:
        return None
    u = volume / np.float32(level)
    mask = u > FOREGROUND
    if mask.mean() < 0.01:
        return None
    coarse_block = blocks(u.shape, spacing_mm, COARSE_MM)
    areas = [mask.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    inner = eroded(mask, max(1, round(4 / min(spacing_mm))))
    steps, between = _steps(u, inner)
    numbers = {"foreground.share": float(np.log(mask.mean()))}
    numbers |= _edges(areas, spacing_mm) | _background(u, spacing_mm) | _spectrum(u) | _slices(u * mask, areas, steps)
    numbers |= _grain(u, mask) | _detail(u, inner, between, spacing_mm) | _histogram(u, mask) | _bias(u, coarse_block)
    capped = np.minimum(u, np.float32(WHITEST))
    return Measured(
        numbers=numbers,
        bright=_pool_mean(capped, coarse_block),
        filled=_pool_mean(u > SIGNAL, coarse_block),
        void=_void(capped, spacing_mm, coarse_block),
        skew=_skew(capped, mask, coarse_block),
    )


def _steps(u: F32, inner: npt.NDArray[np.bool_]) -> tuple[list[F64], float]:
    """How much each slice differs from the next along each axis, summed; and neighbouring voxels inside, on average."""
    summed = [np.zeros(n - 1) for n in u.shape]
    of_inner, count = np.zeros(3), np.zeros(3)
    for start in range(0, len(u), _SLAB):  # parts that fit into a cache
        for axis in range(3):
            part = u[start : start + _SLAB + (axis == 0)]
            step = np.diff(part, axis=axis)
            np.abs(step, out=step)
            slices = step.sum(tuple(a for a in range(3) if a != axis))
            summed[axis][slice(start, start + len(slices)) if axis == 0 else slice(None)] += slices
            inside = step[inner[(slice(start, None), ...)][tuple(slice(n) for n in step.shape)]]
            of_inner[axis] += inside.sum(dtype=np.float64)
            count[axis] += inside.size
    return summed, float(np.mean(of_inner / np.maximum(count, 1)))


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
    dark = mean[~ndimage.binary_dilation(_pool(u, block, np.maximum) > FOREGROUND)]
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


def _spectrum(u: F32) -> dict[str, float]:
    """Shares of energy by frequency: blur and noise change the bands, motion one axis, stripes and boards single points."""
    spectrum = fft.rfftn(u)
    power = spectrum.real**2
    power += spectrum.imag**2
    bands = _bands(u.shape)
    total = np.bincount(bands.ravel(), weights=power.ravel(), minlength=7) + 1e-12
    numbers = {f"sharpness.band{i}": float(np.log(total[i] / total[1])) for i in range(2, 7)}
    noise_like = power / (ndimage.uniform_filter(power, 7, mode="wrap") + np.float32(1e-9 * total[1] / power.size))
    numbers["stripes.peak"] = float(np.log(noise_like[bands >= 2].max()))
    corner = power
    for axis, name in enumerate(AXES):
        n = power.shape[axis]
        profile = power.sum(tuple(a for a in range(3) if a != axis), dtype=np.float64)
        half = profile[: n // 2 + 1] if axis < 2 else profile
        numbers[f"sharpness.{name}"] = float(np.log(half[int(0.6 * len(half)) :].sum() / total[1] + 1e-9))
        numbers[f"checkerboard.{name}"] = float(np.log((half[-1] + 1e-12) / (half[-4:-1].mean() + 1e-12)))
        high = np.minimum(np.arange(n), n - np.arange(n)) if axis < 2 else np.arange(n)
        corner = np.take(corner, np.flatnonzero(high >= 0.84 * high.max()), axis)
    numbers["checkerboard.corner"] = float(np.log(corner.sum(dtype=np.float64) / total[1] + 1e-9))
    return numbers


def _slices(inside: F32, areas: list[npt.NDArray[np.int64]], steps: list[F64]) -> dict[str, float]:
    """The largest jump of mean brightness, and of what differs between neighbours, along each axis."""
    numbers = {}
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


def _grain(u: F32, mask: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Noise inside the brain: the typical finest diagonal detail (Haar) of 2 x 2 x 2 voxels that are all brain."""
    even = tuple(slice(0, n // 2 * 2) for n in u.shape)
    v, m = u[even], mask[even]
    d = v[::2] - v[1::2]
    d = d[:, ::2] - d[:, 1::2]
    d = d[:, :, ::2] - d[:, :, 1::2]
    inner = m[::2] & m[1::2]
    inner = inner[:, ::2] & inner[:, 1::2]
    inner = inner[:, :, ::2] & inner[:, :, 1::2]
    detail = np.abs(d[inner])
    typical = float(np.median(detail)) / (8**0.5 * 0.6745) if detail.size else 0.0
    return {"noise.grain": float(np.log(typical + 0.002))}


def _detail(u: F32, inner: npt.NDArray[np.bool_], between: float, spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """Contrast of gyri (against their 12 mm neighbourhood) and of neighbouring voxels, away from the brain's outline."""
    if inner.sum() < 30:
        return {"sharpness.gyri": 0.0, "sharpness.voxels": 0.0}
    widths = [max(3, round(12 / mm)) for mm in spacing_mm]
    # Neighbourhoods of what lies inside are asked for alone.
    (held,) = ndimage.find_objects(inner.astype(np.int8))
    box = tuple(slice(max(0, part.start - n), part.stop + n) for part, n in zip(held, widths, strict=True))
    around = running_mean(running_mean(u[box], widths[0], 0), widths[1], 1)
    around = ndimage.uniform_filter1d(around, widths[2], 2)
    away = u[inner] - around[inner[box]]
    return {
        "sharpness.gyri": float(np.log(away.std() + 0.005)),
        "sharpness.voxels": float(np.log(between + 0.005)),
    }


def running_mean(u: F32, width: int, axis: int) -> F32:
    """`ndimage.uniform_filter1d(u, width, axis)`, several times as fast where slices are contiguous; u is of order 1."""
    slices, means = np.moveaxis(u, axis, 0), np.empty_like(u)
    n, first = len(slices), -(width // 2)
    places = np.arange(first, n + width) % (2 * n)
    places = np.minimum(places, 2 * n - 1 - places)  # beyond the edges it is reflected
    total = np.add.reduce(slices[places[:width]], 0)
    for i, mean in enumerate(np.moveaxis(means, axis, 0)):
        np.multiply(total, np.float32(1 / width), out=mean)
        total += slices[places[i + width]]
        total -= slices[places[i]]
    return means


def eroded(mask: npt.NDArray[np.bool_], times: int) -> npt.NDArray[np.bool_]:
    """`ndimage.binary_erosion(mask, iterations=times)`, several times as fast."""
    for _ in range(times):
        whole, mask = mask, mask.copy()
        for axis in range(mask.ndim):
            old, new = np.moveaxis(whole, axis, 0), np.moveaxis(mask, axis, 0)
            new[1:] &= old[:-1]
            new[:-1] &= old[1:]
            new[[0, -1]] = False
    return mask


def _histogram(u: F32, mask: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Shape of the brain's histogram, relative to its white level."""
    inside = u[mask]
    ranks = (np.array([0.5, 0.75, 0.99]) * (inside.size - 1)).astype(int)
    values, above, below = [], inside, 0
    for rank in ranks:  # one at a time: NumPy has a fast way for that, a fifth of the time
        above = np.partition(above, rank - below)[rank - below :]
        values.append(above[0])
        below = rank
    faint = np.count_nonzero((u > SIGNAL) & (u < FAINT)) / inside.size
    numbers = {f"contrast.q{q}": float(v) for q, v in zip((50, 75, 99), values, strict=True)}
    return numbers | {"contrast.faint": float(np.log(faint + 0.01))}


def _bias(u: F32, block: tuple[int, ...]) -> dict[str, float]:
    """Slopes and bends of the bright level of each block (log) across the brain, per 100 % of the field of view."""
    bright, inside = _pool(u, block, np.maximum), _pool_mean(u > FOREGROUND, block) > 0.7
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
    filled = _pool_mean(u, region) > SIGNAL
    walls = np.zeros(filled.shape, np.int8)
    for axis in range(3):
        walls += np.logical_or.accumulate(filled, axis)
        walls += np.flip(np.logical_or.accumulate(np.flip(filled, axis), axis), axis)
    void = (~filled & (walls >= 4)).astype(np.float32)
    for axis, size in enumerate(region):
        void = np.repeat(void, size, axis)
    return _pool_mean(void[: u.shape[0], : u.shape[1], : u.shape[2]], block)


def _skew(u: F32, mask: npt.NDArray[np.bool_], block: tuple[int, ...]) -> F32:
    """(I, J, K) coarse volume minus its mirror image, after the brain's middle was brought to the grid's along X."""
    weight = mask.sum((1, 2), dtype=np.float64)
    middle = float(weight @ np.arange(len(weight)) / weight.sum())
    centred = np.roll(u, round((len(weight) - 1) / 2 - middle), 0)
    coarse = _pool_mean(centred, block)
    return np.asarray((coarse - coarse[::-1]) / 2, np.float32)
