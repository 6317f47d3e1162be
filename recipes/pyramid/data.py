"""The scans of the pyramid as arrays: brains only, IXI corrected by N4, white matter = 1; and the batches drawn from them.

    python -m recipes.pyramid.data [--data FOLDER] [--output runs/pyramid]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds ixi_2mm and oasis1_2mm. Needs the package
SimpleITK, which the lock does not hold. Writes into OUTPUT/data: table.csv (one row a scan), clean.npy, dseg.npy (label
maps, IXI only) and logbias_8mm.npy (what N4 removed). About 5 CPU minutes.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn import functional

from brainsynth.cohort.prepare import split_of
from recipes.pyramid.networks import CELLS, coordinates, pool, sided

GRID = (80, 112, 80)
COHORTS = ("ixi", "oasis1")
WHITE, GREY = 3, 2
FIRST_DEEP_LABEL = 4
"""Labels from here on are the ventricles' compartment in the label maps of IXI."""


@dataclass(frozen=True)
class Scans:
    """The table and what is stored for each of its rows; the arrays are memory-mapped."""

    table: pd.DataFrame
    volumes: np.ndarray
    labels: np.ndarray

    def rows(self, split: str | None) -> np.ndarray:
        """Rows of a split, or all of them."""
        return np.arange(len(self.table)) if split is None else np.where(self.table["split"] == split)[0]

    def volume(self, row: int) -> Tensor:
        """One scan with leading axes (1, 1)."""
        return torch.from_numpy(np.array(self.volumes[row], dtype=np.float32))[None, None]


def open_scans(output: Path) -> Scans:
    """What this recipe wrote into `output`."""
    folder = output / "data"
    labels, volumes = (np.load(folder / name, mmap_mode="r") for name in ("dseg.npy", "clean.npy"))
    return Scans(pd.read_csv(folder / "table.csv"), volumes, labels)


def context(table: pd.DataFrame) -> np.ndarray:
    """Eight numbers a scan: cohort, sex, age, log volumes (0 where unknown), and whether age and each volume are known."""
    cohort = (table["cohort"] == "ixi").to_numpy(float) * 2 - 1
    sex = table["sex"].map({"F": -1.0, "M": 1.0}).fillna(0).to_numpy()
    age = ((table["age"] - 50) / 25).to_numpy()
    ventricles = ((np.log(table["vent"]) - 3.2) / 0.7).to_numpy()
    brain = ((np.log(table["brain"]) - 7.1) / 0.12).to_numpy()
    measured = (age, ventricles, brain)
    columns = [cohort, sex, *map(np.nan_to_num, measured), *((~np.isnan(values)).astype(float) for values in measured)]
    return np.stack(columns, 1).astype(np.float32)


def degrade(coarse: Tensor, level: Tensor) -> Tensor:
    """White and smooth noise, inside the head only."""
    white, smooth = torch.randn_like(coarse), functional.avg_pool3d(torch.randn_like(coarse), 3, 1, 1) * 3.0
    inside = (functional.max_pool3d(coarse, 3, 1, 1) > 0.1).float()
    return functional.relu(coarse + level.view(-1, 1, 1, 1, 1) * (0.8 * white + 0.6 * smooth) * inside)


