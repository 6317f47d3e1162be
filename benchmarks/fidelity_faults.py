"""Plants faults in real scans that stand in for generated ones, runs the whole evaluation on each, and prints Markdown.

    python -m benchmarks.fidelity_faults [--data FOLDER] [--output FOLDER] [--steps 300] [--pairs 60]

IXI at 4 mm: 80 people are the reference; the others stand in for a generated dataset, first unchanged and then with one
fault each. Then, for volumes 5 % too large: how often the evaluation's bias figure detects it, by n.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.special import stdtrit

from brainsynth.config.evaluation import EvaluateConfig, FeatureConfig
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.metrics.finding import Finding
from brainsynth.stages import evaluate, prepare_cohort
from brainsynth.volume import resample
from recipes.usefulness_stand_in import GRID, scans

REFERENCE, DRAWS = 80, 1000
LARGER = 1.05
COLUMNS = {"ventricular_volume": "vent_ml", "brain_volume": "brain_ml"}
SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="ventricular_volume", kind="continuous", unit="ml", low=4.0, high=130.0, scale="log"),
        Covariate(name="brain_volume", kind="continuous", unit="ml", low=850.0, high=1800.0),
    )
)
Cohort = tuple[pd.DataFrame, np.ndarray]


def larger(volume: np.ndarray) -> np.ndarray:
    """The same head with volumes 5 % larger, scaled about the grid's middle."""
    scale = LARGER ** (1 / 3)
    centre = np.asarray(GRID.origin_mm) + (np.asarray(GRID.shape_xyz) - 1) * np.asarray(GRID.spacing_mm) / 2
    affine = GRID.affine.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] = centre + (affine[:3, 3] - centre) * scale
    return resample(volume, affine, GRID)


def shuffled(cohort: Cohort) -> Cohort:
    """Everyone has somebody else's covariates."""
    table = cohort[0].copy()
    order = np.random.default_rng(0).permutation(len(table))
    columns = ["age", "sex", *COLUMNS.values()]
    table[columns] = table[columns].to_numpy()[order]
    return table, cohort[1]


FAULTS: dict[str, Any] = {
    "none": lambda c: c,
    "labels shuffled": shuffled,
    "volumes 5 % too large": lambda c: (c[0], np.stack([larger(v) for v in c[1]])),
    "mode collapse (everyone is the first)": lambda c: (c[0], np.repeat(c[1][:1], len(c[1]), axis=0)),
    "blurred, FWHM 6 mm": lambda c: (c[0], np.stack([gaussian_filter(v, 6 / 2.355 / 4) for v in c[1]])),
    "all flipped left to right": lambda c: (c[0], c[1][:, ::-1]),
    "half of them flipped": lambda c: (c[0], np.stack([v[::-1] if i % 2 else v for i, v in enumerate(c[1])])),
}  # fmt: skip


def prepared(folder: Path, cohort: Cohort, fraction: float) -> str:
    """The scans as a prepared cohort."""
    table, volumes = cohort
    images = folder / "images"
    images.mkdir(parents=True)
    for identity, volume in zip(table["participant_id"], volumes, strict=True):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(volume, np.float32), GRID.affine), images / f"{identity}.nii.gz")
    table = table.assign(image=[str(images / f"{identity}.nii.gz") for identity in table["participant_id"]])
    table.to_csv(folder / "table.tsv", sep="\t", index=False)
    config = PrepareConfig(
        source=SourceConfig(path=str(folder / "table.tsv"), columns=COLUMNS),
        output=str(folder / "cohort"), covariates=SCHEMA, volume=GRID, validation_fraction=fraction,
        runtime=RuntimeConfig(workers=0),
    )  # fmt: skip
    prepare_cohort.run(config)
    return config.output


