"""Measures the quality gate on real scans and planted artefacts. Writes results/gate.json.

    python -m benchmarks.gate [--data FOLDER] [--grids "4 mm"] [--splits 5] [--plant-every 3] [--workers 2] [--out FILE]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds the scans. The gate was developed on one
half of the OASIS-1 subjects (`development`); all figures come from the other half and from IXI, one session per subject.
In each split, 60 % of those subjects fit the gate and the other 40 % are judged, unchanged and with each artefact.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from brainsynth.gate.features import Measured, measure
from brainsynth.gate.gate import QualityGate
from brainsynth.volume import VolumeSpec
from tests.gate.artefacts import ARTEFACTS, FURTHER
from tests.gate.scans import FOLDERS, GRIDS, prepared, scans

MASKED = ("ghosting", "noise", "blur", "spike", "motion", "doubled")
"""Kinds that leave signal outside the brain; measured a second time with that signal removed."""


def planted(volume: np.ndarray, other: np.ndarray, subject: str, grid: VolumeSpec) -> dict[str, Measured | None]:
    """Artefact → what the gate measures on the volume with it; the same subject always gets the same fault."""
    found = {}
    for kind, plant in (ARTEFACTS | FURTHER).items():
        rng = np.random.default_rng(zlib.crc32(f"{kind} {subject}".encode()))
        broken = np.ascontiguousarray(plant(volume, grid.spacing_mm, rng, other), np.float32)
        found[kind] = measure(broken, grid.spacing_mm)
        if kind in MASKED:
            found[f"{kind}, masked"] = measure(broken * (volume > 0.02), grid.spacing_mm)
    return found


def share(caught: dict[int, list[bool]]) -> dict[str, Any]:
    """Caught, of all judgements of scans with the fault; the interval counts each scan once."""
    rate = float(np.mean([c for judged in caught.values() for c in judged]))
    n = len(caught)
    return {
        "caught": round(rate, 4),
        "scans": n,
        "judged": sum(map(len, caught.values())),
        "ci95": clopper_pearson(round(rate * n), n),
    }


def clopper_pearson(k: int, n: int) -> list[float]:
    """Exact 95 % interval of a proportion."""
    return [
        round(float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0, 4),
        round(float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0, 4),
    ]


def measure_cohort(
    table: pd.DataFrame, grid: VolumeSpec, plant_every: int
) -> tuple[dict[int, Measured], dict[int, Any]]:
    """Row → measured as it is; row → artefact → measured, for every n-th good scan."""
    volumes = {row.Index: prepared(row, grid) for row in table.itertuples()}
    clean = {i: measure(x, grid.spacing_mm) for i, x in volumes.items()}
    good = [i for i in table.index if table.good[i]]
    faults = {}
    for at, i in enumerate(good):
        if at % plant_every == 0:
            other = volumes[good[(at + 1 + at // 2) % len(good)]]
            faults[i] = planted(volumes[i], other, table.participant_id[i], grid)
    return clean, faults


def judge(gate: QualityGate, found: Measured | None) -> tuple[bool, str, dict[str, float]]:
    """(rejected, by which check, scores)."""
    if found is None:
        return True, "empty", {}
    result = gate.judge(found)
    return not result.passed, result.worst, result.values


def report(table: pd.DataFrame, grid: VolumeSpec, splits: int, plant_every: int) -> dict[str, Any]:
    """All figures of one cohort on one grid."""
    clean, faults = measure_cohort(table, grid, plant_every)
    good, bad = table.index[table.good], table.index[table.qc != "ok"]
    false, reasons, caught, accuracy = [], Counter[str](), dict[str, dict[int, list[bool]]](), []
    by_qc: dict[str, list[bool]] = {}
    flips: dict[int, list[bool]] = {}
    for split in range(splits):
        order = np.random.default_rng(100 + split).permutation(good)
        fit, test = order[: round(0.6 * len(order))], order[round(0.6 * len(order)) :]
        gate = QualityGate.fit_measured([clean[i] for i in fit], len(fit), grid, 0.01)
        accuracy.append(gate.spec.flip_accuracy)
        for i in test:
            rejected, why, _ = judge(gate, clean[i])
            false.append(rejected)
            reasons.update([why] if rejected else [])
            for kind, found in faults.get(i, {}).items():
                caught.setdefault(kind, {}).setdefault(i, []).append(judge(gate, found)[0])
                if kind == "mirrored":
                    flips.setdefault(i, []).append(judge(gate, found)[2].get("flip", 9) >= 1)
        for i in set(bad) - set(fit):
            by_qc.setdefault(f"{table.participant_id[i]} {table.qc[i]}", []).append(judge(gate, clean[i])[0])
    return {
        "subjects": len(good),
        "gate_n": len(fit),
        "splits": splits,
        "false_rejects": {"n": len(false), "rejected": sum(false), "rate": round(float(np.mean(false)), 4)}
        | {
            "ci95_for_as_many_subjects": clopper_pearson(round(np.mean(false) * len(good)), len(good)),
            "by": dict(reasons),
        },
        "twelve_kinds": {kind: share(caught[kind]) for kind in ARTEFACTS},
        "masked": {kind: share(caught[f"{kind}, masked"]) for kind in MASKED},
        "further": {kind: share(caught[kind]) for kind in FURTHER},
        "mean_of_twelve": round(float(np.mean([share(caught[kind])["caught"] for kind in ARTEFACTS])), 4),
        "flip_accuracy_left_out": [round(a, 3) for a in accuracy],
        "flip_check_alone_catches": share(flips),
        "qc_flagged": {name: f"{sum(r)} of {len(r)} gates reject it" for name, r in sorted(by_qc.items())},
    }


def seconds(grid: VolumeSpec, volume: np.ndarray) -> float:
    """Median time of one measurement on one thread; what `check` adds to it is under a millisecond or two."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        measure(volume, grid.spacing_mm)
        times.append(time.perf_counter() - began)
    return round(float(np.median(times)), 4)


def one(task: tuple[Path, str, str, int, int]) -> tuple[str, dict[str, Any]]:
    """The figures of one cohort on one grid, and their name."""
    data, cohort, label, splits, plant_every = task
    table = scans(data, cohort)
    found = report(table, GRIDS[label], splits, plant_every)
    found["seconds_per_volume"] = seconds(GRIDS[label], prepared(next(table.itertuples()), GRIDS[label]))
    return f"{cohort}, {label}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--plant-every", type=int, default=3, help="artefacts in every n-th scan only, for time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate.json"))
    a = parser.parse_args()
    tasks = [(a.data, cohort, label, a.splits, a.plant_every) for label in a.grids for cohort in FOLDERS]
    with ProcessPoolExecutor(a.workers) as pool:
        found = dict(pool.map(one, tasks))
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    print(a.out.read_text())


if __name__ == "__main__":
    main()
