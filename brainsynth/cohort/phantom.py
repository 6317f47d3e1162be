"""Procedural T1w head phantoms whose tissue volumes are known exactly, because they are built and not measured.

A phantom is a stack of implicit shapes in mm (MNI-like, RAS+): head, skull, intracranial space, folded brain and
ventricles. Each becomes a fraction per voxel by a linear ramp one (sub)voxel wide, so that partial volume is smooth and
each volume grows with one number: the radius factor of the ventricles, the outward shift of the brain's surface.
Bisection on these two gives the asked volumes on the asked grid. Distances are positive inside, in template mm.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.ndimage import gaussian_filter, map_coordinates

from brainsynth.errors import UserError, problems_error
from brainsynth.records import digest, to_dict
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]
TISSUES = ("air", "scalp", "skull", "csf", "grey", "white", "ventricle")
_VERSION = 1  # raise it when a phantom of the same arguments changes
CENTRE_MM = (0.0, -17.0, 10.0)
"""Centre of the brain and of the grids made by `phantom_grid`."""
_LATTICE = 64
_LATTICE_MM = 2.9
"""Nodes along an axis of the lattice that holds the fold pattern, and their distance in mm."""
_ARCH = ((0, -6, 4), (60, 38, 24))
"""Centre and semi-axes (mm) of the ellipsoid that the corpus callosum arches over."""
# Right lateral ventricle: x, y, z, radius (mm) from the anterior horn to the atrium; then posterior and inferior horn.
_BODY = ((8, 32, 2, 2.6), (7.5, 20, 10, 4.2), (8, 4, 17, 3.8), (10, -15, 21, 3.6),
         (16, -31, 18, 4.2), (23, -41, 10, 5.0))  # fmt: skip
_HORNS = (((23, -41, 10, 5.0), (24, -56, 8, 3.2), (20, -69, 7, 1.8)),
          ((24, -42, 8, 4.8), (32, -38, -4, 2.8), (34, -25, -13, 2.3), (30, -11, -18, 1.6)))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """A T1w image and its construction."""

    image: F32
    """(X, Y, Z) intensity in [0, 1]."""
    fractions: dict[str, F32]
    """(X, Y, Z) share of the voxel, in [0, 1], for each of `TISSUES`; they sum to 1."""
    truth: dict[str, float]
    """ml for each of `TISSUES`, and `ventricular_volume` and `brain_volume` (grey + white) as in the covariates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traits:
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


def phantom_grid(spacing_mm: float | tuple[float, float, float], shape_xyz: tuple[int, int, int]) -> VolumeSpec:
    """The grid of this spacing and shape that is centred on the phantom's brain; about 160 x 200 x 160 mm holds it."""
    spacing = (spacing_mm,) * 3 if isinstance(spacing_mm, int | float) else tuple(spacing_mm)
    origin = tuple(c - (n - 1) * mm / 2 for c, n, mm in zip(CENTRE_MM, shape_xyz, spacing, strict=True))
    return VolumeSpec(shape_xyz=shape_xyz, spacing_mm=spacing, origin_mm=origin)  # type: ignore[arg-type]


def phantom_covariates(n: int, seed: int) -> pd.DataFrame:
    """Covariates of `n` phantoms: participant_id, age (years), sex, ventricular_volume and brain_volume (ml).

    Row i depends on (seed, i) only, so a larger cohort begins with the smaller one.
    """
    if n < 1:
        raise UserError(f"a phantom cohort needs at least one subject, not {n}")
    rows = []
    for i in range(n):
        rng = np.random.default_rng([seed, i, 1])
        age, male = rng.uniform(20, 90), rng.random() < 0.5
        head = rng.normal()
        brain = 0.0
        while not 1000 <= brain <= 1600:
            brain = (1395 if male else 1245) - 2.4 * (age - 40) + 45 * head + rng.normal(0, 55)
        vent = 0.0
        while not 6 <= vent <= 110:
            vent = 22.5 * math.exp(0.0180 * (age - 55) + 0.06 * (1 if male else -1) + 0.08 * head + rng.normal(0, 0.43))
        rows.append((f"phantom-{i + 1:04d}", round(age, 1), "M" if male else "F", round(vent, 2), round(brain, 1)))
    return pd.DataFrame(rows, columns=["participant_id", "age", "sex", "ventricular_volume", "brain_volume"])