@dataclass
class Batch:
    """Crops: the target, its degraded and its exact average, the level of the noise, places and context."""

    target: Tensor
    degraded: Tensor
    coarse: Tensor
    level: Tensor
    places: Tensor
    context: Tensor

    @property
    def condition(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the generator and the critic see."""
        return self.degraded, self.level, self.places, self.context


class Crops:
    """Crops of both cohorts equally often, mirrored half of the time; `mid` also in every phase of the 4 mm grid."""

    def __init__(self, scans: Scans, stage: str, split: str | None, seed: int, cells: int = 16, noise: float = 0.08):
        self.scans, self.stage, self.cells, self.noise = scans, stage, cells, noise
        self.rows, self.random = scans.rows(split), np.random.default_rng(seed)
        self.contexts = torch.from_numpy(context(scans.table))
        ixi = (scans.table["cohort"] == "ixi").to_numpy()[self.rows]
        weight = np.where(ixi, 1 / ixi.sum(), 1 / (~ixi).sum())
        self.share = weight / weight.sum()

    def one(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target, context and places of one crop."""
        random, factor = self.random, 2 if self.stage == "fine" else 4
        row = random.choice(self.rows, p=self.share)
        grid = [size // factor for size in GRID]
        shape = [min(self.cells, size) for size in grid]
        volume = self.scans.volumes[row]
        if random.random() < 0.5:
            volume = volume[::-1]
        if self.stage == "mid":
            volume = np.roll(volume, random.integers(-1, 3, 3), (0, 1, 2))  # air all around: nothing else wraps
        for _ in range(20):
            origin = [int(random.integers(0, size - length + 1)) for size, length in zip(grid, shape, strict=True)]
            window = (slice(o * factor, (o + n) * factor) for o, n in zip(origin, shape, strict=True))
            crop = volume[tuple(window)]
            if (crop[::4, ::4, ::4] > 0.1).mean() > 0.35:
                break
        target = torch.from_numpy(np.ascontiguousarray(crop, dtype=np.float32))[None, None]
        target = pool(target) if self.stage == "mid" else target
        return target[0], self.contexts[row], coordinates(shape, origin, grid)

    def batch(self, count: int) -> Batch:
        """Crops with noise on their coarse volumes; a fifth has none."""
        target, contexts, places = map(torch.stack, zip(*[self.one() for _ in range(count)], strict=True))
        coarse = pool(target)
        level = self.random.random(count) * self.noise * (self.random.random(count) > 0.2)
        noised = torch.from_numpy(level.astype(np.float32))
        return Batch(target, degrade(coarse, noised), coarse, noised, places, contexts)


class Warps:
    """Whole brains at 8 mm: mirrored, and warped smoothly at 2 mm with the volumes of the context recomputed."""

    def __init__(self, scans: Scans, split: str | None, seed: int, amount: float = 2.5):
        self.scans, self.amount, self.random = scans, amount, np.random.default_rng(seed)
        self.rows, self.contexts = scans.rows(split), context(scans.table)
        ixi = (scans.table["cohort"] == "ixi").to_numpy()[self.rows]
        share = np.where(ixi, 0.5 / ixi.sum() + 0.5 / len(ixi), 0.5 / (~ixi).sum() + 0.5 / len(ixi))
        self.share = share / share.sum()
        table = scans.table
        labelled = np.where((table["cohort"] == "ixi") & (table["split"] == "train"))[0][::4]
        self.ventricles = _density(np.mean([scans.labels[row] >= FIRST_DEEP_LABEL for row in labelled], 0))
        self.brain = _density(np.mean([np.isin(scans.labels[row], (GREY, WHITE)) for row in labelled], 0))

    def one(self) -> tuple[Tensor, Tensor]:
        """One volume and its context, whose ninth number says which way round the scan is."""
        row = self.random.choice(self.rows, p=self.share)
        volume, numbers, side = self.scans.volumes[row], self.contexts[row].copy(), 1.0
        if self.random.random() < 0.5:
            volume, side = np.roll(volume[::-1], 1, 0), -1.0  # x = 0 is at voxel 40
        numbers = np.append(numbers, np.float32(side))
        warped = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None]
        if self.amount > 0:
            warped = self._warp(warped, numbers)
        return functional.avg_pool3d(warped, 4)[0], torch.from_numpy(numbers)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Volumes and contexts."""
        volumes, contexts = zip(*[self.one() for _ in range(count)], strict=True)
        return torch.stack(volumes), torch.stack(contexts)

    def _warp(self, volume: Tensor, numbers: np.ndarray) -> Tensor:
        """The volume moved by a smooth field in mm; changes the volumes among the numbers in place."""
        random = torch.Generator().manual_seed(int(self.random.integers(2**31)))
        amplitudes = (((5, 7, 5), 0.6), ((9, 12, 9), 0.4), ((2, 2, 2), 0.4))
        field: Any = 0
        for nodes, share in amplitudes:
            waves = torch.randn(1, 3, *nodes, generator=random) * (self.amount * share)
            field = field + functional.interpolate(waves, size=CELLS, mode="trilinear", align_corners=True)
        divergence = (
            functional.pad(field[:, 0:1, 2:] - field[:, 0:1, :-2], (0, 0, 0, 0, 1, 1))
            + functional.pad(field[:, 1:2, :, 2:] - field[:, 1:2, :, :-2], (0, 0, 1, 1))
            + functional.pad(field[:, 2:3, :, :, 2:] - field[:, 2:3, :, :, :-2], (1, 1))
        )[0, 0] / 16
        if numbers[6] > 0:
            numbers[3] -= float((divergence * self.ventricles).sum()) / 0.7
        if numbers[7] > 0:
            numbers[4] -= float((divergence * self.brain).sum()) / 0.12
        moved = functional.interpolate(field, size=GRID, mode="trilinear", align_corners=False)[0]
        x, y, z = torch.meshgrid(*[(torch.arange(n) + 0.5) / n * 2 - 1 for n in GRID], indexing="ij")
        grid = torch.stack([z + moved[2] / GRID[2], y + moved[1] / GRID[1], x + moved[0] / GRID[0]], -1)[None]
        return functional.grid_sample(volume, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def held_out(scans: Scans, split: str, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Unwarped volumes at 8 mm and their contexts."""
    rows = np.random.default_rng(seed).permutation(scans.rows(split))[:count]
    volumes = torch.cat([functional.avg_pool3d(scans.volume(row), 4) for row in rows])
    return volumes, sided(torch.from_numpy(context(scans.table)[rows]))


def to_8mm(volume: np.ndarray) -> np.ndarray:
    """Averages of 4×4×4 voxels."""
    x, y, z = CELLS
    return volume.reshape(x, 4, y, 4, z, 4).mean((1, 3, 5))


def _density(volume: np.ndarray) -> Tensor:
    """At 8 mm, with sum 1."""
    density = torch.from_numpy(to_8mm(volume).astype(np.float32))
    return density / density.sum()


def participants(data: Path) -> tuple[pd.DataFrame, list[Path], list[Path | None]]:
    """The table of both cohorts, the scans and the label maps."""
    ixi = pd.read_csv(data / "ixi_2mm" / "participants.tsv", sep="\t")
    oasis = pd.read_csv(data / "oasis1_2mm" / "participants.tsv", sep="\t")
    oasis = oasis[oasis["qc"] != "fail"]
    first = {"id": ixi["participant_id"], "subject": ixi["participant_id"], "cohort": "ixi"}
    first |= {"age": ixi["age"], "sex": ixi["sex"], "vent": ixi["vent_ml"], "brain": ixi["brain_ml"]}
    name = oasis["participant_id"].astype(str) + "_" + oasis["session"].astype(str)
    second = {"id": name, "subject": oasis["participant_id"], "cohort": "oasis1", "age": oasis["age"]}
    second |= {"sex": oasis["sex"], "vent": oasis["vent_mni_ml"], "brain": oasis["brain_mni_ml"]}
    table = pd.concat([pd.DataFrame(first), pd.DataFrame(second)], ignore_index=True)
    for column in ("age", "vent", "brain"):
        table[column] = pd.to_numeric(table[column], errors="coerce")
    table["split"] = [split_of(subject, 0, 0.2) for subject in table["subject"]]
    scans = [data / "ixi_2mm" / path for path in ixi["t1w"]] + [data / "oasis1_2mm" / path for path in oasis["t1w"]]
    labels = [data / "ixi_2mm" / path for path in ixi["dseg"]]
    return table, scans, [*labels, *[None] * len(oasis)]


def corrected(scan: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An IXI scan after N4 with white matter = 1, and the logarithm of what was divided out, relative to white matter."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(scan)
    tissue = SimpleITK.GetImageFromArray(np.isin(labels, (GREY, WHITE)).astype(np.uint8))
    n4 = SimpleITK.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([25, 25, 15])
    n4.Execute(SimpleITK.Shrink(image, [2] * 3), SimpleITK.Shrink(tissue, [2] * 3))
    bias = SimpleITK.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image))
    flat = scan / np.exp(bias) * (labels > 0)
    white = _mode(flat[labels == WHITE])
    return np.clip(flat / white, 0, 2), bias + np.log(white / _mode(scan[labels == WHITE]))


