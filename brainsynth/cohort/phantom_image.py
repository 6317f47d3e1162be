"""The tissues of a phantom head from its shapes, and their T1w image: contrast, texture, bias field, Rician noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from brainsynth.cohort.phantom_anatomy import ARCH, F32, Traits, ellipsoid, ramp, union
from brainsynth.volume import VolumeSpec


def _white(a: dict[str, Any], traits: Traits, h: float, shift: float) -> F32:
    """Share of the brain that is white matter: under the cortex, without the deep grey, with callosum and brainstem."""
    p = a["p"]
    ax = np.abs(p[0])
    pial = np.minimum(a["hull"], -a["sulci"]) + np.float32(shift)
    white = ramp(pial - np.float32(traits.cortex_mm), h)
    # The cerebellum's white core sends branches into the folia.
    core = np.minimum(a["cerebellum"] - 7.5 - 6 * (1 - a["wave"]), 0.9 * pial - 1.5)
    white = np.where(a["cerebellum"] > a["cerebrum"], ramp(core, h), white)
    out = 2.0 * (traits.ventricle_growth - 1)
    near = np.flatnonzero((ax < 40) & (np.abs(p[1]) < 40) & (np.abs(p[2]) < 32))
    q = tuple(v.reshape(-1)[near] for v in (ax, p[1], p[2]))
    deep = np.ones(near.size, np.float32)
    for centre, semi, share in (((10 + out / 2, -18, 6), (9, 14, 8), 0.65), ((13 + out, 15 - out, 7), (6, 12, 9), 0.9),
                                ((15 + out, -2, 19 + out / 2), (3.5, 14, 4.5), 0.9), ((25, 1, 1), (5, 16, 9), 0.85),
                                ((0, -8, 3), (6, 26, 14), 0.75), ((27, -18, -17), (7, 18, 6), 0.9)):  # fmt: skip
        deep *= 1 - np.float32(share) * ramp(ellipsoid(q, centre, semi), h)
    white.reshape(-1)[near] *= deep
    white = np.maximum(white, ramp(np.minimum(a["stem"], -4 - p[2]), h))
    arch = ellipsoid(p, ARCH[0], ARCH[1])
    callosum = np.minimum(np.minimum(3.2 - np.abs(arch + 0.5), 16 - ax), p[2] - 1)
    return np.maximum(white, ramp(callosum, h))


def compose_tissues(a: dict[str, Any], traits: Traits, h: float, vent: F32, brain: F32, shift: float) -> dict[str, F32]:
    """Shares of every tissue; also `marrow` (in the skull), `eyes` and `depth` (mm below the skin)."""
    p = a["p"]
    white = np.minimum(_white(a, traits, h, shift), 1) * brain * (1 - vent)
    grey = brain * (1 - vent) - white
    dura = union(a["cerebrum"], a["hind"], 10) + np.float32(max(2.0, shift + 1.0))
    inside = np.maximum(ramp(dura, h), np.maximum(brain, vent))
    thick = 3 + np.float32(traits.skull_mm - 3) * np.clip((p[2] + 20) / 25, 0, 1)  # the skull base is thin
    outer = dura + thick
    face = union(ellipsoid(p, (0, 14, -58), (64, 76, 58)), ellipsoid(p, (0, -52, -95), (62, 56, 84)), 10)
    depth = union(outer + np.float32(traits.scalp_mm), face, 14)
    bone = np.maximum(ramp(outer, h), inside)
    head = np.maximum(ramp(depth, h), bone)
    nose = ramp(ellipsoid(p, (0, 48, -50), (12, 24, 15)), h) * (head - bone)
    eyes = ramp(ellipsoid((np.abs(p[0]), p[1], p[2]), (32, 56, -34), (12, 12, 12)), h)
    marrow = ramp(np.minimum(outer - 1.6, -dura - 1.4) * 1.5, h)
    return {"air": 1 - head + nose, "scalp": head - bone - nose, "skull": bone - inside,
            "csf": inside - brain - vent + brain * vent, "grey": grey, "white": white, "ventricle": vent,
            "depth": depth, "eyes": eyes, "marrow": marrow}  # fmt: skip


def render_t1w(f: dict[str, F32], traits: Traits, volume: VolumeSpec, seed: int) -> F32:
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
    magnitude: F32 = np.clip(np.hypot(image + noise[0], noise[1]), 0, 1, dtype=np.float32)
    return magnitude
