"""How many volumes does an evaluation need to detect a planted fault? On real scans at 4 mm; prints Markdown.

    python -m benchmarks.planted_faults [--data FOLDER] [--measurements FILE] [--output FILE]

Real scans stand in for generated ones, so that the planted fault is the only one: volumes 5 % larger than asked, or labels
shuffled between the scans. Measured values come from the tissue ruler, out of fold, and from the segmentation (FILE, as
benchmarks/segmentation_ruler.py writes it; calibrated without the scan itself). Dataset and validation scans are drawn from
them with replacement, 27 validation scans as in configs/ixi-4mm; the verdict is that of `brainsynth evaluate`. Drawing with
replacement lets n exceed the number of scans; it adds no new kinds of heads.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.age_sex_ruler import GRIDS, features, subjects
from brainsynth.evaluation.adherence import verdict
from brainsynth.instruments.covariate_ruler import cross_predict
from brainsynth.instruments.segmentation import Calibration
from brainsynth.metrics.agreement import agreement

HELD, DRAWS, SIZES = 27, 50, (10, 20, 40, 80, 160, 320)
BIAS = 1.05
VOLUMES = {"ventricles": ("vent_ml", "ventricles_ml"), "brain": ("brain_ml", "brain_ml")}
Pairs = tuple[np.ndarray, np.ndarray]


def by_tissue(x: np.ndarray, known: np.ndarray, people: np.ndarray) -> Pairs:
    """(measured, known) of every scan, by rulers that were fitted without it."""
    return cross_predict(x, known, groups=people)[0], known


def by_segmentation(file: Path, table: pd.DataFrame, known: str, column: str) -> Pairs:
    """(measured, known) of every segmented scan, by lines that were fitted without it."""
    lines = pd.read_csv(file).set_index("key")[column]
    keys = [f"IXI/{person}/4 mm" for person in table["participant_id"]]
    there = np.array([key in lines.index for key in keys])
    m = lines.reindex(keys).to_numpy()[there]
    t = table[known].to_numpy(float)[there]
    others = [np.arange(len(m)) != i for i in range(len(m))]
    return np.array([Calibration.fit(m[o], t[o]).apply(m[i]) for i, o in enumerate(others)]), t


def detected(pairs: Pairs, fault: str, size: int, key: str) -> float:
    """Share of draws in which the figure `key` differs from real scans."""
    measured, known = pairs
    seen = 0
    for draw in range(DRAWS):
        rng = np.random.default_rng([size, draw])
        made, held = rng.integers(0, len(known), size), rng.integers(0, len(known), HELD)
        asked = known[made]
        if fault == "bias":
            asked = asked / BIAS
        elif fault == "shuffled":
            asked = rng.permutation(asked)
        both = agreement(measured[made], asked), agreement(measured[held], known[held])
        seen += not verdict(key, "", key, *both, "higher" if key == "r" else "equal").as_real
    return seen / DRAWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    repository = Path(__file__).resolve().parents[1]
    beside = repository.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--measurements", type=Path, help="of benchmarks/segmentation_ruler.py")
    parser.add_argument("--output", type=Path, default=repository / "benchmarks" / "results" / "planted-faults.json")
    a = parser.parse_args()
    table = subjects(a.data / "ixi_2mm")
    people = table["participant_id"].to_numpy()
    x = features(a.data / "ixi_2mm", table, {"4 mm": GRIDS["4 mm"]})[0]["4 mm"]
    sources: dict[str, Pairs] = {"age, tissue": by_tissue(x, table["age"].to_numpy(float), people)}
    for name, (known, column) in VOLUMES.items():
        sources[f"{name}, tissue"] = by_tissue(x, table[known].to_numpy(float), people)
        if a.measurements:
            sources[f"{name}, segmentation"] = by_segmentation(a.measurements, table, known, column)
    figures: list[dict[str, Any]] = []
    print(f"| ruler | scans | fault | figure | {' | '.join(f'n = {n}' for n in SIZES)} |")
    print(f"| --- | --- | --- | --- |{' --- |' * len(SIZES)}")
    for name, pairs in sources.items():
        for fault, key in (("none", "bias"), ("none", "r"), ("bias", "bias"), ("shuffled", "r")):
            if fault == "bias" and name.startswith("age"):
                continue
            shares = [detected(pairs, fault, size, key) for size in SIZES]
            figures.append({"ruler": name, "scans": len(pairs[1]), "fault": fault, "figure": key, "seen": shares})
            cells = " | ".join(f"{share:.2f}" for share in shares)
            print(f"| {name} | {len(pairs[1])} | {fault} | {key} | {cells} |", flush=True)
    document = {"held": HELD, "draws": DRAWS, "sizes": SIZES, "bias": BIAS, "rows": figures}
    a.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