def judged(dataset: str, reference: str, output: Path, measured: Path | None, steps: int, pairs: int) -> list[Finding]:
    """The verdicts; the reference's measurements and the embedder are those of an earlier evaluation, where given."""
    output.mkdir(parents=True)
    if measured is not None:
        shutil.copytree(measured / "measured-reference", output / "measured-reference")
        for file in measured.glob("embedder-*.safetensors"):
            shutil.copy(file, output)
    config = EvaluateConfig(
        dataset=dataset, reference=reference, output=str(output), pairs=pairs,
        features=FeatureConfig(steps=steps), runtime=RuntimeConfig(workers=0),
    )  # fmt: skip
    return evaluate.run(config)


def line(fault: str, findings: list[Finding]) -> str:
    """One row of the table: what differs, each with its value and the real one."""
    worse = [
        f"{f.metric.split(' (')[0]} {f.value:.2g} [{f.low:.2g}, {f.high:.2g}] (real {f.real:.2g} [{f.real_low:.2g}, "
        f"{f.real_high:.2g}])"
        for f in findings
        if not f.as_real
    ]
    return f"| {fault} | {len(worse)} of {len(findings)} | {'; '.join(worse) or 'nothing'} |"


def detected(known: Cohort, made: Cohort, covariate: str, rng: np.random.Generator) -> list[str]:
    """Share of draws of n stand-ins and n validation scans whose bias intervals (Student's t) do not meet; 5 % and none."""
    column, lines = COLUMNS[covariate], []
    train, rest = np.arange(REFERENCE * 7 // 10), np.arange(REFERENCE * 7 // 10, REFERENCE)
    features = np.stack([tissue_features(v, GRID) for v in known[1]])
    truth = known[0][column].to_numpy(np.float64)
    groups = known[0]["participant_id"].to_numpy()
    ruler = CovariateRuler.fit(features[train], truth[train], groups=groups[train], kind="continuous", own_error=False)
    asked = made[0][column].to_numpy(np.float64)
    own = ruler.predict(features[rest]) - truth[rest]
    for name, volumes in (("as they are", made[1]), ("5 % too large", np.stack([larger(v) for v in made[1]]))):
        wrong = ruler.predict(np.stack([tissue_features(v, GRID) for v in volumes])) - asked
        told = f"| {covariate} | {name} | {wrong.mean():+.1f} ± {wrong.std(ddof=1):.1f} |"
        for n in (8, 12, 16, 20, 24):
            reach, seen = float(stdtrit(n - 1, 0.975)) / n**0.5, 0
            for _ in range(DRAWS):
                a, b = rng.choice(wrong, n, replace=False), rng.choice(own, n, replace=False)
                seen += abs(a.mean() - b.mean()) > reach * (a.std(ddof=1) + b.std(ddof=1))
            lines.append(f"{told} {n} | {seen / DRAWS:.2f} |")
    return lines


def main() -> None:
    """Parse the command line, plant, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    root = options.output or Path(tempfile.mkdtemp())
    table, volumes, _ = scans(options.data / "ixi_2mm")
    order = np.random.default_rng(0).permutation(len(table))
    real, made = (
        (table.iloc[rows].reset_index(drop=True), volumes[rows]) for rows in (order[:REFERENCE], order[REFERENCE:])
    )
    rng = np.random.default_rng(1)
    print("| volume | stand-ins | bias, ml | n | seen |\n| --- | --- | --- | --- | --- |", flush=True)
    for covariate in COLUMNS:
        print("\n".join(detected(real, made, covariate, rng)), flush=True)
    reference = prepared(root / "reference", real, 0.3)
    print("| fault | differ | which |\n| --- | --- | --- |", flush=True)
    first: Path | None = None
    for number, (fault, change) in enumerate(FAULTS.items()):
        dataset = prepared(root / f"fault-{number}", change(made), 0.1)
        output = root / f"evaluation-{number}"
        print(line(fault, judged(dataset, reference, output, first, options.steps, options.pairs)), flush=True)
        first = first or output


if __name__ == "__main__":
    main()
