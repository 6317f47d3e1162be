"""Every structure's volume against real scans of people with the same covariates, in standard deviations.

A line through the training scans says what a structure's volume is for given covariates: each number as its z-score and its
square (the logarithm first, where the schema says so), each category as 0 or 1. The effect size of a set is its mean
distance from that line over the standard deviation of the training scans around it (Cohen's d at equal covariates). That of
the validation scans is what chance leaves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.instruments.segmentation import structure_column
from brainsynth.labels import VOLUME_PREFIX, volume_columns
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.models.segmenter import STRUCTURES

F64 = npt.NDArray[np.float64]
_RESAMPLES = 500
_LEVELS = (0.025, 0.975)
PER_TERM = 5
"""Training scans that each term of the line needs."""


def structure_effects(
    columns: dict[str, str],
    schema: CovariateSchema,
    made: pd.DataFrame,
    train: pd.DataFrame,
    held: pd.DataFrame,
    within: str = "",
) -> list[Finding]:
    """One finding a structure: its effect size in the dataset, and in the validation scans, each with an interval.

    Rows with an unknown covariate or volume are left out. Both intervals are of a bootstrap over people that draws the
    training scans again, too, so they know how well the line is known.

    Args:
        columns: structure → its column (ml) in all three tables.
        made: of the dataset, one row a volume.
        train: of the training scans, `subject` among the columns.
        held: of the validation scans.
        within: what the rows have in common, for the metric's name.
    """
    terms = _Terms(schema, train)
    findings: list[Finding] = []
    for structure, column in columns.items():
        sets = [_known(terms, table, column) for table in (made, train, held)]
        (made_x, made_y, _), (train_x, train_y, people), (held_x, held_y, held_people) = sets
        if min(len(made_y), len(held_y)) < LEAST or len(train_y) < PER_TERM * train_x.shape[1] or np.ptp(train_y) == 0:
            continue
        alone = np.arange(len(made_y))
        values = _effects(train_x, train_y, [(made_x, made_y), (held_x, held_y)])
        rng, drawn = np.random.default_rng(0), np.empty((_RESAMPLES, 2))
        for i in range(_RESAMPLES):
            again = _people_again(people, rng)
            mine, theirs = _people_again(alone, rng), _people_again(held_people, rng)
            pairs = [(made_x[mine], made_y[mine]), (held_x[theirs], held_y[theirs])]
            drawn[i] = _effects(train_x[again], train_y[again], pairs)
        ends = np.quantile(drawn, _LEVELS, axis=0).T
        made_figure, held_figure = ([value, *end.tolist()] for value, end in zip(values, ends, strict=True))
        name = f"{structure}{within}: difference from real at the same covariates"
        findings.append(finding(name, "SD", made_figure, len(made_y), held_figure, len(held_y), "equal"))
    return findings


def structure_columns(made: pd.DataFrame, real: pd.DataFrame) -> dict[str, str]:
    """Structure → column of the measured tables in which both have its volume: counted on label maps, else segmented."""
    both = [str(column) for column in made if column in real]
    counted = {c.removeprefix(VOLUME_PREFIX).replace("_", " "): c for c in both if c.startswith(VOLUME_PREFIX)}
    segmented = {name: column for name in STRUCTURES[1:] if (column := structure_column(name)) in both}
    return counted or segmented


def structure_volume(table: pd.DataFrame, structure: str) -> F64:
    """(N,) ml of what the key `structures` of an evaluation names: a column, or counted structures with ` + ` between."""
    columns = [structure] if structure in table else volume_columns(structure)
    return np.asarray(table[columns].to_numpy(np.float64).sum(axis=1), np.float64)


class _Terms:
    """(N, p) the terms of the line, of a table's covariates; those that are the same in all training scans are left out."""

    def __init__(self, schema: CovariateSchema, train: pd.DataFrame) -> None:
        self.covariates = [c for c in schema.covariates if train[c.name].nunique() > 1]
        self.scales: dict[str, tuple[float, float]] = {}
        for covariate in self.covariates:
            if covariate.kind == "continuous":
                values = _numbers(covariate, train)
                self.scales[covariate.name] = float(np.nanmean(values)), float(np.nanstd(values)) or 1.0

    def __call__(self, table: pd.DataFrame) -> F64:
        columns = [np.ones(len(table))]
        for covariate in self.covariates:
            if covariate.kind == "continuous":
                mean, spread = self.scales[covariate.name]
                z = (_numbers(covariate, table) - mean) / spread
                columns += [z, z**2]
            else:
                cells = table[covariate.name].fillna("").astype(str)
                columns += [np.where(cells == "", np.nan, cells == other) for other in covariate.categories[1:]]
        return np.stack(columns, axis=1).astype(np.float64)


def _numbers(covariate: Covariate, table: pd.DataFrame) -> F64:
    values = table[covariate.name].to_numpy(np.float64)
    return np.log(values) if covariate.scale == "log" else values


def _known(terms: _Terms, table: pd.DataFrame, column: str) -> tuple[F64, F64, npt.NDArray[np.intp]]:
    """(n, p) terms, (n,) volumes and (n,) people of the rows in which all is known."""
    x, y = terms(table), table[column].to_numpy(np.float64)
    people = pd.factorize(table["subject"] if "subject" in table else table["sample_id"])[0]
    rows = np.isfinite(x).all(axis=1) & np.isfinite(y)
    return x[rows], y[rows], people[rows]


def _effects(x: F64, y: F64, sets: list[tuple[F64, F64]]) -> list[float]:
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    around = float(np.sqrt(np.square(y - x @ line).sum() / max(1, len(y) - x.shape[1])))
    return [float((other_y - other_x @ line).mean()) / max(around, 1e-12) for other_x, other_y in sets]


def _people_again(people: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Rows of as many people, drawn with replacement."""
    names, first = np.unique(people, return_inverse=True)
    if len(names) == len(people):
        return rng.integers(0, len(people), len(people))
    order, counts = np.argsort(first, kind="stable"), np.bincount(first)
    starts = np.cumsum(counts) - counts
    chosen = rng.integers(0, len(names), len(names))
    return np.concatenate([order[starts[i] : starts[i] + counts[i]] for i in chosen])
