"""Procedural T1w head phantoms whose tissue volumes are known exactly, because they are built and not measured.

A phantom is a stack of implicit shapes (phantom_anatomy.py): head, skull, intracranial space, folded brain, ventricles.
They are solved for the asked volumes on the asked grid and rendered (phantom_image.py); phantom_cohort.py writes many
of them as a BIDS folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.cohort.phantom_anatomy import CENTRE_MM, F32, build_anatomy, draw_traits, solve_volumes
from brainsynth.cohort.phantom_image import compose_tissues, render_t1w
from brainsynth.errors import UserError, problems_error
from brainsynth.labels import Label, LabelTable
from brainsynth.volume import VolumeSpec

TISSUES = ("air", "scalp", "skull", "csf", "grey", "white", "ventricle")
LABELS = LabelTable(
    labels=(
        Label(index=1, name="CSF", abbreviation="CSF", color="#3c70c8"),
        Label(index=2, name="Grey-Matter", abbreviation="GM", color="#cd3e4e"),
        Label(index=3, name="White-Matter", abbreviation="WM", color="#f5f5f5"),
        Label(index=4, name="Ventricles", abbreviation="LV", color="#781286"),
    ),
    source="the phantoms' construction",
)
_LABELLED = ("csf", "grey", "white", "ventricle")
VERSION = 1  # raise it when a phantom of the same arguments changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """A T1w image and its construction."""

    image: F32
    """(X, Y, Z) intensity in [0, 1]."""
    fractions: dict[str, F32]
    """(X, Y, Z) share of the voxel, in [0, 1], for each of `TISSUES`; they sum to 1."""
    truth: dict[str, float]
    """ml for each of `TISSUES`, and `ventricular_volume` and `brain_volume` (grey + white) as in the covariates."""

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """(X, Y, Z) label map by `LABELS`: the tissue with the largest share of each voxel."""
        outside = sum(share for tissue, share in self.fractions.items() if tissue not in _LABELLED)
        shares = [outside, *(self.fractions[tissue] for tissue in _LABELLED)]
        largest: npt.NDArray[np.uint8] = np.argmax(np.stack(shares), axis=0).astype(np.uint8)
        return largest


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


def _check(age_years: float, sex: str, ventricular_ml: float, brain_ml: float, volume: VolumeSpec, seed: int) -> None:
    problems = []
    if not 5 <= age_years <= 110:
        problems.append(f"age_years = {age_years} is outside [5, 110]")
    if sex not in ("F", "M"):
        problems.append(f"sex = {sex!r} must be 'F' or 'M'")
    if not 3 <= ventricular_ml <= 160:
        problems.append(f"ventricular_volume_ml = {ventricular_ml} is outside [3, 160]")
    if not 700 <= brain_ml <= 2000:
        problems.append(f"brain_volume_ml = {brain_ml} is outside [700, 2000]")
    if seed < 0:
        problems.append(f"seed = {seed} must not be negative")
    ends = [np.abs(np.array([o, o + n * mm]) - c) for o, n, mm, c in
            zip(volume.origin_mm, volume.shape_xyz, volume.spacing_mm, CENTRE_MM, strict=True)]  # fmt: skip
    if any(e.min() < need for e, need in zip(ends, (72, 92, 74), strict=True)) or max(volume.spacing_mm) > 8:
        problems.append(
            f"a grid of {volume.shape_xyz} voxels of {volume.spacing_mm} mm at {volume.origin_mm} does not hold the"
            " brain in voxels of at most 8 mm; take phantom_grid(5.0, (32, 40, 32)) or a finer grid like it"
        )
    if problems:
        raise problems_error("cannot build a phantom", problems)


def make_phantom(
    age_years: float, sex: str, ventricular_volume_ml: float, brain_volume_ml: float, volume: VolumeSpec, seed: int
) -> Phantom:
    """One head with exactly these volumes (within 0.1 %) on this grid. Same arguments, same bytes.

    Raises:
        UserError: a value or a grid that no phantom has.
    """
    _check(age_years, sex, ventricular_volume_ml, brain_volume_ml, volume, seed)
    traits = draw_traits(age_years, sex, ventricular_volume_ml, seed)
    scale = 1.0
    coarse = phantom_grid(5.0, (34, 42, 34))
    for _ in range(2):
        fields = build_anatomy(_axes(coarse, 1), traits, scale)
        _, brain, _ = solve_volumes(fields, traits, 5.0 / scale, coarse.voxel_ml, ventricular_volume_ml, None)
        built = float(brain.sum(dtype=np.float64)) * coarse.voxel_ml
        scale *= ((brain_volume_ml + ventricular_volume_ml) / built) ** (1 / 3)
    split = 2 if min(volume.spacing_mm) > 3 else 1
    h = float(np.mean(volume.spacing_mm)) / split / scale
    fields = build_anatomy(_axes(volume, split), traits, scale)
    vent, brain, shift = solve_volumes(
        fields, traits, h, volume.voxel_ml / split**3, ventricular_volume_ml, brain_volume_ml
    )
    shares = compose_tissues(fields, traits, h, vent, brain, shift)
    nx, ny, nz = volume.shape_xyz
    if split > 1:
        blocks = (nx, split, ny, split, nz, split)
        shares = {name: share.reshape(blocks).mean((1, 3, 5), dtype=np.float32) for name, share in shares.items()}
    fractions = {tissue: shares[tissue] for tissue in TISSUES}
    truth = {tissue: float(share.sum(dtype=np.float64)) * volume.voxel_ml for tissue, share in fractions.items()}
    truth |= {"ventricular_volume": truth["ventricle"], "brain_volume": truth["grey"] + truth["white"]}
    image = render_t1w(shares, traits, volume, seed)
    return Phantom(image=image, fractions=fractions, truth=truth)


def _axes(volume: VolumeSpec, split: int) -> list[F32]:
    """World coordinates (mm) of the centres of the voxels, each cut in `split` along every axis."""
    return [(o + mm * ((np.arange(n * split) + 0.5) / split - 0.5)).astype(np.float32)
            for o, n, mm in zip(volume.origin_mm, volume.shape_xyz, volume.spacing_mm, strict=True)]  # fmt: skip


def subject_seed(seed: int, i: int) -> int:
    """The seed of phantom `i` (from 0) of a cohort with this seed."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])