def _ramp(distance: Any, width: float) -> F32:
    """Share of a voxel of this width that is inside a flat surface at `distance` from its centre."""
    out: F32 = np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)
    return out


def _ellipsoid(p: tuple[F32, F32, F32], centre: tuple[float, ...], semi: tuple[float, ...]) -> F32:
    """First-order signed distance to an ellipsoid."""
    near = far = None
    for axis, c, r in zip(p, centre, semi, strict=True):
        u2 = np.square((axis - np.float32(c)) * np.float32(1 / r))
        near = u2 if near is None else near + u2
        far = u2 * np.float32(r**-2) if far is None else far + u2 * np.float32(r**-2)
    k0 = np.sqrt(near)
    distance: F32 = k0 * (1 - k0) / np.sqrt(far + np.float32(1e-9))
    return distance


def _union(a: F32, b: F32, soft_mm: float) -> F32:
    """Union of two shapes, its crease rounded over about `soft_mm`."""
    overlap = np.maximum(np.float32(soft_mm) - np.abs(a - b), 0)
    return np.maximum(a, b) + np.square(overlap) * np.float32(0.25 / soft_mm)


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


def _traits(age: float, sex: str, ventricular_ml: float, seed: int) -> _Traits:
    """Draw one head. The order of draws is fixed, so one seed is one person at any age and volume."""
    rng = np.random.default_rng([seed, 2])
    z = rng.standard_normal(16).astype(np.float32)
    years = (age - 20) / 70
    male = sex == "M"
    angles = 0.02 * z[:3]
    rotation = np.eye(3) + np.cross(np.eye(3), angles)  # small angles
    stretch = np.exp(0.018 * z[3:6] + (np.array([-0.012, 0.014, 0.0]) if male else np.array([0.012, -0.014, 0.0])))
    return _Traits(
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


def _template_points(axes: list[F32], traits: _Traits, scale: float) -> tuple[F32, F32, F32]:
    """Template coordinates (mm) of a world grid: undo the head's scale, stretch, rotation and slow warp."""
    x, y, z = (
        ((a - np.float32(c)) / np.float32(scale * s))
        for a, c, s in zip(axes, CENTRE_MM, traits.stretch, strict=True)
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
    main = _ellipsoid(tapered, (0, -17, 15), (68, 88, 65))
    tent = 15 * np.exp(-np.square((y + 55) / 26)) * np.exp(-np.square(x / 36)) - 20 + 0.20 * np.maximum(y - 5, 0)
    main = -_union(-main, tent - z, 8)
    temporal = _ellipsoid((ax, y, z), (43, -12, -17), (22, 44, 21))
    cerebrum = _union(main, temporal, 3)
    notch = 7 * np.exp(-np.square(x / 6)) * np.clip((-70 - y) / 15, 0, 1)
    cerebellum = np.minimum(_ellipsoid(p, (0, -63, -35), (52, 32, 27)) - notch, tent - 3 - z)
    stem = np.minimum(_stem_depth(p), np.minimum(z + 64, -4 - z))
    return cerebrum, cerebellum, stem


def _stem_depth(p: tuple[F32, F32, F32]) -> F32:
    """Distance to an endless brainstem with its pons; it leans back as it goes down."""
    down = np.clip(-p[2], 0, 70)
    pons = 13 * np.exp(-np.square((down - 28) / 12)) + 8
    depth: F32 = (pons - np.hypot(p[0] * 0.95, p[1] + 21 + 0.30 * down + 0.25 * (pons - 8))).astype(np.float32)
    return depth


def _sulci(p: tuple[F32, F32, F32], cerebrum: F32, traits: _Traits) -> F32:
    """Distance to the sulci (positive inside the CSF): folds, interhemispheric and Sylvian fissures."""
    x, y, z = p
    half = np.float32(traits.sulcus_mm / 2)
    arch = _ellipsoid(p, _ARCH[0], _ARCH[1])
    middle = x + 1.3 * np.sin(y * np.float32(0.13) + traits.warp[0]) * np.sin(z * np.float32(0.15) + traits.warp[1])
    fissure = half + 0.2 - np.hypot(middle, np.maximum(arch + 3, 0))
    ax = np.abs(x)
    lid = z - 3 + 0.30 * (y + 20) - 0.25 * (ax - 45)
    lateral = np.hypot(lid * 0.9, np.maximum(np.maximum(40 - ax, 0), np.maximum(np.abs(y + 8) - 28, 0)))
    insula = np.hypot(ax - 38 - 0.06 * np.abs(y), np.maximum(np.hypot((y - 2) / 1.9, lid - 6) - 11, 0))
    sulci = np.maximum(fissure, half + 0.6 - np.minimum(lateral, insula))
    core = _ellipsoid((ax, y, z), (0, -12, 4), (35, 50, 25))
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
    return flat.reshape(cerebrum.shape).astype(np.float32)


def _ventricles(p: tuple[F32, F32, F32], traits: _Traits) -> tuple[F32, F32]:
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


def _anatomy(axes: list[F32], traits: _Traits, scale: float) -> dict[str, Any]:
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


def _solve(
    a: dict[str, Any], traits: _Traits, h: float, voxel_ml: float, vent_ml: float, brain_ml: float | None
) -> tuple[F32, F32, float]:
    """(ventricle, brain, shift_mm): shares per voxel with these volumes; without `brain_ml` the surface stays."""
    near = a["level"] < 6
    lv, rv = a["level"][near], a["radius"][near]

    def ventricle_ml(k: float) -> float:
        return float(_ramp((np.float32(k) - lv) * rv, h).sum(dtype=np.float64)) * voxel_ml

    k = _bisect(ventricle_ml, vent_ml, -3, 6, "ventricular_volume (ml)")
    vent = np.zeros(a["level"].shape, np.float32)
    vent[near] = _ramp((np.float32(k) - lv) * rv, h)

    def brain_share(hull: F32, sulci: F32, shift: float) -> F32:
        most = np.float32(np.clip((traits.sulcus_mm - 2 * shift) / h, 0, 1))  # a thin sulcus never fills a voxel
        return _ramp(hull + np.float32(shift), h) * (1 - np.minimum(_ramp(sulci - np.float32(shift), h), most))

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


def _white(a: dict[str, Any], traits: _Traits, h: float, shift: float) -> F32:
    """Share of the brain that is white matter: under the cortex, without the deep grey, with callosum and brainstem."""
    p = a["p"]
    ax = np.abs(p[0])
    pial = np.minimum(a["hull"], -a["sulci"]) + np.float32(shift)
    white = _ramp(pial - np.float32(traits.cortex_mm), h)
    # The cerebellum's white core sends branches into the folia.
    core = np.minimum(a["cerebellum"] - 7.5 - 6 * (1 - a["wave"]), 0.9 * pial - 1.5)
    white = np.where(a["cerebellum"] > a["cerebrum"], _ramp(core, h), white)
    out = 2.0 * (traits.ventricle_growth - 1)
    near = np.flatnonzero((ax < 40) & (np.abs(p[1]) < 40) & (np.abs(p[2]) < 32))
    q = tuple(v.reshape(-1)[near] for v in (ax, p[1], p[2]))
    deep = np.ones(near.size, np.float32)
    for centre, semi, share in (((10 + out / 2, -18, 6), (9, 14, 8), 0.65), ((13 + out, 15 - out, 7), (6, 12, 9), 0.9),
                                ((15 + out, -2, 19 + out / 2), (3.5, 14, 4.5), 0.9), ((25, 1, 1), (5, 16, 9), 0.85),
                                ((0, -8, 3), (6, 26, 14), 0.75), ((27, -18, -17), (7, 18, 6), 0.9)):  # fmt: skip
        deep *= 1 - np.float32(share) * _ramp(_ellipsoid(q, centre, semi), h)
    white.reshape(-1)[near] *= deep
    white = np.maximum(white, _ramp(np.minimum(a["stem"], -4 - p[2]), h))
    arch = _ellipsoid(p, _ARCH[0], _ARCH[1])
    callosum = np.minimum(np.minimum(3.2 - np.abs(arch + 0.5), 16 - ax), p[2] - 1)
    return np.maximum(white, _ramp(callosum, h))


def _compose(a: dict[str, Any], traits: _Traits, h: float, vent: F32, brain: F32, shift: float) -> dict[str, F32]:
    """Shares of every tissue; also `marrow` (in the skull), `eyes` and `depth` (mm below the skin)."""
    p = a["p"]
    white = np.minimum(_white(a, traits, h, shift), 1) * brain * (1 - vent)
    grey = brain * (1 - vent) - white
    dura = _union(a["cerebrum"], a["hind"], 10) + np.float32(max(2.0, shift + 1.0))
    inside = np.maximum(_ramp(dura, h), np.maximum(brain, vent))
    thick = 3 + np.float32(traits.skull_mm - 3) * np.clip((p[2] + 20) / 25, 0, 1)  # the skull base is thin
    outer = dura + thick
    face = _union(_ellipsoid(p, (0, 14, -58), (64, 76, 58)), _ellipsoid(p, (0, -52, -95), (62, 56, 84)), 10)
    depth = _union(outer + np.float32(traits.scalp_mm), face, 14)
    bone = np.maximum(_ramp(outer, h), inside)
    head = np.maximum(_ramp(depth, h), bone)
    nose = _ramp(_ellipsoid(p, (0, 48, -50), (12, 24, 15)), h) * (head - bone)
    eyes = _ramp(_ellipsoid((np.abs(p[0]), p[1], p[2]), (32, 56, -34), (12, 12, 12)), h)
    marrow = _ramp(np.minimum(outer - 1.6, -dura - 1.4) * 1.5, h)
    return {"air": 1 - head + nose, "scalp": head - bone - nose, "skull": bone - inside,
            "csf": inside - brain - vent + brain * vent, "grey": grey, "white": white, "ventricle": vent,
            "depth": depth, "eyes": eyes, "marrow": marrow}  # fmt: skip


def _render(f: dict[str, F32], traits: _Traits, volume: VolumeSpec, seed: int) -> F32:
    """T1w intensities in [0, 1] from tissue shares: texture, bias field, Rician noise."""
    rng = np.random.default_rng([seed, 3])
    shape = volume.shape_xyz
    texture = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), [4 / mm for mm in volume.spacing_mm])
    soft = 0.42 + 0.36 * np.clip((8 - f["depth"]) / 4, 0, 1) + 0.10 * texture / texture.std()
    soft = soft + (0.18 - soft) * f["eyes"]
    image = (0.08 * f["skull"] + 0.35 * f["marrow"] * f["skull"] + 0.16 * f["csf"] + 0.13 * f["ventricle"]
             + traits.grey * f["grey"] + traits.white * f["white"] + soft * f["scalp"])  # fmt: skip
    u = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    c = rng.normal(0, 0.035, 6)
    bias = c[0] * u[0] + c[1] * u[1] + c[2] * u[2] + c[3] * u[0] * u[1] + c[4] * u[1] * u[2] + c[5] * (u[2] ** 2 - 0.3)
    image = image * np.exp(np.clip(bias, -0.1, 0.1), dtype=np.float32) * np.float32(1 + 0.02 * rng.normal())
    sd = np.float32(rng.uniform(0.013, 0.024))
    noise = rng.standard_normal((2, *shape), dtype=np.float32) * sd
    return np.clip(np.hypot(image + noise[0], noise[1]), 0, 1, dtype=np.float32)


