"""A ruler for ventricular volume on T1w images that are aligned to a prior map: milliseconds, no network, known error.

Ventricles are dark and lie where a map of many heads says they may. So: divide the image by its white-matter level near
the ventricles, turn darkness into a CSF share per voxel, weigh it with a soft version of the map, add up, calibrate on
known volumes. It is no segmentation: quote its own error (`ruler_error`) beside what it measures.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from brainsynth.errors import UserError
from brainsynth.records import record

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# Candidates that `fit` tries. A narrow ramp is a threshold, best where voxels are small; a wide one is a linear share
# of CSF, best where most ventricle voxels are partly something else.
_LEVELS = (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70)
_WIDTHS = (0.1, 0.2, 0.35, 0.5, 0.7)
_PRIOR_CUTS = (0.003, 0.01, 0.03, 0.08)
_PRIOR_SOFTNESS = 0.4
_PRIOR_FLOOR = 1e-4
_NEGLIGIBLE = 0.02  # weight below which a voxel is left out


@record
class RulerError:
    """How well measured volumes agree with known ones."""

    n: int
    r: float
    """Pearson correlation."""
    r_low: float
    r_high: float
    """With `r_low`, the 95 % confidence interval of r (Fisher z)."""
    mae_ml: float
    """Mean absolute error."""
    slope: float
    """ml measured per ml true (least squares); below 1, the ruler or the generator shrinks towards the mean."""
    bias_ml: float
    """Mean of measured minus true."""


def ruler_error(measured: npt.ArrayLike, true: npt.ArrayLike) -> RulerError:
    """Agreement of (N,) measured with (N,) true volumes in ml.

    Raises:
        UserError: fewer than 4 pairs, different lengths, values that are not finite, or no variation to correlate.
    """
    m, t = np.asarray(measured, np.float64), np.asarray(true, np.float64)
    if m.shape != t.shape or m.ndim != 1:
        raise UserError(f"measured {m.shape} and true {t.shape} volumes must be two lists of the same length")
    if len(m) < 4:
        raise UserError(f"an error with a confidence interval needs at least 4 pairs of volumes, not {len(m)}")
    lost = int((~(np.isfinite(m) & np.isfinite(t))).sum())
    if lost:
        raise UserError(f"{lost} of {len(m)} pairs of volumes are not finite; leave them out and say how many")
    if min(m.std(), t.std()) <= 1e-9 * max(1.0, float(np.abs(t).max())):
        raise UserError("the volumes are all the same, so there is no correlation; use different ones")
    r = float(np.clip(np.corrcoef(m, t)[0, 1], -1, 1))
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.959964 / math.sqrt(len(m) - 3)
    return RulerError(
        n=len(m),
        r=r,
        r_low=min(r, math.tanh(z - half)),
        r_high=max(r, math.tanh(z + half)),
        mae_ml=float(np.abs(m - t).mean()),
        slope=float(np.cov(m, t)[0, 1] / np.var(t, ddof=1)),
        bias_ml=float((m - t).mean()),
    )


def agreement(asked: npt.ArrayLike, measured: npt.ArrayLike) -> RulerError:
    """As `ruler_error`, for generated images: asked and measured volumes in ml. It includes the ruler's own error."""
    return ruler_error(measured, asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class VentricleRuler:
    """A fitted ruler. Make one with `fit`."""

    prior: F32
    """(X, Y, Z) mean ventricle share of many aligned heads, in [0, 1]."""
    voxel_ml: float
    csf_level: float
    """Intensity, as a share of white matter's, that counts as half CSF."""
    csf_width: float
    """Width of the ramp from all to no CSF, as a share of white matter's intensity."""
    prior_cut: float
    """Prior value that weighs one half."""
    ml_per_ml: float
    offset_ml: float
    """Calibration: volume = ml_per_ml * sum + offset_ml."""

    @classmethod
    def fit(
        cls, images: npt.NDArray[Any], volumes_ml: npt.ArrayLike, prior: npt.NDArray[Any], voxel_ml: float
    ) -> VentricleRuler:
        """Choose ramp and prior cut by the smallest squared error on labelled images, and calibrate.

        Images are (N, X, Y, Z) on any intensity scale, N >= 8; volumes (N,); the prior is the (X, Y, Z) mean ventricle
        share, in [0, 1], on the same grid. Raises UserError on shapes that do not match and on unusable data.
        """
        prior = _checked_prior(prior)
        true = np.asarray(volumes_ml, np.float64)
        _check_images(images, prior)
        if true.shape != (len(images),) or len(images) < 8 or not np.isfinite(true).all() or np.ptp(true) == 0:
            raise UserError(
                "a ruler needs at least 8 images with a known, finite volume each, not all the same; "
                f"there are {len(images)} images and volumes of shape {true.shape}"
            )
        if not 0 < voxel_ml < math.inf:
            raise UserError(f"voxel_ml = {voxel_ml} must be positive")
        near = _weight(prior, min(_PRIOR_CUTS)) > _NEGLIGIBLE
        values = _relative(images, prior, near, voxel_ml)
        if not np.isfinite(values).all():
            raise UserError("some images to fit on have no white matter where the prior expects it; are they aligned?")
        weights = {cut: _weight(prior[near], cut) * np.float32(voxel_ml) for cut in _PRIOR_CUTS}
        best: tuple[float, ...] | None = None
        for level, width in itertools.product(_LEVELS, _WIDTHS):
            share = _csf_share(values, level, width)
            for cut, weight in weights.items():
                raw = (share @ weight).astype(np.float64)
                slope, offset = np.polyfit(raw, true, 1) if np.ptp(raw) > 0 else (0.0, 0.0)
                loss = float(np.square(slope * raw + offset - true).mean())
                if slope > 0 and (best is None or loss < best[0]):
                    best = (loss, level, width, cut, float(slope), float(offset))
        if best is None:
            raise UserError("no darkness near the ventricles grows with the volumes: check their order and the prior")
        _, level, width, cut, slope, offset = best
        return cls(prior=prior, voxel_ml=voxel_ml, csf_level=level, csf_width=width, prior_cut=cut,
                   ml_per_ml=slope, offset_ml=offset)  # fmt: skip

    def measure(self, images: npt.NDArray[Any]) -> F64:
        """(N,) ml of (N, X, Y, Z) images on the prior's grid; NaN for an image without white matter (a blank)."""
        _check_images(images, self.prior)
        near = _weight(self.prior, self.prior_cut) > _NEGLIGIBLE
        values = _relative(images, self.prior, near, self.voxel_ml)
        weight = _weight(self.prior[near], self.prior_cut) * np.float32(self.voxel_ml)
        raw = (_csf_share(values, self.csf_level, self.csf_width) @ weight).astype(np.float64)
        return self.ml_per_ml * raw + self.offset_ml


def _checked_prior(prior: npt.NDArray[Any]) -> F32:
    prior = np.ascontiguousarray(prior, np.float32)
    if prior.ndim != 3 or not np.isfinite(prior).all() or prior.min() < 0 or prior.max() > 1 or prior.max() <= 0.01:
        raise UserError(
            "the ventricle prior must be an (X, Y, Z) map of shares in [0, 1] that is not empty; this one has shape "
            f"{prior.shape} and values {prior.min():g} to {prior.max():g}"
        )
    return prior


def _check_images(images: npt.NDArray[Any], prior: F32) -> None:
    if images.ndim != 4 or images.shape[1:] != prior.shape:
        raise UserError(
            f"images of shape {images.shape} are not (N, X, Y, Z) on the grid of the ventricle prior {prior.shape}; "
            "resample the prior or take the one of this cohort"
        )


def _weight(prior: F32, cut: float) -> F32:
    """How far a voxel of this prior counts, from 0 to 1."""
    odds = (np.log(prior + np.float32(_PRIOR_FLOOR)) - math.log(cut)) / _PRIOR_SOFTNESS
    return (1 / (1 + np.exp(-odds))).astype(np.float32)


def _csf_share(relative: F32, level: float, width: float) -> F32:
    """Share of CSF, in [0, 1], of intensities relative to white matter."""
    return np.clip((level - relative) / np.float32(width) + np.float32(0.5), 0, 1)


def _relative(images: npt.NDArray[Any], prior: F32, near: npt.NDArray[np.bool_], voxel_ml: float) -> F32:
    """(N, V) intensities of the voxels `near`, divided by each image's white-matter level around the ventricles."""
    mm = (1000 * voxel_ml) ** (1 / 3)
    halo = gaussian_filter(prior, 10 / mm)
    around = (halo > 0.02 * halo.max()) & (prior < 0.3 * prior.max())
    levels = np.array([_white_level(np.asarray(image[around], np.float32)) for image in images], np.float32)
    return np.asarray(images[:, near], np.float32) / levels[:, None]


def _white_level(values: F32) -> float:
    """The mode of the bright half of these intensities, NaN if there is nothing bright; deep white matter in T1w."""
    top = float(np.percentile(values, 99)) if np.isfinite(values).all() else 0.0
    if top <= 0:
        return math.nan
    counts, edges = np.histogram(values, bins=64, range=(0.5 * top, 1.15 * top))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(np.float64), 2.5)))
    return float(edges[peak] + edges[peak + 1]) / 2
