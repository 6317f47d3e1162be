"""What the quality gate learns from coarse maps (blocks of 8 mm): usual shapes of a brain, and its left from its right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from brainsynth.gate.features import Measured
from brainsynth.gate.passes import F32, F64

COMPONENTS = 8
"""Principal components kept of each map at most: enough for size, ventricles and tilt, too few to hold a subject."""
SKEW_COMPONENTS = 20
SPREAD_FLOOR, USUAL = 0.02, 2.5
"""No spread is taken to be smaller; a block that deviates by up to that many spreads adds nothing to a hole or a lump."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """The usual maps of one kind. Arrays are rounded to half precision, so that a stored gate judges as a fitted one."""

    mean: F32
    """(I, J, K) mean of the cohort."""
    components: F32
    """(C, I, J, K), orthonormal."""
    spread: F32
    """(I, J, K) root mean square of what the components leave, smoothed over neighbours."""
    rough: F32
    """(I, J, K) the same without smoothing."""

    @staticmethod
    def fit(maps: F32) -> Subspace:
        """From (N, I, J, K) maps."""
        n, shape = len(maps), maps.shape[1:]
        mean = maps.mean(0)
        rows = (maps - mean).reshape(n, -1)
        components = principal(rows, min(COMPONENTS, n // 6))
        left = (rows - (rows @ components.T) @ components).reshape(maps.shape)
        # the components were fitted on these very maps, so what they leave of new ones is a little more
        more = n / max(1, n - 1 - len(components))
        rough = np.sqrt((left**2).mean(0) * more)
        spread = np.sqrt(np.mean([_smooth(residual) ** 2 for residual in left], 0) * more)
        components = components.reshape(-1, *shape)
        return Subspace(_half(mean), _half(components), _half(spread), _half(rough))

    def numbers(self, shape_map: F32) -> dict[str, float]:
        """Of one (I, J, K) map: misfit (root mean square), largest lack and surplus, likeness to the mean.

        `dark` and `bright` are in smoothed spreads; `hole` and `lump` are what is missing or too much in a neighbourhood of
        some 20 blocks, beyond what each block may miss: an outline shifted a little misses a thin rim only. `likeness`
        is a correlation (Fisher z).
        """
        basis = self.components.reshape(len(self.components), -1)
        away = (shape_map - self.mean).ravel()
        along = basis @ away
        left = np.asarray(away - along @ basis, np.float32).reshape(shape_map.shape)
        z = _smooth(left) / (self.spread + SPREAD_FLOOR)
        usual = USUAL * (self.rough + SPREAD_FLOOR)
        return {
            "misfit": float(np.sqrt((z**2).mean())),
            "dark": float(-z.min()),
            "bright": float(z.max()),
            "hole": float(_smooth(np.maximum(-left - usual, 0)).max()),
            "likeness": float(
                np.arctanh(np.clip(np.corrcoef(shape_map.ravel(), self.mean.ravel())[0, 1], -0.999, 0.999))
            ),
            "lump": float(_smooth(np.maximum(left - usual, 0)).max()),
        }


@dataclass(frozen=True, slots=True)
class CoarseMaps:
    """Two subspaces and one direction that distinguishes left from right."""

    bright: Subspace
    """Of mean brightness."""
    filled: Subspace
    """Of the share of voxels with any signal."""
    certain: F32
    """(I, J, K) weight in [0, 1] of a void there: 1 where every brain of the cohort is full and none has a fissure."""
    direction: F32
    """(I, J, K) discriminant of left and right, scaled so that the cohort has mean 1."""

    @staticmethod
    def fit(sample: list[Measured]) -> CoarseMaps:
        """From measured volumes, 12 or more."""
        bright, filled, void, skew = (
            np.stack([getattr(m, n) for m in sample]) for n in ("bright", "filled", "void", "skew")
        )
        certain = np.clip(20 * (filled.mean(0) - 0.9), 0, 1) / (1 + 20 * void.std(0))
        return CoarseMaps(Subspace.fit(bright), Subspace.fit(filled), _half(certain), _half(left_right(skew)))

    def numbers(self, measured: Measured) -> dict[str, float]:
        """The numbers of one volume that need the cohort's maps."""
        values = {"flip.side": float((self.direction * measured.skew).sum())}
        values["hole.enclosed"] = float(gaussian_filter(measured.void * self.certain, 0.7, mode="constant").max())
        for name in ("bright", "filled"):
            n = getattr(self, name).numbers(getattr(measured, name))
            values |= {f"shape.{name}": np.log(n["misfit"] + 0.1), f"shape.{name}_unlike": -n["likeness"]}
            values |= {f"hole.{name}": np.log(max(n["dark"], 0) + 1), f"lump.{name}": np.log(max(n["bright"], 0) + 1)}
            values |= {f"hole.{name}_size": n["hole"], f"lump.{name}_size": n["lump"]}
        return {key: float(value) for key, value in values.items()}


def _half(x: npt.NDArray[np.floating]) -> F32:
    return x.astype(np.float16).astype(np.float32)


def _smooth(x: F32) -> F32:
    out: F32 = gaussian_filter(x, 1.0, mode="constant", truncate=3.0)
    return out


def principal(rows: F32, count: int) -> F32:
    """The first `count` principal components (C, V) of centred (N, V) rows."""
    values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
    values, vectors = np.maximum(values[::-1][:count], 1e-12), vectors[:, ::-1][:, :count]
    return np.asarray((vectors.T / np.sqrt(values)[:, None]) @ rows, np.float32)


def left_right(skew: F32) -> F32:
    """Fisher's discriminant between (N, I, J, K) left-right differences and their mirror images (their negatives).

    In the span of their principal components, with a tenth of the mean variance added to each, for few subjects.
    """
    rows = skew.reshape(len(skew), -1)
    components = principal(rows, min(SKEW_COMPONENTS, len(rows) // 3))
    scores: F64 = (rows @ components.T).astype(np.float64)
    mean, covariance = scores.mean(0), np.cov(scores, rowvar=False)
    weight = np.linalg.solve(covariance + 0.1 * np.trace(covariance) / len(mean) * np.eye(len(mean)), mean)
    scaled = (weight @ components) / max(float(weight @ mean), 1e-12)
    return scaled.reshape(skew.shape[1:]).astype(np.float32)
