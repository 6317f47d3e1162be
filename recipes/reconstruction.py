"""What a patch autoencoder preserves of validation scans, and what its linear initialisation preserves, by channels.

    python -m recipes.reconstruction --cohort runs/t1w-2mm/cohort --autoencoder runs/t1w-2mm/autoencoder \
        --out benchmarks/results/t1w-2mm-reconstruction.json

Per category of the covariate `cohort` and over all: PSNR over the volume and inside the brain (voxels above 0.02), SSIM,
the tissue volumes by the tissue ruler's soft shares on the reconstruction against those on the scan, and the ventricular
volume likewise (a ridge regression on tissue maps of the training scans). 95 % BCa bootstrap intervals over scans.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.tissue_features import tissue_features, tissue_volumes
from brainsynth.metrics.intervals import bootstrap_interval
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.patch_autoencoder import depth_to_space, space_to_depth
from brainsynth.models.weights import load_weights
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import to_dict
from brainsynth.training.autoencoder import patch_components
from brainsynth.training.image_quality import closeness
from brainsynth.training.runs import AutoencoderRun, autoencoder_weights, read_run
from brainsynth.volume import VolumeSpec

BRAIN = 0.02
LINEAR_CHANNELS = (4, 8, 12, 16, 20, 24)


def psnr_inside(decoded: torch.Tensor, scan: torch.Tensor) -> float:
    """dB, over the voxels of the brain."""
    return float(-10 * torch.log10((decoded - scan)[scan > BRAIN].pow(2).mean()))


def linear(train: SyntheticDataset, scans: list[torch.Tensor], patch: int) -> dict[int, float]:
    """Mean PSNR inside the brain of linear autoencoders, by number of channels."""
    basis = patch_components(train, patch, max(LINEAR_CHANNELS))
    found: dict[int, list[float]] = {channels: [] for channels in LINEAR_CHANNELS}
    for scan in scans:
        patches = space_to_depth(scan, patch)
        for channels, values in found.items():
            kept = torch.einsum("pc,qc,bqxyz->bpxyz", basis[:, :channels], basis[:, :channels], patches)
            values.append(psnr_inside(depth_to_space(kept, patch).clamp(0, 1), scan))
    return {channels: float(np.mean(values)) for channels, values in found.items()}


def ventricle_ruler(train: SyntheticDataset, grid: VolumeSpec) -> CovariateRuler:
    """Reads ml of ventricles off tissue maps."""
    ml = train.table["ventricular_volume"].to_numpy(float)
    known = np.flatnonzero(np.isfinite(ml))
    maps = np.stack([tissue_features(train.volume(int(i)), grid) for i in known])
    return CovariateRuler.fit(maps, ml[known], groups=known, own_error=False)


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and interval of each figure."""
    names = rows[0]
    means = {name: np.array([row[name] for row in rows]) for name in names}
    return {name: to_dict(bootstrap_interval(np.mean, [values])) for name, values in means.items()} | {"n": len(rows)}


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run = read_run(arguments.autoencoder, AutoencoderRun, "brainsynth train-autoencoder")
    network = build_autoencoder(run.architecture)
    load_weights(network, autoencoder_weights(arguments.autoencoder, run))
    network.eval()
    train, validation = (open_dataset(arguments.cohort, split=split) for split in ("train", "validation"))
    scans = [torch.from_numpy(validation.volume(index))[None, None] for index in range(len(validation))]
    ruler = ventricle_ruler(train, run.volume)
    rows, kinds = [], validation.table["cohort"].tolist()
    for scan in scans:
        decoded = network.decode(network.encode(scan)[0]).clamp(0, 1)
        row = closeness(decoded, scan) | {"psnr_inside_db": psnr_inside(decoded, scan)}
        maps = [tissue_features(x[0, 0].numpy(), run.volume)[None] for x in (decoded, scan)]
        volumes = [tissue_volumes(found, run.volume) | {"ventricles": ruler.predict(found)} for found in maps]
        for part in volumes[0]:
            row[f"{part}_ratio"] = float(volumes[0][part][0] / volumes[1][part][0])
        rows.append(row)
    result = {"all": summary(rows)}
    for kind in sorted(set(kinds)):
        result[kind] = summary([row for row, other in zip(rows, kinds, strict=True) if other == kind])
    result["linear_psnr_inside_db"] = {str(k): v for k, v in linear(train, scans, run.architecture.factor).items()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for kind, figures in result.items():
        print(kind, json.dumps(figures))


if __name__ == "__main__":
    main()
