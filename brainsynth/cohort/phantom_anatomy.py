"""The shapes of a phantom head: implicit surfaces in template mm (MNI-like, RAS+) and their shares of each voxel.

Distances are positive inside. Each shape becomes a fraction per voxel by a linear ramp one (sub)voxel wide, so that
partial volume is smooth and each volume grows with one number: the radius factor of the ventricles, the outward shift
of the brain's surface. Bisection on these two gives the asked volumes on the asked grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, map_coordinates

from brainsynth.errors import UserError

F32 = npt.NDArray[np.float32]
CENTRE_MM = (0.0, -17.0, 10.0)
"""Centre of the brain and of the grids made by `phantom_grid`."""
_LATTICE = 64
_LATTICE_MM = 2.9
"""Nodes along an axis of the lattice that holds the fold pattern, and their distance in mm."""
ARCH = ((0, -6, 4), (60, 38, 24))
"""Centre and semi-axes (mm) of the ellipsoid that the corpus callosum arches over."""
# Right lateral ventricle: x, y, z, radius (mm) from the anterior horn to the atrium; then posterior and inferior horn.
_BODY = ((8, 32, 2, 2.6), (7.5, 20, 10, 4.2), (8, 4, 17, 3.8), (10, -15, 21, 3.6),
         (16, -31, 18, 4.2), (23, -41, 10, 5.0))  # fmt: skip
_HORNS = (((23, -41, 10, 5.0), (24, -56, 8, 3.2), (20, -69, 7, 1.8)),
          ((24, -42, 8, 4.8), (32, -38, -4, 2.8), (34, -25, -13, 2.3), (30, -11, -18, 1.6)))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """One head: what the seed, the age and the sex decide. Lengths in template mm."""

    stretch: F32
    rotation: F32
    warp: F32
    folds: F32
    sulcus_mm: float
    cortex_mm: float
    skull_mm: float
    scalp_mm: float
    ventricle_growth: float
    side: F32
    grey: float
    white: float


def ramp(distance: Any, width: float) -> F32:
    """Share of a voxel of this width that is inside a flat surface at `distance` from its centre."""
    out: F32 = np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)
    return out


def ellipsoid(p: tuple[F32, F32, F32], centre: tuple[float, ...], semi: tuple[float, ...]) -> F32:
    """First-order signed distance to an ellipsoid."""
    near: Any = None
    far: Any = None
    for axis, c, r in zip(p, centre, semi, strict=True):
        u2 = np.square((axis - np.float32(c)) * np.float32(1 / r))
        near = u2 if near is None else near + u2
        far = u2 * np.float32(r**-2) if far is None else far + u2 * np.float32(r**-2)
    k0 = np.sqrt(near)
    distance: F32 = k0 * (1 - k0) / np.sqrt(far + np.float32(1e-9))
    return distance


def union(a: F32, b: F32, soft_mm: float) -> F32:
    """Union of two shapes, its crease rounded over about `soft_mm`."""
    overlap = np.maximum(np.float32(soft_mm) - np.abs(a - b), 0)
    joined: F32 = np.maximum(a, b) + np.square(overlap) * np.float32(0.25 / soft_mm)
    return joined


def _fold_lattice(rng: np.random.Generator) -> F32:
    """(L, L, L) signed distance, in lattice steps, to the walls that become sulci.

    Read at the direction of a point from the brain's centre, so that sulci run radially, as they do in a brain.
    """
    noise = rng.standard_normal((_LATTICE,) * 3, dtype=np.float32)
    smooth = gaussian_filter(noise, 1.5, mode="wrap", truncate=3) - gaussian_filter(noise, 2.4, mode="wrap", truncate=3)
    gradient = np.gradient(smooth)
    slope2 = sum(g * g for g in gradient)
    steps: F32 = smooth / np.sqrt(slope2 + np.float32(0.15) * np.mean(slope2))
    return steps.astype(np.float32)


def draw_traits(age: float, sex: str, ventricular_ml: float, seed: int) -> Traits:
    """Draw one head. The order of draws is fixed, so one seed is one person at any age and volume."""
    rng = np.random.default_rng([seed, 2])
    z = rng.standard_normal(16).astype(np.float32)
    years = (age - 20) / 70
    male = sex == "M"
    angles = 0.02 * z[:3]
    rotation = np.eye(3) + np.cross(np.eye(3), angles)  # small angles
    stretch = np.exp(0.018 * z[3:6] + (np.array([-0.012, 0.014, 0.0]) if male else np.array([0.012, -0.014, 0.0])))
    return Traits(
        stretch=stretch.astype(np.float32),
        rotation=rotation.astype(np.float32),
        warp=np.concatenate([rng.uniform(0, 2 * np.pi, 6), rng.normal(0, 1.3, 3)]).astype(np.float32),
        folds=_fold_lattice(rng),
        sulcus_mm=max(0.5, 0.9 + 2.1 * years + 0.25 * float(z[6])),
        cortex_mm=3.1 - 0.5 * years + 0.1 * float(z[7]),
        skull_mm=(7.4 if male else 6.2) + 0.5 * float(z[8]),
        scalp_mm=(6.0 if male else 5.2) + 0.6 * float(z[9]),
        ventricle_growth=(ventricular_ml / 20) ** 0.45,
        side=(1 + 0.06 * z[10:12]).astype(np.float32),
        grey=0.545 + 0.03 * years + 0.01 * float(z[12]),
        white=0.81 - 0.035 * years + 0.01 * float(z[13]),
    )


def _template_points(axes: list[F32], traits: Traits, scale: float) -> tuple[F32, F32, F32]:
    """Template coordinates (mm) of a world grid: undo the head's scale, stretch, rotation and slow warp."""
    x, y, z = (
        ((a - np.float32(c)) / np.float32(scale * s)) for a, c, s in zip(axes, CENTRE_MM, traits.stretch, strict=True)
    )
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    w, r = traits.warp, traits.rotation
    k = np.float32(1 / 28)
    px = r[0, 0] * x + (r[0, 1] * y + r[0, 2] * z + w[6] * np.sin(y * k + w[0]) * np.sin(z * k + w[1]))
    py = r[1, 1] * y + (r[1, 0] * x + r[1, 2] * z + w[7] * np.sin(x * k + w[2]) * np.sin(z * k + w[3]))
    pz = r[2, 2] * z + (r[2, 0] * x + r[2, 1] * y + w[8] * np.sin(x * k + w[4]) * np.sin(y * k + w[5]))
    return px + np.float32(CENTRE_MM[0]), py + np.float32(CENTRE_MM[1]), pz + np.float32(CENTRE_MM[2])


