"""Prints, as Markdown, how well drawn covariates match real cohorts, on the subjects fitted and on held-out subjects.

    python -m benchmarks.covariate_distribution [--data FOLDER]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds the cohort tables named in COHORTS.
Missing tables are skipped and listed.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from brainsynth.covariates.distribution import fit_distribution
from brainsynth.covariates.schema import Covariate, CovariateSchema

DRAWN_ROWS = 20_000
SPLITS = 10  # into halves, each used both ways round


@dataclass(frozen=True)
class Cohort:
    """A table and the columns that are its ventricular and brain volume."""

    name: str
    path: str
    ventricles: str
    brain: str
    with_site: bool = False


COHORTS = (
    Cohort("FCON1000, FreeSurfer", "tables/fcon1000_freesurfer_volumes.tsv", "lat_vent_ml", "brain_ml"),
    Cohort("same with 23 sites", "tables/fcon1000_freesurfer_volumes.tsv", "lat_vent_ml", "brain_ml", with_site=True),
    Cohort("IXI full resolution, DLMUSE", "tables/ixi_dlmuse_fullres_volumes.tsv", "vent_total_ml", "brain_ml"),
    Cohort("IXI 2 mm, DLMUSE", "ixi_2mm/participants.tsv", "vent_ml", "brain_ml"),
    Cohort("OASIS-1 (half without ventricles)", "oasis1_2mm/participants.tsv", "vent_native_est_ml", "brain_native_ml"),
)
NAMES = ("age", "ventricles", "brain")
PAIRS = tuple(itertools.combinations(NAMES, 2))


def load(cohort: Cohort, data: Path) -> tuple[pd.DataFrame, CovariateSchema]:
    """The table with unified names, and a schema that leaves a fifth of room around what was seen."""
    table = pd.read_csv(data / cohort.path, sep="\t")
    if "session" in table:
        table = table[table["session"] == "MR1"]
    table = table.rename(columns={cohort.ventricles: "ventricles", cohort.brain: "brain"}).reset_index(drop=True)
    covariates = [
        Covariate(
            name=name,
            kind="continuous",
            low=0.8 * float(table[name].min()),
            high=1.2 * float(table[name].max()),
            scale="log" if name == "ventricles" else "linear",
        )
        for name in NAMES
    ]
    covariates.insert(1, Covariate(name="sex", kind="binary", categories=("F", "M")))
    if cohort.with_site:
        sites = tuple(sorted(table["site"].unique()))
        covariates.append(Covariate(name="site", kind="categorical", categories=sites))
    return table, CovariateSchema(covariates=tuple(covariates))


def rank_correlations(table: pd.DataFrame) -> npt.NDArray[np.float64]:
    """(3,) Spearman correlations in the order of PAIRS."""
    return table[list(NAMES)].corr("spearman").to_numpy()[np.triu_indices(3, 1)]


def sex_effect(table: pd.DataFrame) -> float:
    """Cohen's d of brain volume, men above women."""
    men, women = table["brain"][table["sex"] == "M"], table["brain"][table["sex"] == "F"]
    return float((men.mean() - women.mean()) / np.sqrt((men.var() + women.var()) / 2))


def bootstrap_error(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], object]) -> npt.NDArray[np.float64]:
    """Standard error of a statistic under resampling of people."""
    rng = np.random.default_rng(0)
    rounds = [statistic(table.iloc[rng.integers(0, len(table), len(table))]) for _ in range(200)]
    return np.asarray(np.std(np.array(rounds), axis=0))


def distance(a: pd.Series, b: pd.Series) -> float:
    """Two-sample Kolmogorov-Smirnov distance of the known values."""
    return float(stats.ks_2samp(a.dropna(), b.dropna()).statistic)


def nearest(rows: pd.DataFrame, to: pd.DataFrame) -> npt.NDArray[np.float64]:
    """(B,) distance of each row to its nearest neighbour of the same sex; age, log ventricles, brain in units of SD."""

    def scaled(table: pd.DataFrame) -> npt.NDArray[np.float64]:
        values = table[list(NAMES)].to_numpy(dtype=np.float64)
        return np.column_stack([values[:, 0], np.log(values[:, 1]), values[:, 2]])

    reference = scaled(to)
    difference = (scaled(rows)[:, None] - reference) / reference.std(axis=0)
    same = rows["sex"].to_numpy()[:, None] == to["sex"].to_numpy()
    return np.asarray(np.where(same, np.sqrt((difference**2).sum(axis=2)), np.inf).min(axis=1))


