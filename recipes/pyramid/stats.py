"""Figures of drawn volumes against validation scans: power by frequency, gradients, asymmetry, nearest scan, spread.

    python -m recipes.pyramid.stats runs/pyramid/NAME.npz [--output runs/pyramid]

The file is what `python -m recipes.pyramid.chain NAME --save` writes. Few volumes give only a hint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recipes.pyramid.data import COHORTS, GRID, open_scans, to_8mm

Volumes = list[np.ndarray]
BANDS = (0, 0.03, 0.06, 0.09, 0.125, 0.17, 0.21, 0.25, 0.33, 0.42, 0.5)
"""Cycles a voxel."""
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.97)
VALIDATION = 27


def spectrum(volume: np.ndarray) -> np.ndarray:
    """Mean power in each band."""
    power = np.abs(np.fft.rfftn(volume - volume.mean())) ** 2
    axes = np.meshgrid(np.fft.fftfreq(GRID[0]), np.fft.fftfreq(GRID[1]), np.fft.rfftfreq(GRID[2]), indexing="ij")
    band = np.digitize(np.sqrt(sum(axis**2 for axis in axes)), BANDS)
    return np.array([power[band == j].mean() for j in range(1, len(BANDS))])


def gradients(volume: np.ndarray) -> np.ndarray:
    """Quantiles of their length inside the brain."""
    inner = (slice(1, -1),) * 3
    squares = sum((np.roll(volume, -1, axis) - np.roll(volume, 1, axis)) ** 2 for axis in range(3))
    return np.quantile((np.sqrt(squares)[inner] / 2)[volume[inner] > 0.3], QUANTILES)


def asymmetry(volume: np.ndarray, mean: np.ndarray) -> float:
    """Correlation of left minus right with that of the mean."""
    return float(np.corrcoef((volume - volume[::-1]).ravel(), (mean - mean[::-1]).ravel())[0, 1])


def at_8mm(volume: np.ndarray) -> np.ndarray:
    """As a vector."""
    return to_8mm(volume).ravel()


def at_4mm(volume: np.ndarray) -> np.ndarray:
    """As a vector."""
    x, y, z = (size // 2 for size in GRID)
    return volume.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5)).ravel()


def nearest(train: Volumes, volumes: Volumes, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """For each volume, the highest correlation of its residual with that of a training scan."""
    stored = np.stack([form(volume) for volume in train])
    mean = stored.mean(0)
    residuals = stored - mean
    residuals /= np.linalg.norm(residuals, axis=1, keepdims=True)
    own = [form(volume) - mean for volume in volumes]
    return np.array([(residuals @ (residual / np.linalg.norm(residual))).max() for residual in own])


def report(cohort: str, made: Volumes, real: Volumes, train: Volumes) -> None:
    """Print the figures of one cohort."""
    mean = np.mean(train, 0)
    for name, measure in (("power by frequency", spectrum), ("gradients", gradients)):
        ratio = np.mean([measure(v) for v in made], 0) / np.mean([measure(v) for v in real], 0)
        print(f"{cohort}, n = {len(made)}: {name} over real", np.round(ratio, 2))
    sides = [np.mean([asymmetry(v, mean) for v in volumes]) for volumes in (made, real)]
    print("  asymmetry, r with the mean: generated {:.2f}, real {:.2f}".format(*sides))
    for name, form in (("8 mm", at_8mm), ("4 mm", at_4mm)):
        generated, validation = (nearest(train, volumes, form) for volumes in (made, real))
        spread = np.std([form(v) for v in made], 0).mean() / np.std([form(v) for v in real], 0).mean()
        print(
            f"  {name}: nearest training scan, generated mean {generated.mean():.3f} max {generated.max():.3f}, "
            f"validation mean {validation.mean():.3f} max {validation.max():.3f}; SD between volumes over real {spread:.2f}"
        )


def main() -> None:
    """Both cohorts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/pyramid"))
    arguments = parser.parse_args()
    scans, stored = open_scans(arguments.output), np.load(arguments.volumes)
    for cohort in COHORTS:
        mine = (scans.table["cohort"] == cohort).to_numpy()
        made = [volume.astype(np.float32) for volume, row in zip(stored["x"], stored["row"], strict=True) if mine[row]]
        if made:
            splits = ([row for row in scans.rows(split) if mine[row]] for split in ("validation", "train"))
            real, train = ([scans.volumes[row].astype(np.float32) for row in rows] for rows in splits)
            report(cohort, made, real[:VALIDATION], train)


if __name__ == "__main__":
    main()
