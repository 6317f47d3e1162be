"""Fit the local contrast of a bundle's rendered volumes to that of scans: a copy of the bundle whose renderer has it.

    brainsynth generate --count 128 --output runs/rendered          # by a renderer that has no tone yet
    python -m recipes.renderer_tone runs/rendered --cohort runs/t1w-2mm/cohort --bundle t1w-2mm --output runs/with-tone

Curves are of the volumes and the cohort's training scans of each category of `--by`, up to `--volumes` of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np

from brainsynth.bundle.files import bundle_folder
from brainsynth.bundle.renderer import RENDERER, LocalTone
from brainsynth.models.local_tone import fit_curves
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store


def volumes_of(dataset: SyntheticDataset, by: str, category: str, at_most: int) -> list[np.ndarray]:
    """Evenly spaced ones."""
    rows = np.flatnonzero(dataset.table[by].astype(str) == category)
    return [dataset.volume(int(row)) for row in rows[:: max(1, -(-len(rows) // at_most))]]


def main() -> None:
    """Read, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--bundle", required=True, help="with the renderer that made the dataset")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--by", default="cohort", help="a covariate with categories")
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 1.2], help="in voxels, in their order")
    parser.add_argument("--volumes", type=int, default=80, help="of each category, at most")
    arguments = parser.parse_args()
    folder, by = bundle_folder(arguments.bundle), arguments.by
    spec = RENDERER.read(folder)
    categories = {c.name: c.categories for c in spec.covariates.covariates}.get(by)
    if not categories:
        parser.error(f"--by: {by} is not a covariate with categories")
    if arguments.output.exists():
        parser.error(f"--output: {arguments.output} exists")
    if spec.tone is not None:
        parser.error(f"--bundle: the renderer of {folder} has a tone already; fit it on volumes of one that has none")
    if read_plan(open_store(arguments.dataset)).identity.get("renderer") != spec.digest:
        parser.error(f"{arguments.dataset} was not made by the renderer of {folder} (decoder: rendered)")
    made, scans = open_dataset(arguments.dataset), open_dataset(arguments.cohort, split="train")
    curves = {}
    for category in categories:
        groups = [volumes_of(dataset, by, category, arguments.volumes) for dataset in (made, scans)]
        if not all(groups):
            parser.error(f"{by} {category}: {len(groups[0])} volumes and {len(groups[1])} scans; both are needed")
        curves[category] = fit_curves(groups[0], groups[1], arguments.scales)
        for curve in curves[category]:
            dark = len(curve.made) // 4
            print(category, f"scale {curve.scale:g}: {curve.made[dark]:.3f} becomes {curve.scans[dark]:.3f}")
    shutil.copytree(folder, arguments.output)
    toned = dataclasses.replace(spec, tone=LocalTone(by=by, curves=curves))
    RENDERER.write(arguments.output, toned, (folder / RENDERER.file).read_bytes())


if __name__ == "__main__":
    main()
