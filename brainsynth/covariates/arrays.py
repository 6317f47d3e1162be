"""A covariate table as arrays and back, and whether it tells enough to fit a distribution.

Shapes: B rows, D continuous covariates, C discrete (binary or categorical) ones, both in schema order.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from brainsynth.covariates.copula import Floats, Ints
from brainsynth.covariates.schema import Covariate, CovariateSchema

_MIN_ROWS = 20  # known values of a covariate, and of a pair of continuous ones
_MAX_CELLS = 512


def continuous_covariates(schema: CovariateSchema) -> list[Covariate]:
    """(D,)"""
    return [c for c in schema.covariates if c.kind == "continuous"]


def discrete_covariates(schema: CovariateSchema) -> list[Covariate]:
    """(C,)"""
    return [c for c in schema.covariates if c.kind != "continuous"]


def bounds(c: Covariate) -> tuple[float, float]:
    """[low, high] of a continuous covariate, which always has both."""
    assert c.low is not None
    assert c.high is not None
    return c.low, c.high


def as_numbers(values: pd.Series, categories: tuple[str, ...]) -> Floats:
    """(B,) a column as numbers; of categories, 0 for the first and 1 for the others. NaN where unknown."""
    if not categories:
        return values.to_numpy(dtype=np.float64)
    return np.array([np.nan if pd.isna(v) or v == "" else float(v != categories[0]) for v in values])


def to_arrays(schema: CovariateSchema, table: pd.DataFrame) -> tuple[Floats, Ints]:
    """Values (B, D), NaN where missing, and category codes (B, C), -1 where missing, of a validated table."""
    values = [table[c.name].to_numpy(dtype=np.float64, na_value=np.nan) for c in continuous_covariates(schema)]
    codes = [pd.Categorical(table[c.name], categories=list(c.categories)).codes for c in discrete_covariates(schema)]
    return (
        np.array(values, dtype=np.float64).reshape(len(values), len(table)).T,
        np.array(codes, dtype=np.int64).reshape(len(codes), len(table)).T,
    )


def to_frame(schema: CovariateSchema, values: Floats, codes: Ints) -> pd.DataFrame:
    """The table of values (B, D) and complete category codes (B, C), columns in schema order."""
    columns: dict[str, pd.Series] = {}
    for c, column in zip(continuous_covariates(schema), values.T, strict=True):
        columns[c.name] = pd.Series(column)
    for c, code in zip(discrete_covariates(schema), codes.T, strict=True):
        columns[c.name] = pd.Series([c.categories[i] for i in code], dtype="str")
    return pd.DataFrame({name: columns[name] for name in schema.names})


def thin_problems(schema: CovariateSchema, values: Floats, codes: Ints, one_category: bool = False) -> list[str]:
    """Why this cohort cannot be fitted: one line per covariate, or pair of covariates, that tells too little.

    `one_category`: a discrete covariate may have the same category in everybody.
    """
    found = []
    continuous, discrete = continuous_covariates(schema), discrete_covariates(schema)
    known = np.isfinite(values)
    columns = [(c, col, ok) for c, col, ok in zip(continuous, values.T, known.T, strict=True)]
    columns += [(c, col.astype(np.float64), col >= 0) for c, col in zip(discrete, codes.T, strict=True)]
    for c, column, has in columns:
        if has.sum() < _MIN_ROWS:
            found.append(f"{c.name}: {has.sum()} known values, at least {_MIN_ROWS} are needed")
        elif np.unique(column[has]).size < 2 and not (one_category and c.kind != "continuous"):
            found.append(f"{c.name} is constant in the cohort: leave it out of the schema, or add people who differ")
    for i, j in itertools.combinations(range(len(continuous)), 2):
        both = int((known[:, i] & known[:, j]).sum())
        if both < _MIN_ROWS <= min(known[:, i].sum(), known[:, j].sum()):
            found.append(
                f"{continuous[i].name} and {continuous[j].name}: only {both} rows know both, {_MIN_ROWS} are needed"
            )
    if codes.size and (codes >= 0).all(axis=1).sum() < _MIN_ROWS and not found:
        found.append(f"fewer than {_MIN_ROWS} rows know all of {', '.join(c.name for c in discrete)}")
    cells = int(np.prod([np.unique(column[column >= 0]).size for column in codes.T]))
    if cells > _MAX_CELLS:
        found.append(f"{cells} combinations of categories, at most {_MAX_CELLS}: merge categories or drop a covariate")
    return found