def _hulls(p: tuple[F32, F32, F32]) -> tuple[F32, F32, F32]:
    """Distances to the unfolded cerebrum, to the cerebellum and to the brainstem."""
    x, y, z = p
    ax = np.abs(x)
    tapered = (x * (1 + np.float32(0.0011) * (y + 25)), y, z)  # heads are narrower in front
    main = ellipsoid(tapered, (0, -17, 15), (68, 88, 65))
    tent: Any = 15 * np.exp(-np.square((y + 55) / 26)) * np.exp(-np.square(x / 36)) - 20 + 0.20 * np.maximum(y - 5, 0)
    main = -union(-main, tent - z, 8)
    temporal = ellipsoid((ax, y, z), (43, -12, -17), (22, 44, 21))
    cerebrum = union(main, temporal, 3)
    notch = 7 * np.exp(-np.square(x / 6)) * np.clip((-70 - y) / 15, 0, 1)
    cerebellum = np.minimum(ellipsoid(p, (0, -63, -35), (52, 32, 27)) - notch, tent - 3 - z)
    stem = np.minimum(_stem_depth(p), np.minimum(z + 64, -4 - z))
    return cerebrum, cerebellum, stem


def _stem_depth(p: tuple[F32, F32, F32]) -> F32:
    """Distance to an endless brainstem with its pons; it leans back as it goes down."""
    down = np.clip(-p[2], 0, 70)
    pons = 13 * np.exp(-np.square((down - 28) / 12)) + 8
    depth: F32 = (pons - np.hypot(p[0] * 0.95, p[1] + 21 + 0.30 * down + 0.25 * (pons - 8))).astype(np.float32)
    return depth


