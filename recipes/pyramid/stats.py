"""Figures of generated volumes against validation scans: power by frequency, gradients, asymmetry, nearest scan, spread.

    python -m recipes.pyramid.stats DATASET [--cohort runs/t1w-2mm/cohort] [--by cohort] [--picture FILE.png]

`--by` names a covariate by whose values both are split. The picture shows scans (left) and generated volumes (right) in
three planes, 2 pixels a voxel; it shows real people: do not publish it. Few volumes give only a hint.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from brainsynth.reading.dataset import SyntheticDataset, open_dataset

Volumes = list[np.ndarray]
BANDS = (0, 0.03, 0.06, 0.09, 0.125, 0.17, 0.21, 0.25, 0.33, 0.42, 0.5)
"""Cycles a voxel."""
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.97)
AT_MOST, SHOWN, ZOOM, WHITE_LEVEL = 32, 6, 2, 0.95


def spectrum(volume: np.ndarray) -> np.ndarray:
    """Mean power in each band."""
    power = np.abs(np.fft.rfftn(volume - volume.mean())) ** 2
    x, y, z = volume.shape
    axes = np.meshgrid(np.fft.fftfreq(x), np.fft.fftfreq(y), np.fft.rfftfreq(z), indexing="ij")
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


def averaged(volume: np.ndarray, factor: int) -> np.ndarray:
    """Averages of factor³ voxels, as a vector."""
    x, y, z = (size // factor for size in volume.shape)
    return volume.reshape(x, factor, y, factor, z, factor).mean((1, 3, 5)).ravel()


def nearest(train: Volumes, volumes: Volumes, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """For each volume, the highest correlation of its residual with that of a training scan."""
    stored = np.stack([form(volume) for volume in train])
    mean = stored.mean(0)
    residuals = stored - mean
    residuals /= np.linalg.norm(residuals, axis=1, keepdims=True)
    own = [form(volume) - mean for volume in volumes]
    return np.array([(residuals @ (residual / np.linalg.norm(residual))).max() for residual in own])


def report(group: str, made: Volumes, real: Volumes, train: Volumes) -> None:
    """Print the figures of one group."""
    mean = np.mean(train, 0)
    for name, measure in (("power by frequency", spectrum), ("gradients", gradients)):
        ratio = np.mean([measure(v) for v in made], 0) / np.mean([measure(v) for v in real], 0)
        print(f"{group}, n = {len(made)}: {name} over real", np.round(ratio, 2))
    sides = [np.mean([asymmetry(v, mean) for v in volumes]) for volumes in (made, real)]
    print("  asymmetry, r with the mean: generated {:.2f}, real {:.2f}".format(*sides))
    for factor in (4, 2):
        form = functools.partial(averaged, factor=factor)
        generated, validation = (nearest(train, volumes, form) for volumes in (made, real))
        spread = np.std([form(v) for v in made], 0).mean() / np.std([form(v) for v in real], 0).mean()
        print(f"  averages of {factor}³ voxels: SD between volumes over real {spread:.2f}; nearest scan, mean and max:")
        for name, r in (("generated", generated), ("validation", validation)):
            print(f"    {name} {r.mean():.3f} {r.max():.3f}")


def planes(volume: np.ndarray) -> np.ndarray:
    """Three planes side by side."""
    x, y, z = (size // 2 for size in volume.shape)
    shown = [volume[x - x // 4].T[::-1], volume[:, y].T[::-1], volume[:, :, z].T[::-1]]
    height = max(len(plane) for plane in shown)
    return np.concatenate([np.pad(plane, ((0, height - len(plane)), (0, 2))) for plane in shown], 1)


def volumes(dataset: SyntheticDataset, group: str, by: str | None, at_most: int | None = None) -> Volumes:
    """Those of one value of a covariate."""
    rows = np.arange(len(dataset)) if by is None else np.flatnonzero(dataset.table[by].astype(str) == group)
    return [dataset.volume(int(row)) for row in rows[:at_most]]


def main() -> None:
    """Each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--cohort", default="runs/t1w-2mm/cohort")
    parser.add_argument("--by", help="a covariate")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    dataset, by = open_dataset(arguments.dataset), arguments.by
    train, validation = (open_dataset(arguments.cohort, split=split) for split in ("train", "validation"))
    rows = []
    for group in sorted(set(dataset.table[by].astype(str))) if by else ["all"]:
        made, real = (volumes(data, group, by, AT_MOST) for data in (dataset, validation))
        report(group, made, real, volumes(train, group, by))
        rows += [np.concatenate([planes(v) for v in pair], 1) for pair in zip(real[:SHOWN], made[:SHOWN], strict=False)]
    if arguments.picture:
        image = np.clip(np.concatenate(rows) / WHITE_LEVEL, 0, 1)
        imsave(arguments.picture, np.kron(image, np.ones((ZOOM, ZOOM))), cmap="gray", vmin=0, vmax=1)


if __name__ == "__main__":
    main()
