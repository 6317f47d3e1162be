"""Constraints on a draw: women, 70 to 80 years, ventricles of the upper decile; and what makes a request impossible.

A column is the values (B,) of a continuous covariate, or the category indices (B,) of a binary or categorical one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.records import record

Quantile = Callable[[str, float], float]
"""Value of a continuous covariate below which a share of the whole fitted marginal lies."""


@record
class Constraint:
    """Draw only rows whose covariate `name` lies in a range, or in some categories; what is set must all hold."""

    name: str
    low: float | None = None
    """Lowest value, in the covariate's unit."""
    high: float | None = None
    """Highest value, in the covariate's unit."""
    categories: tuple[str, ...] = ()
    """Allowed values of a binary or categorical covariate."""
    low_quantile: float | None = None
    """Lowest value as a quantile, 0-1, of the whole fitted marginal: 0.9 for the upper decile."""
    high_quantile: float | None = None
    """Highest value as a quantile, 0-1, of the whole fitted marginal."""


def satisfied(
    constraints: Sequence[Constraint],
    schema: CovariateSchema,
    columns: Mapping[str, npt.NDArray[Any]],
    quantile: Quantile,
) -> npt.NDArray[np.bool_]:
    """(constraints, B) which rows satisfy which constraint."""
    result = np.ones((len(constraints), len(next(iter(columns.values())))), dtype=bool)
    for row, item in zip(result, constraints, strict=True):
        column = columns[item.name]
        if item.categories:
            categories = next(c.categories for c in schema.covariates if c.name == item.name)
            row &= np.isin(column, [categories.index(name) for name in item.categories])
        else:
            low, high = _range(item, quantile)
            row &= (column >= low) & (column <= high)
    return result


def constraint_problems(
    constraints: Sequence[Constraint], schema: CovariateSchema, seen: Mapping[str, set[str]], quantile: Quantile
) -> list[str]:
    """What is wrong, one line per constraint; `seen` has the categories that the cohort had."""
    found = []
    for item in constraints:
        covariate = next((c for c in schema.covariates if c.name == item.name), None)
        if covariate is None:
            problem = f"no such covariate; the distribution has {', '.join(schema.names)}"
        elif covariate.kind == "continuous":
            problem = _range_problem(item, covariate, quantile)
        else:
            problem = _category_problem(item, covariate, seen[item.name])
        if problem:
            found.append(f"{item.name}: {problem}")
    return found


def scarcity(constraints: Sequence[Constraint], judged: npt.NDArray[np.bool_], least: float, quantile: Quantile) -> str:
    """Why too little is left; `judged` (constraints + 1, B): the rows of `satisfied`, then the support guard."""
    lines = [
        f"the constraints hold together for {judged.all(axis=0).mean():.3%} of the fitted distribution, and at least "
        f"{least:.2%} is needed. Widen the one that costs most:"
    ]
    for i, item in enumerate(constraints):
        if item.categories:
            asked = "is " + " or ".join(item.categories)
        else:
            asked = "in [{:g}, {:g}]".format(*_range(item, quantile))
        rest = np.delete(judged, i, axis=0).all(axis=0).mean()
        lines.append(f"  {item.name} {asked}: {judged[i].mean():.3%} alone; without it {rest:.3%} would be left")
    return "\n".join(lines)


def _range(item: Constraint, quantile: Quantile) -> tuple[float, float]:
    """[low, high] in the covariate's unit."""
    lows = [-np.inf if item.low is None else item.low]
    highs = [np.inf if item.high is None else item.high]
    if item.low_quantile is not None:
        lows.append(quantile(item.name, item.low_quantile))
    if item.high_quantile is not None:
        highs.append(quantile(item.name, item.high_quantile))
    return float(max(lows)), float(min(highs))


def _range_problem(item: Constraint, covariate: Covariate, quantile: Quantile) -> str:
    given = [v for v in (item.low, item.high, item.low_quantile, item.high_quantile) if v is not None]
    if item.categories or not given:
        return "continuous, so give low, high, low_quantile or high_quantile, and no categories"
    if not np.isfinite(given).all() or any(
        q is not None and not 0 <= q <= 1 for q in (item.low_quantile, item.high_quantile)
    ):
        return "limits must be finite, and quantiles between 0 and 1"
    assert covariate.low is not None  # a continuous covariate always has both
    assert covariate.high is not None
    low, high = _range(item, quantile)
    if max(low, covariate.low) < min(high, covariate.high):
        return ""
    support = f"[{covariate.low:g}, {covariate.high:g}] {covariate.unit}".rstrip()
    return f"[{low:g}, {high:g}] holds nothing of the support {support}"


def _category_problem(item: Constraint, covariate: Covariate, seen: set[str]) -> str:
    if not item.categories or (item.low, item.high, item.low_quantile, item.high_quantile) != (None,) * 4:
        return f"{covariate.kind}, so give categories (of {', '.join(sorted(seen))}), and no range"
    strays = [name for name in item.categories if name not in seen]
    return f"{', '.join(strays)} is not in the cohort, which has {', '.join(sorted(seen))}" if strays else ""
