"""Real scans for the tests and the benchmark of the gate: IXI, and the half of OASIS-1 that the gate was not built on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from brainsynth.cohort.intensity import scale_intensities
from brainsynth.volume import VolumeSpec, resample

COARSE = VolumeSpec(shape_xyz=(40, 56, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-79.0, -127.0, -71.0))
FOLDERS = {"OASIS-1": "oasis1_2mm", "IXI": "ixi_2mm"}
FINE = VolumeSpec(shape_xyz=(80, 112, 80), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(-80.0, -128.0, -72.0))
GRIDS = {"2 mm": FINE, "4 mm": COARSE}


def load(path: Path) -> tuple[np.ndarray, VolumeSpec]:
    """Intensities and grid of a file that is stored in RAS+ without rotation."""
    image: Any = nib.as_closest_canonical(nib.load(path))
    spacing, origin = np.diag(image.affine)[:3].tolist(), image.affine[:3, 3].tolist()
    return np.asarray(image.dataobj, np.float32), VolumeSpec(
        shape_xyz=image.shape, spacing_mm=tuple(spacing), origin_mm=tuple(origin)
    )


def brain(row: Any) -> tuple[np.ndarray, VolumeSpec]:
    """The scan of a row without skull: IXI's by its label map, OASIS-1's is stored so."""
    image, grid = load(Path(row.folder) / row.t1w)
    return (image * (load(Path(row.folder) / row.dseg)[0] > 0) if hasattr(row, "dseg") else image), grid


def development(ids: list[str]) -> set[str]:
    """The half of the OASIS-1 subjects on which the gate was built: never reported on."""
    ordered = sorted(ids)
    return set(np.random.default_rng(2024).permutation(ordered)[: len(ordered) // 2])


def scans(data: Path, cohort: str) -> pd.DataFrame:
    """Sessions to report on, with `good` for those that make the gate and count as false rejects."""
    table = pd.read_csv(data / FOLDERS[cohort] / "participants.tsv", sep="\t").assign(
        folder=str(data / FOLDERS[cohort])
    )
    if cohort == "IXI":
        return table.assign(good=True, qc="ok")
    kept = table.assign(good=(table.qc != "fail") & ~table.participant_id.duplicated())
    seen = development(table.participant_id.unique().tolist())
    return kept[~kept.participant_id.isin(seen) | (kept.qc != "ok")].assign(
        good=lambda t: t.good & ~t.participant_id.isin(seen)
    )


def prepared(row: Any, grid: VolumeSpec) -> np.ndarray:
    """The scan as a prepared cohort stores it: on the grid, in [0, 1], rounded."""
    image, source = brain(row)
    scaled = scale_intensities(resample(image, source.affine, grid), (0.0, 99.8))
    return grid.as_stored(scaled)
