"""Figures and numbers of one whole run, for docs/first-real-run.md. Shows generated volumes only, never a real scan.

python -m recipes.run_figures --run runs/ixi-4mm --out docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import AUTOENCODER_FILE
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.weights import load_weights
from brainsynth.report import figures
from brainsynth.training.image_quality import closeness, mean_closeness
from recipes.reconstruction import psnr_inside


def curves(run: Path, kind: str, names: list[str]) -> dict[str, tuple[list[float], list[float]]]:
    lines = [json.loads(text) for text in (run / kind / "metrics.jsonl").read_text().splitlines()]
    return {n: ([row["step"] for row in lines if n in row], [row[n] for row in lines if n in row]) for n in names}


def draw(lines: dict[str, tuple[list[float], list[float]]], ylabel: str, log_scale: bool = False) -> Figure:
    """Loss curves: name → (steps, values)."""
    figure = Figure(figsize=(5.2, 3.2))
    axis = figure.subplots()
    for name, (steps, values) in lines.items():
        axis.plot(steps, values, lw=1.2, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    if log_scale:
        axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False)
    return figure


def nearest(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Highest correlation of each volume with any of `those`."""
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True) for x in (these, those))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return (a @ b.T).max(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run, out = arguments.run, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    draw(curves(run, "autoencoder", ["train/l1", "validation/l1"]), "L1", log_scale=True).savefig(
        out / f"{run.name}-autoencoder.png", dpi=100, bbox_inches="tight"
    )
    names = ["train/loss", "validation/loss"]
    draw(curves(run, "diffusion", names), "squared error of the flow").savefig(
        out / f"{run.name}-diffusion.png", dpi=100, bbox_inches="tight"
    )
    generated = open_dataset(str(run / "generated"))
    table = generated.table
    chosen = np.linspace(0, len(generated) - 1, 12).astype(int)
    captions = [
        f"{table.age[i]:.0f} y, {table.sex[i]}, ventricles {table.ventricular_volume[i]:.0f} ml" for i in chosen
    ]
    figures.gallery([generated.volume(int(i)) for i in chosen], captions, columns=3).savefig(
        out / f"{run.name}-generated.png", dpi=90, bbox_inches="tight"
    )
    bundle = read_bundle(run / "bundle")
    autoencoder = Autoencoder(build_autoencoder(bundle.autoencoder), bundle.latents, bundle.flipped_axes).eval()
    load_weights(autoencoder.network, run / "bundle" / AUTOENCODER_FILE)
    train, validation = (open_dataset(str(run / "cohort"), split=s) for s in ("train", "validation"))
    with torch.no_grad():
        rows, inside = [], []
        for index in range(len(validation)):
            x = torch.from_numpy(validation.volume(index))[None, None]
            decoded = autoencoder.decode(autoencoder.encode(x))
            rows.append(closeness(decoded, x))
            inside.append(psnr_inside(decoded, x))
    real_train, real_validation, made = train.volumes(), validation.volumes(), generated.volumes()
    print(f"train {len(train)}, validation {len(validation)}, generated {len(generated)}")
    print(
        f"reconstruction of the validation split: {mean_closeness(rows)}, PSNR inside the brain {np.mean(inside):.2f} dB"
    )
    for name, volumes in (("generated", made), ("validation", real_validation)):
        found = nearest(volumes, real_train)
        print(
            f"correlation with the nearest training scan, {name}: median {np.median(found):.3f}, max {found.max():.3f}"
        )
    print(
        f"voxel standard deviation over subjects: real {real_train.std(0).mean():.4f}, generated {made.std(0).mean():.4f}"
    )
    gradient = lambda v: float(np.mean([np.abs(np.diff(v, axis=a)).mean() for a in (1, 2, 3)]))  # noqa: E731
    print(f"mean absolute gradient: real {gradient(real_train):.4f}, generated {gradient(made):.4f}")
    print((run / "generated" / "report.json").read_text())


if __name__ == "__main__":
    main()
