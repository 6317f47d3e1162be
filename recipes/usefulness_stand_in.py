"""Runs the usefulness instrument on real scans at 4 mm, other real scans in place of synthetic ones; prints Markdown.

    python -m recipes.usefulness_stand_in [--data FOLDER] [--seeds 3]

A third of the IXI subjects is the test set. Age and sex: OASIS-1 stands in for synthetic data, so a real stand-in from
another scanner, registration and population shows how the instrument reacts to such a shift. Lateral ventricles (labels of
IXI): half of the training subjects stand in. About 20 minutes on one shared core.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from brainsynth.config.evaluation import UsefulnessConfig
from brainsynth.usefulness.arms import UsefulnessResult, run_usefulness
from brainsynth.volume import VolumeSpec, resample

GRID = VolumeSpec(shape_xyz=(40, 56, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-79.0, -127.0, -71.0))
LATERAL = 4


def scans(folder: Path) -> tuple[pd.DataFrame, np.ndarray, np.ndarray | None]:
    """Table, skull-stripped volumes and lateral ventricles (IXI) on the 4 mm grid."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t").dropna(subset=["age", "sex"])
    if "qc" in table:
        table = table[table["qc"] != "fail"]
    volumes, marks = [], []
    for row in table.itertuples():
        image: Any = nib.load(folder / str(row.t1w))
        brain = np.asarray(image.dataobj, np.float32)
        if hasattr(row, "dseg"):
            label = np.asarray(nib.load(folder / str(row.dseg)).dataobj)
            brain = brain * (label > 0)
            share = (label == LATERAL).reshape(40, 2, 56, 2, 40, 2).mean((1, 3, 5))  # both grids share their edges
            marks.append(share >= 0.5)
        volumes.append(resample(brain, image.affine, GRID))
    return table.reset_index(drop=True), np.stack(volumes), np.stack(marks) if marks else None


def rows(found: UsefulnessResult) -> list[str]:
    """One line a metric: chance, the four arms, two differences; over seeds, then over test people in brackets."""
    lines = []
    parts = [*found.arms, *found.differences[:2]]
    for metric, chance in found.chance.items():
        cells = []
        for part in parts:
            e = part.metrics[metric]
            cells.append(f"{e.mean:.2f} ({e.low:.2f}, {e.high:.2f}) [{e.people_low:.2f}, {e.people_high:.2f}]")
        lines.append(f"| {found.task}, {metric} | {chance:.2f} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = UsefulnessConfig(seeds=tuple(range(a.seeds)))
    table, volumes, marks = scans(a.data / "ixi_2mm")
    other, others, _ = scans(a.data / "oasis1_2mm")
    assert marks is not None
    order = np.random.default_rng(5).permutation(len(table))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    half = train[::2]
    people = table["participant_id"].to_numpy()
    tasks: tuple[tuple[Any, Any, Any, Any], ...] = (
        ("continuous", others, other["age"].to_numpy(), table["age"].to_numpy()),
        ("binary", others, other["sex"].to_numpy() == "M", table["sex"].to_numpy() == "M"),
        ("segmentation", volumes[half], marks[half], marks),
    )
    print(
        "| task | chance | real | stand-in | few real | few real + stand-in | stand-in - real | what it adds to few |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for task, made, made_labels, labels in tasks:
        found = run_usefulness(
            task,
            made,
            made_labels,
            volumes[train],
            labels[train],
            volumes[test],
            labels[test],
            config,
            real_train_groups=people[train],
            real_test_groups=people[test],
        )
        print("\n".join(rows(found)), flush=True)
        print({arm.name: (arm.n_real, arm.n_synthetic) for arm in found.arms}, "test", found.n_test, flush=True)


if __name__ == "__main__":
    main()
