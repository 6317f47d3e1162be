"""Measures how well the tissue ruler reads age and sex from real scans. Writes results/age-sex-ruler.json.

    python -m benchmarks.age_sex_ruler [--data FOLDER] [--output FILE]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds ixi_2mm and oasis1_2mm: skull-stripped
scans, measured on their own 2 mm grid and on a 4 mm grid. Within a cohort: nested 10-fold cross-validation by subject.
Between cohorts: fitted on all of one, tested on all of the other. `unseen`: the half of the subjects (drawn with seed 77)
that was not used to choose the features; the ruler that predicts them was fitted on people of both halves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from brainsynth.instruments.covariate_ruler import CovariateRuler, cross_predict
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.metrics.agreement import agreement, discrimination
from brainsynth.records import to_dict
from brainsynth.volume import VolumeSpec, resample

GRIDS = {
    "2 mm": VolumeSpec(shape_xyz=(80, 112, 80), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(-80.0, -128.0, -72.0)),
    "4 mm": VolumeSpec(shape_xyz=(40, 56, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-79.0, -127.0, -71.0)),
}
COHORTS = {"IXI": "ixi_2mm", "OASIS-1": "oasis1_2mm"}


def subjects(folder: Path) -> pd.DataFrame:
    """Sessions with age and sex; failed registrations left out."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    if "qc" in table:
        table = table[table["qc"] != "fail"]
    table = table.dropna(subset=["age", "sex"]).reset_index(drop=True)
    people = np.unique(table["participant_id"])
    late = set(np.random.default_rng(77).permutation(people)[1::2])
    return table.assign(male=table["sex"] == "M", unseen=[person in late for person in table["participant_id"]])


def features(
    folder: Path, table: pd.DataFrame, grids: dict[str, VolumeSpec] = GRIDS
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Features (N, F) on each grid, and the median milliseconds that they cost."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in grids}
    cost: dict[str, list[float]] = {name: [] for name in grids}
    for row in table.itertuples():
        image: Any = nib.load(folder / str(row.t1w))
        brain = np.asarray(image.dataobj, np.float32)
        if hasattr(row, "dseg"):
            brain = brain * (np.asarray(nib.load(folder / str(row.dseg)).dataobj) > 0)
        for name, grid in grids.items():
            volume = resample(brain, image.affine, grid)
            volume = grid.as_stored(volume / np.percentile(volume, 99.9))
            began = time.perf_counter()
            found[name].append(tissue_features(volume, grid))
            cost[name].append(1e3 * (time.perf_counter() - began))
    return {k: np.stack(v) for k, v in found.items()}, {k: round(float(np.median(v)), 1) for k, v in cost.items()}


def within(x: np.ndarray, table: pd.DataFrame) -> dict[str, Any]:
    """Nested cross-validation; also of labels that were shuffled between people."""
    people, late = table["participant_id"].to_numpy(), table["unseen"].to_numpy()
    age, male = table["age"].to_numpy(float), table["male"].to_numpy(float)
    plain, corrected = cross_predict(x, age, groups=people)
    odds, _ = cross_predict(x, male, groups=people, kind="binary")
    unique = pd.Series(age, people).groupby(level=0).first()
    shuffled = pd.Series(np.random.default_rng(0).permutation(unique), unique.index)[people].to_numpy()
    blind, _ = cross_predict(x, shuffled, groups=people)
    return {
        "age": to_dict(agreement(plain, age, groups=people)),
        "age_unseen": to_dict(agreement(plain[late], age[late], groups=people[late])),
        "age_corrected": to_dict(agreement(corrected, age, groups=people)),
        "age_shuffled": to_dict(agreement(blind, shuffled, groups=people)),
        "sex": to_dict(discrimination(odds, male, groups=people)),
        "sex_unseen": to_dict(discrimination(odds[late], male[late], groups=people[late])),
    }


def across(x: np.ndarray, table: pd.DataFrame, other_x: np.ndarray, other: pd.DataFrame) -> dict[str, Any]:
    """Fitted on one cohort, tested on the other."""
    people, others = table["participant_id"].to_numpy(), other["participant_id"].to_numpy()
    age = CovariateRuler.fit(x, table["age"], groups=people, own_error=False)
    sex = CovariateRuler.fit(x, table["male"], groups=people, kind="binary", own_error=False)
    return {
        "age": to_dict(agreement(age.predict(other_x), other["age"], groups=others)),
        "sex": to_dict(discrimination(sex.predict(other_x), other["male"], groups=others)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    repository = Path(__file__).resolve().parents[1]
    beside = repository.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--output", type=Path, default=repository / "benchmarks" / "results" / "age-sex-ruler.json")
    a = parser.parse_args()
    tables = {name: subjects(a.data / folder) for name, folder in COHORTS.items()}
    read = {name: features(a.data / COHORTS[name], table) for name, table in tables.items()}
    figures: dict[str, Any] = {}
    for grid in GRIDS:
        for name, table in tables.items():
            x, cost = read[name][0][grid], read[name][1][grid]
            figures[f"{name}, {grid}"] = {
                "age_sd_years": float(table["age"].std()),
                "feature_ms": cost,
                **within(x, table),
            }
        for name, other in (("IXI", "OASIS-1"), ("OASIS-1", "IXI")):
            pair = across(read[name][0][grid], tables[name], read[other][0][grid], tables[other])
            figures[f"{name} to {other}, {grid}"] = pair
    a.output.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print_tables(figures)


def print_tables(figures: dict[str, Any]) -> None:
    """The figures as Markdown."""
    print("| scans | age from | n | people | r [95 % CI] | MAE [95 % CI], years | slope | bias |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in figures.items():
        for what in ("age", "age_unseen", "age_corrected", "age_shuffled"):
            if e := found.get(what):
                print(
                    f"| {name} | {what} | {e['n']} | {e['n_groups']} | {e['r']:.3f} [{e['r_low']:.3f}, {e['r_high']:.3f}] | "
                    f"{e['mae']:.2f} [{e['mae_low']:.2f}, {e['mae_high']:.2f}] | {e['slope']:.2f} | {e['bias']:+.2f} |"
                )
    print("\n| scans | sex from | n | men | AUC [95 % CI] | balanced accuracy [95 % CI] |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in figures.items():
        for what in ("sex", "sex_unseen"):
            if e := found.get(what):
                print(
                    f"| {name} | {what} | {e['n']} | {e['n_positive']} | {e['auc']:.3f} [{e['auc_low']:.3f}, "
                    f"{e['auc_high']:.3f}] | {e['balanced_accuracy']:.3f} [{e['balanced_accuracy_low']:.3f}, "
                    f"{e['balanced_accuracy_high']:.3f}] |"
                )


if __name__ == "__main__":
    main()