def fitted_rows(cohort: Cohort, table: pd.DataFrame, schema: CovariateSchema) -> str:
    """One markdown row: drawn against the people fitted."""
    drawn = fit_distribution(table, schema, cohort.name).draw(DRAWN_ROWS, seed=0)
    cells = [cohort.name, str(len(table))]
    for name in NAMES:
        test = stats.ks_2samp(drawn[name], table[name].dropna())
        cells.append(f"{test.statistic:.3f} ({test.pvalue:.2g})")
    errors = bootstrap_error(table, rank_correlations)
    for real, synthetic, error in zip(rank_correlations(table), rank_correlations(drawn), errors, strict=True):
        cells.append(f"{real:+.2f} ± {error:.2f} / {synthetic:+.2f}")
    cells.append(f"{sex_effect(table):.2f} ± {float(bootstrap_error(table, sex_effect)):.2f} / {sex_effect(drawn):.2f}")
    cells.append(f"{(table['sex'].dropna() == 'F').mean():.3f} / {(drawn['sex'] == 'F').mean():.3f}")
    return "| " + " | ".join(cells) + " |"


def held_out_row(cohort: Cohort, table: pd.DataFrame, schema: CovariateSchema) -> str:
    """One markdown row: drawn from a fit on one half, and that half itself, both against the other half."""
    found = []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(table))
        for part in (0, 1):
            train, held_out = table.iloc[order[part::2]], table.iloc[order[1 - part :: 2]]
            distribution = fit_distribution(train, schema, cohort.name)
            drawn = distribution.draw(5000, seed=split)
            complete = [rows.dropna(subset=[*NAMES, "sex"]) for rows in (train, held_out)]
            real_rank = rank_correlations(held_out)
            found.append(
                (
                    np.mean([distance(drawn[name], held_out[name]) for name in NAMES]),
                    np.mean([distance(train[name], held_out[name]) for name in NAMES]),
                    np.abs(rank_correlations(drawn) - real_rank).mean(),
                    np.abs(rank_correlations(train) - real_rank).mean(),
                    sex_effect(drawn),
                    sex_effect(held_out),
                    1 - distribution.in_support(held_out).mean(),
                    np.median(nearest(drawn, complete[0])) / np.median(nearest(complete[1], complete[0])),
                )
            )
    m = np.mean(found, axis=0)
    return (
        f"| {cohort.name} | {len(table) // 2} | {m[0]:.3f} / {m[1]:.3f} | {m[2]:.3f} / {m[3]:.3f} "
        f"| {m[4]:.2f} / {m[5]:.2f} | {m[6]:.1%} | {m[7]:.2f} |"
    )


def main() -> None:
    """Print both tables."""
    default = os.environ.get("BRAINSYNTH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(default), help="folder with the cohort tables")
    data: Path = parser.parse_args().data
    cohorts = [(cohort, *load(cohort, data)) for cohort in COHORTS if (data / cohort.path).is_file()]
    pairs = " | ".join(f"{a}-{b}" for a, b in PAIRS)
    print("Fitted and drawn (KS: distance and p; the others: real ± bootstrap SE / drawn)\n")
    print(f"| cohort | n | KS age | KS ventricles | KS brain | {pairs} | sex effect on brain, d | women |")
    print("|" + " --- |" * 10)
    for item in cohorts:
        print(fitted_rows(*item), flush=True)
    print(f"\nFitted on one half, judged on the other ({2 * SPLITS} fits; drawn / the fitted half itself)\n")
    print("| cohort | n per half | KS distance | error of rank correlation | d drawn / held out | flagged | NN ratio |")
    print("|" + " --- |" * 7)
    for item in cohorts:
        print(held_out_row(*item), flush=True)
    for cohort in COHORTS:
        if not (data / cohort.path).is_file():
            print(f"\n{cohort.name}: left out, no {cohort.path}")


if __name__ == "__main__":
    main()
