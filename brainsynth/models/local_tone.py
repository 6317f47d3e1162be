"""Local contrast of generated volumes brought to that of scans.

What a local mean leaves of a volume, in units of that mean, has a distribution: scans have dark, thin sulci, and few bright
specks. Curves between the quantiles of both, at one scale after another, give a volume the distribution of scans. Grain and
grids, which a linear filter would raise together with sulci, are small and stay small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from brainsynth.bundle.renderer import LocalTone, ToneCurve
from brainsynth.covariates.schema import CovariateSchema

F32 = npt.NDArray[np.float32]
QUANTILES = np.array([0, 0.1, 0.5, 1, 2, 3.5, 5, 7.5, *range(10, 91, 5), 92.5, 95, 96.5, 98, 99, 99.5, 99.9, 100]) / 100
_TISSUE, _DARKEST_MEAN = 0.08, 0.05
_CLOSED, _INNER, _RIM, _BLEND = 3, 2, 1, 0.7


def fit_curves(made: Sequence[F32], scans: Sequence[F32], scales: Sequence[float]) -> tuple[ToneCurve, ...]:
    """One curve per scale, each fitted on what the ones before it make of the volumes.

    Args:
        made: generated volumes (X, Y, Z) in [0, 1], not yet brought to anything.
        scans: scans on the same grid.
        scales: standard deviations of the local mean's Gaussian, in voxels.
    """
    curves = []
    for scale in scales:
        ours, theirs = (_quantiles(volumes, scale) for volumes in (made, scans))
        increasing = np.append(True, np.diff(ours) > 0)
        curves.append(ToneCurve(scale=scale, made=tuple(ours[increasing]), scans=tuple(theirs[increasing])))
        made = [with_curve(volume, curves[-1]) for volume in made]
    return tuple(curves)


def with_curve(image: F32, curve: ToneCurve) -> F32:
    """(X, Y, Z) intensities in [0, 1] with one curve applied inside the brain, and less of it in its rim of a voxel."""
    brain, mean, rest = _parts(image, curve.scale)
    inside = ndimage.binary_erosion(brain, iterations=_RIM).astype(np.float32)
    share = brain * ndimage.gaussian_filter(inside, _BLEND)
    changed = mean * (1 + np.interp(rest, curve.made, curve.scans).astype(np.float32))
    mixed: F32 = share * changed + (1 - share) * image
    return mixed.clip(0, 1)


class ToneOf:
    """Applies a record's curves to a volume with the covariates of a context."""

    def __init__(self, tone: LocalTone, covariates: CovariateSchema) -> None:
        self.tone, self.covariates = tone, covariates

    def __call__(self, image: F32, context: F32) -> F32:
        """The volume; unchanged where the covariate is not known."""
        for curve in self.tone.curves.get(self.covariates.category_in(self.tone.by, context) or "", ()):
            image = with_curve(image, curve)
        return image


def _parts(image: F32, scale: float) -> tuple[npt.NDArray[np.bool_], F32, F32]:
    """The brain without holes, its local mean, and what that leaves in units of it."""
    inner = (slice(_CLOSED + 1, -_CLOSED - 1),) * 3
    brain = ndimage.binary_closing(np.pad(image > _TISSUE, _CLOSED + 1), iterations=_CLOSED)[inner]
    weight = brain.astype(np.float32)
    sums, weights = (ndimage.gaussian_filter(part, scale) for part in (image * weight, weight))
    mean = sums / np.maximum(weights, 0.02)
    return brain, mean, (image - mean) / np.maximum(mean, _DARKEST_MEAN)


def _quantiles(volumes: Sequence[F32], scale: float) -> npt.NDArray[np.float64]:
    values = []
    for volume in volumes:
        brain, _, rest = _parts(volume, scale)
        values.append(rest[ndimage.binary_erosion(brain, iterations=_INNER)])
    found: npt.NDArray[np.float64] = np.quantile(np.concatenate(values), QUANTILES)
    return found.round(4)