def _check(age_years: float, sex: str, ventricular_ml: float, brain_ml: float, volume: VolumeSpec, seed: int) -> None:
    found = []
    if not 5 <= age_years <= 110:
        found.append(f"age_years = {age_years} is outside [5, 110]")
    if sex not in ("F", "M"):
        found.append(f"sex = {sex!r} must be 'F' or 'M'")
    if not 3 <= ventricular_ml <= 160:
        found.append(f"ventricular_volume_ml = {ventricular_ml} is outside [3, 160]")
    if not 700 <= brain_ml <= 2000:
        found.append(f"brain_volume_ml = {brain_ml} is outside [700, 2000]")
    if seed < 0:
        found.append(f"seed = {seed} must not be negative")
    ends = [np.abs(np.array([o, o + n * mm]) - c) for o, n, mm, c in
            zip(volume.origin_mm, volume.shape_xyz, volume.spacing_mm, CENTRE_MM, strict=True)]  # fmt: skip
    if any(e.min() < need for e, need in zip(ends, (72, 92, 74), strict=True)) or max(volume.spacing_mm) > 8:
        found.append(
            f"a grid of {volume.shape_xyz} voxels of {volume.spacing_mm} mm at {volume.origin_mm} does not hold the"
            " brain in voxels of at most 8 mm; take phantom_grid(5.0, (32, 40, 32)) or a finer grid like it"
        )
    if found:
        raise problems_error("cannot build a phantom", found)