def scaled(scan: np.ndarray) -> np.ndarray:
    """An OASIS-1 scan with its white matter, the last peak of the histogram, at 1; 1.045 is the usual place of that peak."""
    counts, edges = np.histogram(scan[scan > 0.1], bins=260, range=(0.2, 1.5))
    counts = gaussian_filter1d(counts.astype(float), 5)
    high = 0.3 * counts.max()
    peaks = [
        j
        for j in range(1, 259)
        if counts[j - 1] < counts[j] >= counts[j + 1] and 0.88 < edges[j] < 1.25 and counts[j] > high
    ]
    return np.clip((scan / (edges[peaks[-1]] if peaks else 1.045)).astype(np.float16), 0, 1.5)


def _mode(values: np.ndarray) -> float:
    limits = (np.percentile(values, 2), np.percentile(values, 99.5))
    counts, edges = np.histogram(values, bins=400, range=limits)
    return float(edges[gaussian_filter1d(counts.astype(float), 6).argmax()])


def _read(path: Path) -> np.ndarray:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj, dtype=np.float32)


def prepare(scan: Path, labels: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scan, its label map and the logarithm of its bias field at 8 mm; both are zero for OASIS-1."""
    if labels is None:
        stored = _read(scan).astype(np.float16).astype(np.float32)
        return scaled(stored), np.zeros(GRID, np.uint8), np.zeros(CELLS, np.float32)
    dseg = _read(labels).astype(np.uint8)
    clean, bias = corrected((_read(scan) * (dseg > 0)).astype(np.float16).astype(np.float32), dseg)
    return clean, dseg, to_8mm(bias)


def main() -> None:
    """Write the arrays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=os.environ.get("BRAINSYNTH_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--output", type=Path, default=Path("runs/pyramid"))
    arguments = parser.parse_args()
    table, scans, labels = participants(Path(arguments.data).resolve())
    print(table.groupby(["cohort", "split"]).size())
    folder = arguments.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "table.csv", index=False)
    forms = {"clean": (np.float16, GRID), "dseg": (np.uint8, GRID), "logbias_8mm": (np.float32, CELLS)}
    arrays = [
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(len(table), *shape))
        for name, (kind, shape) in forms.items()
    ]
    for row, (scan, dseg) in enumerate(zip(scans, labels, strict=True)):
        for array, values in zip(arrays, prepare(scan, dseg), strict=True):
            array[row] = values
    for array in arrays:
        array.flush()


if __name__ == "__main__":
    main()