def _sulci(p: tuple[F32, F32, F32], cerebrum: F32, traits: Traits) -> F32:
    """Distance to the sulci (positive inside the CSF): folds, interhemispheric and Sylvian fissures."""
    x, y, z = p
    half = np.float32(traits.sulcus_mm / 2)
    arch = ellipsoid(p, ARCH[0], ARCH[1])
    middle = x + 1.3 * np.sin(y * np.float32(0.13) + traits.warp[0]) * np.sin(z * np.float32(0.15) + traits.warp[1])
    fissure = half + 0.2 - np.hypot(middle, np.maximum(arch + 3, 0))
    ax = np.abs(x)
    lid = z - 3 + 0.30 * (y + 20) - 0.25 * (ax - 45)
    lateral = np.hypot(lid * 0.9, np.maximum(np.maximum(40 - ax, 0), np.maximum(np.abs(y + 8) - 28, 0)))
    insula = np.hypot(ax - 38 - 0.06 * np.abs(y), np.maximum(np.hypot((y - 2) / 1.9, lid - 6) - 11, 0))
    sulci = np.maximum(fissure, half + 0.6 - np.minimum(lateral, insula))
    core = ellipsoid((ax, y, z), (0, -12, 4), (35, 50, 25))
    near = np.flatnonzero((cerebrum.ravel() > -3) & (core.ravel() < 4))
    ax, y, z, f, c, k = (v.reshape(-1)[near] for v in (ax, y, z, -fissure, cerebrum, core))
    # The direction from the hemisphere's centre, projected on its hull in mm: folds are even there and radial inside.
    wander = 2.2 * np.sin(0.21 * y) * np.sin(0.19 * z) + 2.0 * np.sin(0.27 * ax + 0.1 * z)
    q = ((ax - 33) + wander, (y + 17) + wander, (z - 12) - wander)
    k0 = np.sqrt(np.square(q[0] / 36) + np.square(q[1] / 86) + np.square(q[2] / 62)) + np.float32(0.05)
    offset = np.where(x.reshape(-1)[near] > 0, np.float32(45), np.float32(-45))
    at = [(v / k0 + o) / np.float32(_LATTICE_MM) + _LATTICE / 2 for v, o in zip(q, (offset, 0, 0), strict=True)]
    across = np.abs(map_coordinates(traits.folds, at, order=1, mode="grid-wrap")) * k0 * np.float32(_LATTICE_MM)
    deepest = 14 + 5 * np.sin(at[0] * np.float32(0.5)) * np.sin(at[1] * np.float32(0.4))
    bottom = np.maximum(np.maximum(np.minimum(c - deepest, f - 0.6 * deepest), k + 4), 0)
    flat = sulci.reshape(-1)
    flat[near] = np.maximum(flat[near], half - np.hypot(across, bottom))
    full: F32 = flat.reshape(cerebrum.shape).astype(np.float32)
    return full


def _ventricles(p: tuple[F32, F32, F32], traits: Traits) -> tuple[F32, F32]:
    """(level, radius_mm): at radius factor k a point is (k - level) * radius_mm inside the ventricles."""
    shape = p[0].shape
    level, size = np.full(shape, 99, np.float32), np.ones(shape, np.float32)
    near = np.flatnonzero((np.abs(p[0]) < 52) & (np.abs(p[1] + 22) < 72) & (np.abs(p[2]) < 50))
    x, y, z = (v.reshape(-1)[near] for v in p)
    g, side = traits.ventricle_growth, np.where(x > 0, traits.side[0], traits.side[1])
    best, radius = np.full(near.size, 99, np.float32), np.ones(near.size, np.float32)
    plain = (np.abs(x), y, z)
    upright = (1.25 * (np.abs(x) - 0.5 * z), y, 0.8 * z)  # the body leans outwards and is taller than wide
    shift = 1.6 * (g - 1)  # large ventricles bow out and up instead of closing over the midline
    for points, horn in ((upright, _BODY), (plain, _HORNS[0]), (plain, _HORNS[1])):
        nodes = [np.array([u + shift * r / 4 + 1, v, w + shift, r], np.float32) for u, v, w, r in horn]
        if horn is _BODY:
            nodes = [np.array([1.25 * (n[0] - 0.5 * n[2]), n[1], 0.8 * n[2], n[3]], np.float32) for n in nodes]
        for a, b in itertools.pairwise(nodes):
            d = b - a
            along = sum((v - o) * s for v, o, s in zip(points, a, d, strict=False))
            t = np.clip(along / np.float32(d[:3] @ d[:3]), 0, 1)
            r = (a[3] + t * d[3]) * side
            value = np.sqrt(sum(np.square(v - o - t * s) for v, o, s in zip(points, a, d, strict=False))) / r
            closer = value < best
            best[closer], radius[closer] = value[closer], r[closer]
    third, fourth = ((0, -15, 0), (1.7, 13 / g, 9 / g)), ((0, -44, -33), (6 / g**0.7, 4.5 / g**0.7, 9 / g))
    for centre, semi in (third, fourth):
        value = np.sqrt(sum(np.square((v - c) / r) for v, c, r in zip((x, y, z), centre, semi, strict=True)))
        closer = value < best
        best[closer], radius[closer] = value[closer], min(semi) * 1.2
    level.reshape(-1)[near], size.reshape(-1)[near] = best, radius
    return level, size


