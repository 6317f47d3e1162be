"""Twelve kinds of artefact to plant in a volume, to see whether the quality gate catches them; and six more.

Each takes a skull-stripped volume (X, Y, Z, float32 in [0, 1]), its spacing in mm, a random generator that chooses position
and direction, and another volume of the cohort; it returns the volume with the fault, clipped to [0, 1].
Severities were fixed before any measurement: what an experienced reader sees at a glance in one slice, but no more. Sizes
are in mm, so that a fault is the same on any grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

F32 = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]
Artefact = Callable[[F32, Spacing, np.random.Generator, F32], F32]


def _unit(volume: Any) -> F32:
    return np.clip(volume, 0, 1).astype(np.float32)


def _extent(volume: F32, axis: int) -> tuple[int, int]:
    """First and last slice along an axis that hold some of the brain."""
    filled = np.flatnonzero((volume > 0.2).any(tuple(a for a in range(3) if a != axis)))
    return int(filled[0]), int(filled[-1])


def _direction(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    drawn = rng.standard_normal(3)
    return drawn / np.linalg.norm(drawn)


def _white_level(volume: F32) -> float:
    return float(np.quantile(volume[volume > 0.1], 0.9))


def cropped(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """A fifth of the brain's length is missing behind a flat cut, on one of the six sides: whole lobes."""
    axis = int(rng.integers(3))
    first, last = _extent(volume, axis)
    length = round(0.2 * (last - first + 1))
    out = volume.copy()
    view = np.moveaxis(out, axis, 0)
    if rng.integers(2):
        view[: first + length] = 0
    else:
        view[last + 1 - length :] = 0
    return out