def make_phantom(
    age_years: float, sex: str, ventricular_volume_ml: float, brain_volume_ml: float, volume: VolumeSpec, seed: int
) -> Phantom:
    """One head with exactly these volumes (within 0.1 %) on this grid. Same arguments, same bytes.

    Raises:
        UserError: a value or a grid that no phantom has.
    """
    _check(age_years, sex, ventricular_volume_ml, brain_volume_ml, volume, seed)
    traits = _traits(age_years, sex, ventricular_volume_ml, seed)
    scale = 1.0
    coarse = phantom_grid(5.0, (34, 42, 34))
    for _ in range(2):
        fields = _anatomy(_axes(coarse, 1), traits, scale)
        _, brain, _ = _solve(fields, traits, 5.0 / scale, coarse.voxel_ml, ventricular_volume_ml, None)
        built = float(brain.sum(dtype=np.float64)) * coarse.voxel_ml
        scale *= ((brain_volume_ml + ventricular_volume_ml) / built) ** (1 / 3)
    split = 2 if min(volume.spacing_mm) > 3 else 1
    h = float(np.mean(volume.spacing_mm)) / split / scale
    fields = _anatomy(_axes(volume, split), traits, scale)
    vent, brain, shift = _solve(fields, traits, h, volume.voxel_ml / split**3, ventricular_volume_ml, brain_volume_ml)
    shares = _compose(fields, traits, h, vent, brain, shift)
    nx, ny, nz = volume.shape_xyz
    if split > 1:
        blocks = (nx, split, ny, split, nz, split)
        shares = {name: share.reshape(blocks).mean((1, 3, 5), dtype=np.float32) for name, share in shares.items()}
    fractions = {tissue: shares[tissue] for tissue in TISSUES}
    truth = {tissue: float(share.sum(dtype=np.float64)) * volume.voxel_ml for tissue, share in fractions.items()}
    truth |= {"ventricular_volume": truth["ventricle"], "brain_volume": truth["grey"] + truth["white"]}
    image = _render(shares, traits, volume, seed)
    return Phantom(image=image, fractions=fractions, truth=truth)