def _bisect(volume_of: Callable[[float], float], target: float, low: float, high: float, what: str) -> float:
    """The argument in [low, high] of a growing function that reaches `target`."""
    least, most = volume_of(low), volume_of(high)
    if not least <= target <= most:
        raise UserError(f"no phantom has {what} = {target:g} on this grid: this one can have {least:.0f} to {most:.0f}")
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if volume_of(middle) < target else (low, middle)
    return (low + high) / 2


def build_anatomy(axes: list[F32], traits: Traits, scale: float) -> dict[str, Any]:
    """The fields (distances in template mm) of one head on a grid of world axes (mm)."""
    p = _template_points(axes, traits, scale)
    cerebrum, cerebellum, stem = _hulls(p)
    level, radius = _ventricles(p, traits)
    # Folia are onion shells around the fourth ventricle's roof, with a slow wobble.
    wobble = 1.5 * np.sin(0.15 * p[0] + traits.warp[2])
    ring = np.hypot(np.hypot(p[1] + 40, p[2] + 30), 0.35 * p[0]) + wobble
    wave = np.abs(np.sin(ring * np.float32(0.55)))
    folia = np.minimum(np.minimum(0.9 - 5.7 * wave, 9 - cerebellum), -46 - p[1])
    hind = np.maximum(cerebellum, stem)
    sulci = _sulci(p, cerebrum, traits)
    sulci = np.where(stem > cerebrum, np.float32(-20), sulci)
    sulci = np.where(cerebellum > np.maximum(cerebrum, stem), folia, sulci).astype(np.float32)
    return {"p": p, "hull": np.maximum(cerebrum, hind), "cerebrum": cerebrum, "hind": hind, "cerebellum": cerebellum,
            "stem": stem, "wave": wave, "sulci": sulci, "level": level, "radius": radius}  # fmt: skip


def solve_volumes(
    a: dict[str, Any], traits: Traits, h: float, voxel_ml: float, vent_ml: float, brain_ml: float | None
) -> tuple[F32, F32, float]:
    """(ventricle, brain, shift_mm): shares per voxel with these volumes; without `brain_ml` the surface stays."""
    near = a["level"] < 6
    lv, rv = a["level"][near], a["radius"][near]

    def ventricle_ml(k: float) -> float:
        return float(ramp((np.float32(k) - lv) * rv, h).sum(dtype=np.float64)) * voxel_ml

    k = _bisect(ventricle_ml, vent_ml, -3, 6, "ventricular_volume (ml)")
    vent = np.zeros(a["level"].shape, np.float32)
    vent[near] = ramp((np.float32(k) - lv) * rv, h)

    def brain_share(hull: F32, sulci: F32, shift: float) -> F32:
        most = np.float32(np.clip((traits.sulcus_mm - 2 * shift) / h, 0, 1))  # a thin sulcus never fills a voxel
        share: F32 = ramp(hull + np.float32(shift), h) * (1 - np.minimum(ramp(sulci - np.float32(shift), h), most))
        return share

    shift = 0.0
    if brain_ml is not None:
        pial = np.minimum(a["hull"], -a["sulci"])
        free = np.abs(pial) < 4 + h
        certain = float((1 - vent)[pial >= 4 + h].sum(dtype=np.float64))
        hull, sulci, rest = a["hull"][free], a["sulci"][free], 1 - vent[free]

        def brain_at(shift: float) -> float:
            return (certain + float((brain_share(hull, sulci, shift) * rest).sum(dtype=np.float64))) * voxel_ml

        shift = _bisect(brain_at, brain_ml, -4, 4, "brain_volume (ml)")
    return vent, brain_share(a["hull"], a["sulci"], shift), shift