def checkerboard(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Every other voxel 12 % brighter, its neighbours 12 % darker: as large as the grey-white contrast of one voxel."""
    parity = np.indices(volume.shape).sum(0) % 2
    return _unit(volume * (1 + 0.12 * (2 * parity - 1)))


def ghosting(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """A copy of a quarter of the intensity, shifted by half the field of view along the phase axis (an N/2 ghost)."""
    axis = int(rng.integers(3))
    return _unit(0.85 * volume + 0.25 * np.roll(volume, volume.shape[axis] // 2, axis))


def noise(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Rician noise with a standard deviation of a tenth of white matter: signal to noise 10, half the usual or less."""
    sd = 0.1 * _white_level(volume)
    real, imaginary = rng.standard_normal((2, *volume.shape), dtype=np.float32) * np.float32(sd)
    return _unit(np.hypot(volume + real, imaginary))


def blur(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """A Gaussian of 8 mm full width: neighbouring gyri, some 10 mm apart, run together."""
    return _unit(ndimage.gaussian_filter(volume, [8 / 2.355 / mm for mm in spacing]))


def spike(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """One wrong point of k-space: stripes of 15 % of white matter all over (herringbone), 2.5 to 8 voxels apart."""
    wave = _direction(rng) * rng.uniform(1 / 8, 1 / 2.5)
    phase = sum(2 * np.pi * k * i for k, i in zip(wave, np.indices(volume.shape, dtype=np.float32), strict=True))
    return _unit(np.abs(volume + 0.15 * _white_level(volume) * np.cos(phase + rng.uniform(0, 6.28))))


def motion(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The head turned by 5 degrees and moved by 5 mm during 40 % of the k-space lines, in four bursts."""
    plane = [(0, 1), (0, 2), (1, 2)][int(rng.integers(3))]
    moved = ndimage.rotate(volume, 5 * rng.choice([-1, 1]), axes=plane, reshape=False, order=1)
    moved = ndimage.shift(moved, 5 * _direction(rng) / np.asarray(spacing), order=1)
    axis = int(rng.integers(3))
    lines = volume.shape[axis]
    taken = np.zeros(lines, bool)
    for burst in range(4):
        start = int((burst + rng.uniform(0, 0.6)) * lines / 4)
        taken[start : start + max(1, lines // 10)] = True
    shape = [1, 1, 1]
    shape[axis] = lines
    return _unit(np.abs(fft.ifftn(np.where(taken.reshape(shape), fft.fftn(moved), fft.fftn(volume)))))


def hole(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The signal is gone within 14 mm of a point inside the brain, as beside metal: a ball of 11 ml."""
    inside = ndimage.binary_erosion(volume > 0.3, iterations=max(1, round(6 / max(spacing))))
    centre = rng.permutation(np.argwhere(inside if inside.any() else volume > 0.3))[0]
    offset = [(i - c) * mm for i, c, mm in zip(np.indices(volume.shape), centre, spacing, strict=True)]
    distance = np.sqrt(sum(d**2 for d in offset))
    return _unit(volume * (0.05 + 0.95 * np.clip((distance - 12) / 4, 0, 1)))


def bias(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Receive field of a surface coil: one side of the brain 3 times brighter than the other; scaled as a cohort is."""
    slope = sum(
        d * np.linspace(-n * mm / 2, n * mm / 2, n).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (d, n, mm) in enumerate(zip(_direction(rng), volume.shape, spacing, strict=True))
    )
    field = volume * np.exp(np.log(3) * slope / 140)
    return _unit(field / np.quantile(field[volume > 0.01], 0.998))


def wrap_around(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The brain has moved by a quarter of the field of view, what leaves it comes in on the other side (fold-over)."""
    axis = int(rng.integers(3))
    return np.roll(volume, int(rng.choice([-1, 1])) * (volume.shape[axis] // 4), axis)


def orientation(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Upside down, back to front, or two axes exchanged: a wrong header."""
    kind = int(rng.integers(5))
    if kind < 2:
        return np.flip(volume, (1, 2)[kind])
    axes = [(0, 1), (0, 2), (1, 2)][kind - 2]
    return _unit(ndimage.rotate(volume, 90 * rng.choice([-1, 1]), axes=axes, reshape=False, order=1))


def doubled(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The mean of two subjects, one of them displaced by 8 mm: every contour twice."""
    moved = ndimage.shift(other, 8 * _direction(rng) / np.asarray(spacing), order=1)
    return _unit((volume + moved) / 2)


def blended(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The mean of two subjects in place. In a cohort without head size hard to see, so not one of the twelve."""
    return _unit((volume + other) / 2)


def inverted(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Bright CSF, dark white matter: another contrast than T1w."""
    return _unit(np.where(volume > 0.05, 1.1 - volume, volume))


def slice_jitter(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """A quarter of the slices displaced by 6 mm within their plane."""
    axis, out = int(rng.integers(3)), volume.copy()
    view, moved_axis = np.moveaxis(out, axis, 0), int(rng.integers(2))
    step = max(1, round(6 / min(spacing)))
    for i in rng.permutation(len(view))[: len(view) // 4]:
        view[i] = np.roll(view[i], int(rng.choice([-1, 1])) * step, moved_axis)
    return out


def slice_loss(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """One slab of 4 mm inside the brain at half its intensity."""
    axis, out = int(rng.integers(3)), volume.copy()
    first, last = _extent(volume, axis)
    at = int(rng.integers(first + (last - first) // 4, last - (last - first) // 4))
    np.moveaxis(out, axis, 0)[at : at + max(1, round(4 / spacing[axis]))] *= 0.5
    return out


def squashed(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """The brain is a fifth shorter along one axis: a wrong voxel size."""
    axis = int(rng.integers(3))
    scale = np.ones(3)
    scale[axis] = 1 / 0.8
    middle = (np.asarray(volume.shape) - 1) / 2
    return _unit(ndimage.affine_transform(volume, scale, middle - scale * middle, order=1))


def mirrored(volume: F32, spacing: Spacing, rng: np.random.Generator, other: F32) -> F32:
    """Left and right exchanged about the brain's own middle, so that its place tells nothing."""
    first, last = _extent(volume, 0)
    return np.roll(np.flip(volume, 0), first + last + 1 - volume.shape[0], 0)


ARTEFACTS: dict[str, Artefact] = {
    f.__name__: f
    for f in (
        cropped,
        checkerboard,
        ghosting,
        noise,
        blur,
        spike,
        motion,
        hole,
        bias,
        wrap_around,
        orientation,
        doubled,
    )
}
"""The twelve kinds that the figures are about."""
FURTHER: dict[str, Artefact] = {
    f.__name__: f for f in (blended, inverted, slice_jitter, slice_loss, squashed, mirrored)
}
"""Reported separately; `mirrored` is the left-right flip."""