def _axes(volume: VolumeSpec, split: int) -> list[F32]:
    """World coordinates (mm) of the centres of the voxels, each cut in `split` along every axis."""
    return [(o + mm * ((np.arange(n * split) + 0.5) / split - 0.5)).astype(np.float32)
            for o, n, mm in zip(volume.origin_mm, volume.shape_xyz, volume.spacing_mm, strict=True)]  # fmt: skip


def write_phantom_cohort(
    folder: Path, n: int, seed: int, volume: VolumeSpec, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write `n` phantoms as a BIDS-like folder of NIfTI files (uint8, white matter near 205) and return the folder.

    Beside the scans it holds participants.tsv/.json, dataset_description.json and ventricle_prior.nii.gz, the cohort's
    mean ventricle share (float32). Run again, it returns at once if the cohort is complete, else it starts over.

    Raises:
        UserError: the folder holds something else.
    """
    folder = Path(folder)
    table = phantom_covariates(n, seed)
    identity = digest({"n": n, "seed": seed, "volume": to_dict(volume), "phantom": _VERSION})
    table["participant_id"] = [f"sub-{name.replace('-', '')}" for name in table["participant_id"]]
    scans = [folder / name / "anat" / f"{name}_T1w.nii.gz" for name in table["participant_id"]]
    prior_path = folder / "ventricle_prior.nii.gz"
    if _is_ours(folder, identity) and all(path.exists() for path in (prior_path, *scans)):
        return folder
    description = {"Name": "Procedural T1w head phantoms", "BIDSVersion": "1.9.0", "DatasetType": "raw",
                   "GeneratedBy": [{"Name": "brainsynth.cohort.phantom", "Version": str(_VERSION)}],
                   "PhantomCohort": {"n": n, "seed": seed, "identity": identity}}  # fmt: skip
    columns = {"age": ("age", "years"), "sex": ("sex, F or M", "n/a"),
               "ventricular_volume": ("volume of all ventricles, exact by construction", "ml"),
               "brain_volume": ("grey and white matter, no CSF, exact by construction", "ml")}  # fmt: skip
    units = {name: {"Description": text, "Units": unit} for name, (text, unit) in columns.items()}
    _replace(folder / "dataset_description.json", json.dumps(description, indent=2).encode() + b"\n")
    _replace(folder / "participants.json", json.dumps(units, indent=2).encode() + b"\n")
    _replace(folder / "participants.tsv", table.to_csv(sep="\t", index=False, lineterminator="\n").encode())
    _replace(folder / ".bidsignore", b"ventricle_prior.nii.gz\n")
    prior = np.zeros(volume.shape_xyz, np.float64)
    for i, (_, age, sex, vent, brain) in enumerate(table.itertuples(index=False)):
        phantom = make_phantom(age, sex, vent, brain, volume, seed=subject_seed(seed, i))
        prior += phantom.fractions["ventricle"]
        scan = np.rint(phantom.image * 255).astype(np.uint8)
        _replace(scans[i], _nifti(scan, volume))
        if progress is not None:
            progress(i + 1, n)
    _replace(prior_path, _nifti((prior / n).astype(np.float32), volume))
    return folder


def subject_seed(seed: int, i: int) -> int:
    """The seed of phantom `i` (from 0) of a cohort with this seed."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])


def _is_ours(folder: Path, identity: str) -> bool:
    """True where this very cohort was begun, False where nothing was. Raises UserError on anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / "dataset_description.json").read_bytes())["PhantomCohort"]
        same = found["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not empty and holds no phantom cohort; give an empty or new folder") from None
    if not same:
        raise UserError(
            f"{folder} holds another phantom cohort (n = {found.get('n')}, seed = {found.get('seed')}; or another grid"
            " or version); give another folder, or delete this one"
        )
    return True


def _nifti(voxels: npt.NDArray[Any], volume: VolumeSpec) -> bytes:
    """A .nii.gz file in mm, RAS+; equal voxels give equal bytes."""
    image = nib.Nifti1Image(voxels, volume.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(volume.affine, code="mni")
    image.set_qform(volume.affine, code="mni")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
