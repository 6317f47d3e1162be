"""A cohort by its description: women, 70 to 80, ventricles of the upper decile; drawn, or spread evenly over a range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from brainsynth.covariates.constraints import Constraint
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.covariates.words import categories, number, split
from brainsynth.errors import UserError
from brainsynth.records import to_dict

_JUDGED = 20_000


def draw_cohort(
    distribution: CovariateDistribution,
    rows: int,
    seed: int,
    only: Sequence[str],
    over: Sequence[str] = (),
    quantiles_of: Literal["everyone", "chosen"] = "everyone",
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows that fit a description, in schema order, and what was asked as plain JSON.

    Args:
        rows: how many.
        seed: the first rows of a longer draw with the same seed and description are the same rows.
        only: conditions, as `parse_constraint` reads them.
        over: ranges, as `parse_spread` reads them.
        quantiles_of: whose quantiles the conditions name: of everyone, or of those who fulfil the other conditions.

    Raises:
        UserError: a text names nothing of this model, a covariate is named twice, or hardly anybody fits.
    """
    schema = distribution.schema
    constraints = tuple(parse_constraint(text, schema) for text in only)
    ranges = [parse_spread(text, schema) for text in over]
    named = [c.name for c in constraints] + [c.name for c, _, _ in ranges]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UserError(f"{', '.join(twice)} is asked for twice: give one --only or one --spread of each covariate")
    if rows < 1 or seed < 0:
        raise UserError(f"--rows {rows} --seed {seed}: at least 1 row, and a seed of 0 or more")
    if quantiles_of == "chosen":
        constraints = own_quantiles(distribution, constraints)
    drawn = spread(distribution.draw(rows, seed, constraints), ranges, seed)
    about = {
        "rows": rows,
        "seed": seed,
        "only": [{k: v for k, v in to_dict(c).items() if v not in (None, [])} for c in constraints],
        "spread": {c.name: [low, high] for c, low, high in ranges},
        "share_of_distribution": round(distribution.share(constraints), 6),
    }
    return drawn, about


def parse_constraint(text: str, schema: CovariateSchema) -> Constraint:
    """`sex=F`, `age=70:80`, `age=70:`, `ventricular_volume=q0.9:` (from the 0.9 quantile on).

    Raises:
        UserError: with what may be written.
    """
    covariate, given = split(text, schema)
    if covariate.kind != "continuous":
        return Constraint(name=covariate.name, categories=categories(given, covariate))
    ends = given.split(":")
    if len(ends) != 2 or not any(ends):
        raise UserError(f"--only {text}: write NAME=LOW:HIGH; one may be left out, and q0.9 is the 0.9 quantile")
    found: dict[str, float] = {}
    for side, end in zip(("low", "high"), ends, strict=True):
        if end:
            found[f"{side}_quantile" if end[0] == "q" else side] = number(end.removeprefix("q"), text)
    return Constraint(name=covariate.name, **found)  # type: ignore[arg-type]


def own_quantiles(distribution: CovariateDistribution, constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """The constraints with quantiles as values: of people who fulfil the constraints without quantiles, not of everybody."""
    plain = [c for c in constraints if c.low_quantile is None and c.high_quantile is None]
    if len(plain) == len(constraints):
        return tuple(constraints)
    people = distribution.draw(_JUDGED, 0, plain)

    def value(item: Constraint, quantile: float | None, other: float | None) -> float | None:
        if quantile is None:
            return other
        if not 0 <= quantile <= 1:
            raise UserError(f"--only {item.name}: a quantile lies between 0 and 1, and {quantile:g} does not")
        return float(people[item.name].quantile(quantile))

    return tuple(
        dataclasses.replace(
            c,
            low=value(c, c.low_quantile, c.low),
            high=value(c, c.high_quantile, c.high),
            low_quantile=None,
            high_quantile=None,
        )
        for c in constraints
    )


def parse_spread(text: str, schema: CovariateSchema) -> tuple[Covariate, float, float]:
    """`age=45:85`: a covariate and the range in which its values are spread evenly. Raises UserError."""
    covariate, given = split(text, schema)
    ends = given.split(":")
    if covariate.kind != "continuous" or len(ends) != 2:
        raise UserError(f"--spread {text}: write NAME=LOW:HIGH of a number, as in --spread age=45:85")
    low, high = (number(end, text) for end in ends)
    if not low < high or (covariate.scale == "log" and low <= 0):
        raise UserError(f"--spread {text}: the first number must be below the second, and above 0 on a log scale")
    return covariate, low, high


def spread(rows: pd.DataFrame, over: Sequence[tuple[Covariate, float, float]], seed: int) -> pd.DataFrame:
    """`rows` with values drawn evenly from each range, on the covariate's own scale, whatever the other columns are.

    The first rows of a longer table get the same values.
    """
    out = rows.copy()
    for place, (covariate, low, high) in enumerate(over):
        share = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1 << 32, place]))).random(len(rows))
        if covariate.scale == "log":
            out[covariate.name] = np.exp(np.log(low) + share * (np.log(high) - np.log(low)))
        else:
            out[covariate.name] = low + share * (high - low)
    return out
