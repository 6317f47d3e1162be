"""Sweeps: one noise, and one or two covariates that move while all others are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.covariates.words import Value, categories, number, split
from brainsynth.errors import UserError
from brainsynth.records import record

MAX_POINTS, MAX_SIDE, POINTS = 60, 12, 5
"""Of a sweep of one covariate; of each, where there are two; where none are given."""


@record
class Sweep:
    """The values that one covariate takes, in order, in its unit."""

    name: str
    values: tuple[Value, ...]


def parse_sweep(text: str, schema: CovariateSchema, held: Mapping[str, Value]) -> Sweep:
    """`age=45:85:5` (from, to, points), `ventricular_volume=x0.5:x2` (of the held value), `age=45,60,85` or `sex=F,M`.

    Points are even on the covariate's own scale, and on a log scale between factors.

    Raises:
        UserError: with what may be written.
    """
    covariate, given = split(text, schema)
    if covariate.kind != "continuous":
        return Sweep(name=covariate.name, values=_different(text, categories(given, covariate)))
    parts = given.split(":")
    if len(parts) == 1:
        return Sweep(name=covariate.name, values=_different(text, tuple(number(p, text) for p in given.split(","))))
    points = number(parts[2], text) if len(parts) == 3 else float(POINTS)
    factors = parts[0][:1] == "x" and parts[1][:1] == "x"
    ends = [number(part[1:] if factors else part, text) for part in parts[:2]]
    if len(parts) > 3 or points % 1 or not 2 <= points <= MAX_POINTS:
        raise UserError(f"--sweep {text}: write NAME=FROM:TO:POINTS with 2 to {MAX_POINTS} points")
    if factors or covariate.scale == "log":
        if min(ends) <= 0:
            raise UserError(f"--sweep {text}: factors, and values on a log scale, must be above 0")
        values = np.geomspace(ends[0], ends[1], int(points))
    else:
        values = np.linspace(ends[0], ends[1], int(points))
    if factors:
        values = values * float(held[covariate.name])
    return Sweep(name=covariate.name, values=_different(text, tuple(round(float(v), 9) for v in values)))


def check_not_held(sweeps: Sequence[str], hold: Sequence[str]) -> None:
    """Raises UserError where a covariate is both swept and held."""
    swept = {text.partition("=")[0].strip() for text in sweeps}
    both = sorted(swept & {text.partition("=")[0].strip() for text in hold})
    if both:
        raise UserError(f"--hold {both[0]}: --sweep {both[0]} moves it; leave one of the two out")


def held_values(
    schema: CovariateSchema, distribution: CovariateDistribution | None, hold: Sequence[str]
) -> dict[str, Value]:
    """What each covariate is where it does not move: what `hold` says (`sex=F`), else its median, else its first category.

    Raises:
        UserError: a value is none of the covariate's, or no distribution is known and a number is not given.
    """
    given: dict[str, Value] = {}
    for text in hold:
        covariate, value = split(text, schema)
        one = categories(value, covariate) if covariate.kind != "continuous" else (number(value, text),)
        if len(one) != 1 or covariate.name in given:
            raise UserError(f"--hold {text}: give one value of each covariate, as in --hold age=60 --hold sex=F")
        given[covariate.name] = one[0]
    unknown = [c.name for c in schema.covariates if c.kind == "continuous" and c.name not in given]
    if distribution is None and unknown:
        raise UserError(
            f"the bundle has no covariate distribution, so medians are not known: give {', '.join(unknown)} by --hold"
        )
    usual = usual_values(schema, distribution)
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in usual.items()}
    return {name: given.get(name, rounded.get(name, "")) for name in schema.names}


def usual_values(schema: CovariateSchema, distribution: CovariateDistribution | None) -> dict[str, Value]:
    """The median of each continuous covariate, where the distribution is known; of the others, the first category."""
    usual: dict[str, Value] = {}
    for covariate in schema.covariates:
        if covariate.kind != "continuous":
            usual[covariate.name] = covariate.categories[0]
        elif distribution is not None:
            usual[covariate.name] = distribution.quantile(covariate.name, 0.5)
    return usual


def sweep_rows(sweeps: Sequence[Sweep], held: Mapping[str, Value], seed: int) -> pd.DataFrame:
    """The table to generate: `sample_id`, `noise_seed` (the same in each row) and every covariate.

    The first sweep is the outer one. Raises UserError where they are not one or two of different covariates, or too long.
    """
    if not 1 <= len(sweeps) <= 2 or len({sweep.name for sweep in sweeps}) != len(sweeps):
        raise UserError("give --sweep once or twice, for different covariates")
    if len(sweeps) == 2 and max(len(sweep.values) for sweep in sweeps) > MAX_SIDE:
        raise UserError(f"of two covariates, each takes at most {MAX_SIDE} values")
    if seed < 0:
        raise UserError(f"--seed {seed}: a whole number of 0 or more")
    rows = []
    for i, value in enumerate(sweeps[0].values):
        for j, other in enumerate(sweeps[1].values if len(sweeps) == 2 else ("",)):
            moved = {sweeps[0].name: value} | ({sweeps[1].name: other} if len(sweeps) == 2 else {})
            name = f"point{i:02d}" + (f"x{j:02d}" if len(sweeps) == 2 else "")
            rows.append({"sample_id": name, "noise_seed": seed, **held, **moved})
    return pd.DataFrame(rows)


def refuse_outside(rows: pd.DataFrame, outside: npt.NDArray[np.bool_], names: Sequence[str]) -> None:
    """Raises UserError that names the first rows outside the training support."""
    lines = []
    for row in np.flatnonzero(outside)[:5]:
        values = (f"{n} {v:.4g}" if isinstance(v := rows[n].iloc[row], float) else f"{n} {v}" for n in names)
        lines.append(f"  {', '.join(values)}")
    if lines:
        raise UserError(
            f"{outside.sum()} of {len(rows)} rows lie outside the training support (a value, or an unusual combination):\n"
            + "\n".join(lines)
            + "\nask for less, or allow them with --allow-extrapolation: they are then marked as extrapolated"
        )


def _different(text: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    if len(set(values)) < max(2, len(values)) or len(values) > MAX_POINTS:
        raise UserError(f"--sweep {text}: give 2 to {MAX_POINTS} different values")
    return values
