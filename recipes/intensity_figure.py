"""The figure of docs/cohort.md: one procedural head as it is stored in five ways, by both intensity rules.

python -m recipes.intensity_figure [--output docs/images/intensity-rule.png]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np

from brainsynth.cohort.intensity import robust_brightness, robust_white, scale_intensities
from brainsynth.cohort.phantom import phantom_grid
from brainsynth.cohort.phantom_cohort import write_phantom_cohort


def scans(head: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The head, and what programs make of it."""
    dark, hot = head.copy(), head.copy()
    dark[30, 30, 10], hot[30, 30, 10] = -32767, 120 * head.max()
    padded = head.copy()
    padded[:, :14], padded[:, :, :10] = -1000, -1000
    inside = head > 0.15 * head.max()
    scored = np.where(inside, (head - head[inside].mean()) / head[inside].std(), 0)
    return {"as it is": head, "one voxel of -32767": dark, "one bright voxel": hot, "padded with -1000": padded,
            "z-scored, background 0": scored}  # fmt: skip


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/intensity-rule.png"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        root = write_phantom_cohort(Path(folder) / "bids", 1, 3, phantom_grid(3.0, (56, 72, 56)))
        head = nib.load(next(root.rglob("*_T1w.nii.gz"))).get_fdata(dtype=np.float32)
    figure, axes = plt.subplots(2, 5, figsize=(10, 3.6), constrained_layout=True)
    for column, (name, image) in enumerate(scans(head).items()):
        data = image.astype(np.float32)
        former = scale_intensities(data, (0.0, 99.8))
        robust = robust_white(robust_brightness(data).voxels, 99.8)
        for row, (rule, volume) in enumerate((("percentiles", former), ("robust", robust))):
            axis = axes[row, column]
            axis.imshow(volume[28].T, cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=9)
            if column == 0:
                axis.set_ylabel(rule)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    main()
