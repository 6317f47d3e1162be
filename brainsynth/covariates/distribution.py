"""The joint distribution of the covariates: fit it to a cohort table, draw new rows from it, guard its support.

The model is a Gaussian copula that is conditional on the discrete covariates. A *cell* is one combination of observed
categories. In cell c (probability p_c) the D continuous covariates have latent scores and values

    y = mean_c + scale_c * e,   e ~ N(0, correlation),        x_j = knots_j(y_j)

where knots_j is increasing and chosen so that the mixture over the cells has the kernel-smoothed marginal of covariate j,
but for its tails (`copula.with_even_tails`). A group difference (sex and brain volume) is a shift of latent means and never
bends the marginal. Means and scales of small cells are shrunk to what the levels have in common, so a site with two people
is not replayed.

Privacy: the fitted object holds quantile curves, cell means, scales and one correlation matrix, never a row. Continuous
values are drawn on a fine lattice (2^-20 of the support) whose offset lies in the widest gap between the remainders of
the fitted values. So no drawn continuous value, and no tuple that has one, can equal a fitted one, as long as it is not
rounded afterwards. This excludes replay; it is not differential privacy.

Shapes: B rows, D continuous covariates, C discrete ones, both in schema order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.special import chdtri, ndtri

from brainsynth.covariates import copula
from brainsynth.covariates.arrays import (
    bounds,
    continuous_covariates,
    discrete_covariates,
    thin_problems,
    to_arrays,
    to_frame,
)
from brainsynth.covariates.constraints import Constraint, constraint_problems, satisfied, scarcity
from brainsynth.covariates.copula import LATENT, Bools, Floats, Ints
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError, problems_error
from brainsynth.records import record

__all__ = ["Cell", "Constraint", "ContinuousMarginal", "CovariateDistribution", "fit_distribution"]

_EXPECTED_INSIDE = 0.99  # share of new people of the same cohort that the support guard should let pass
_BLOCK_ROWS, _JUDGED_BLOCKS, _MIN_SHARE = 4096, 16, 5e-4
_COMPLETIONS = 16


@record
class Cell:
    """One combination of observed categories."""

    categories: tuple[str, ...]
    """(C,) one per discrete covariate."""
    probability: float
    means: tuple[float, ...]
    """(D,) latent means."""
    scales: tuple[float, ...]
    """(D,) latent standard deviations within the cell."""


@record
class ContinuousMarginal:
    """Values of a continuous covariate at fixed latent scores, and the lattice on which it is drawn."""

    name: str
    knots: tuple[float, ...]
    """(321,) non-decreasing values, in the covariate's unit, at latent scores -8 to 8; those of the tails may lie outside
    [low, high], and are mirrored at its ends where they are drawn."""
    lattice_offset: float
    lattice_step: float


@record
class CovariateDistribution:
    """A fitted joint distribution. Plain numbers only, so it travels as JSON inside a bundle."""

    schema: CovariateSchema
    n_rows: int
    """Rows of the cohort with at least one value."""
    marginals: tuple[ContinuousMarginal, ...]
    """(D,)"""
    cells: tuple[Cell, ...]
    correlation: tuple[tuple[float, ...], ...]
    """(D, D) latent correlation within a cell, positive definite."""
    support_threshold: float
    """Largest distance that counts as inside; see `in_support`."""

    def draw(self, n: int, seed: int, constraints: Sequence[Constraint] = ()) -> pd.DataFrame:
        """N new rows, columns in schema order, typed as `CovariateSchema.validate` types them.

        Candidates come in numbered blocks, each from (seed, block number), and the first n that are inside the support
        and satisfy the constraints are kept. So the first n rows of a longer draw with the same seed and constraints
        are the same rows.

        Args:
            n: number of rows, 0 or more.
            seed: 0 or more.
            constraints: all must hold.

        Raises:
            UserError: a constraint is wrong (all problems at once), or fewer than 1 in 2,000 satisfy all of them.
        """
        if n < 0 or seed < 0:
            raise UserError(f"draw: n and seed must be 0 or more, got n={n} and seed={seed}")
        share = self.share(constraints) if constraints else 0.5
        if share < _MIN_SHARE:
            raise UserError(scarcity(constraints, _judge(self, constraints), _MIN_SHARE, self.quantile))
        kept: list[tuple[Floats, Ints]] = []
        found = 0
        for block in range(int(8 * n / (share * _BLOCK_ROWS)) + 8):
            values, codes = _candidates(self, seed, block)
            mask = _kept(self, constraints, values, codes).all(axis=0)
            kept.append((values[mask], codes[mask]))
            found += int(mask.sum())
            if found >= n:
                values, codes = (np.concatenate(part)[:n] for part in zip(*kept, strict=True))
                return to_frame(self.schema, values, codes)
        raise UserError(f"draw: only {found} of {n} rows after {block + 1} blocks of {_BLOCK_ROWS} candidates")

    def completed(self, table: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
        """The table without gaps: what a row leaves open is drawn, given what it says.

        The known values stay, and a row's draw follows from them and its seed alone. Of 16 draws the first is taken that is
        inside the support; of a row whose known values are outside already, the first of all. No known value counts as
        further out than the most extreme of as many people as were fitted: beyond the last person the smoothed curve
        would make a year decide about everything else.

        Args:
            table: validated rows, whose columns are the schema's.
            seeds: (B,) 0 or more.
        """
        values, codes = to_arrays(self.schema, table)
        incomplete = np.flatnonzero(np.isnan(values).any(axis=1) | (codes < 0).any(axis=1))
        for block in np.split(incomplete, range(_BLOCK_ROWS, len(incomplete), _BLOCK_ROWS)):
            of_block = [seeds[row] for row in block.tolist()]
            values[block], codes[block] = _completed(self, values[block], codes[block], of_block)
        return to_frame(self.schema, values, codes)

    def share(self, constraints: Sequence[Constraint] = ()) -> float:
        """Share (0-1) of the distribution that is inside the support and satisfies all constraints.

        Measured on 65,536 candidates of a fixed stream, so that whether a request is possible never depends on a seed.
        """
        discrete = [c.name for c in discrete_covariates(self.schema)]
        seen = {name: {cell.categories[k] for cell in self.cells} for k, name in enumerate(discrete)}
        problems = constraint_problems(constraints, self.schema, seen, self.quantile)
        if problems:
            raise problems_error("constraints that no row can satisfy", problems)
        return float(_judge(self, constraints).all(axis=0).mean())

    def quantile(self, name: str, probability: float) -> float:
        """Value of a continuous covariate below which this share (0-1) of the whole fitted marginal lies."""
        names = [m.name for m in self.marginals]
        if name not in names or not 0 <= probability <= 1:
            raise UserError(
                f"quantile: needs one of {', '.join(names)} and a share in 0-1, got {name!r}, {probability!r}"
            )
        index = names.index(name)
        p, means, scales = _cell_arrays(self)
        latent = copula.latent_at(ndtri(probability), p, means[:, index], scales[:, index])
        low, high = bounds(continuous_covariates(self.schema)[index])
        return float(np.clip(np.interp(latent, LATENT, self.marginals[index].knots), low, high))

    def in_support(self, table: pd.DataFrame) -> Bools:
        """(B,) True where a validated row is as near as the cohort's own people and all its values are inside [low, high].

        The distance of a row is Mahalanobis's to the centre of its cell, in normal-score space. A row with missing values
        is measured on what it has, at the nearest cell, and its distance is put on the scale of a complete row (same tail
        probability); it is infinite for a category that the cohort never had. The threshold is the 99 % quantile of the
        distances of people left out of the fit (5 folds), and at least the 99.9 % quantile of the model itself. So about
        1 % of real people of the same cohort are flagged by chance.
        """
        return self._inside(*to_arrays(self.schema, table))

    def _inside(self, values: Floats, codes: Ints) -> Bools:
        inside: Bools = self._distance(values, codes) <= self.support_threshold
        for column, c in zip(values.T, continuous_covariates(self.schema), strict=True):
            low, high = bounds(c)
            inside &= ~((column < low) | (column > high))
        return inside

    def _distance(self, values: Floats, codes: Ints) -> Floats:
        _, means, scales = _cell_arrays(self)
        return copula.cell_distance(_scores(self, values), codes, _cell_codes(self), means, scales, _correlation(self))


def fit_distribution(
    table: pd.DataFrame, schema: CovariateSchema, where: str, one_category: bool = False
) -> CovariateDistribution:
    """Fit the joint distribution of all covariates of `schema`.

    With `missing="indicator"` every row is used for what it has: a marginal from all its known values, a correlation
    from the rows that know both values, the cells from the rows that know all discrete covariates. That is unbiased
    only where values are missing completely at random. With `missing="refuse"` an incomplete row is an error, as for
    the model itself.

    Args:
        table: cohort, one row per person, any further columns are ignored.
        schema: continuous, binary and categorical covariates; categories that the table lacks are never drawn.
        where: names the table in errors.
        one_category: everybody may have the same category, as in a cohort of one site.

    Raises:
        UserError: bad values, fewer than 20 known values, a constant covariate, or too many combinations of categories.
    """
    values, codes = check_distribution(table, schema, where, one_category)
    levels = [np.unique(column[column >= 0]) for column in codes.T]
    combinations = list(itertools.product(*levels))  # the empty one, where no covariate is discrete
    cells = np.array(combinations, dtype=np.int64).reshape(len(combinations), len(levels))
    fold = np.random.default_rng(0).permutation(len(values)) % 5
    left_out = [
        _fit(schema, values[fold != k], codes[fold != k], cells)._distance(values[fold == k], codes[fold == k])
        for k in range(5)
    ]
    fitted = _fit(schema, values, codes, cells)
    calibrated = float(np.quantile(np.concatenate(left_out), _EXPECTED_INSIDE))
    return replace(fitted, support_threshold=max(fitted.support_threshold, calibrated))


def check_distribution(
    table: pd.DataFrame, schema: CovariateSchema, where: str, one_category: bool = False
) -> tuple[Floats, Ints]:
    """The values and codes of the rows that say anything. Raises UserError where they are too few to fit a distribution."""
    values, codes = to_arrays(schema, schema.validate(table, where))
    known = np.isfinite(values).any(axis=1) | (codes >= 0).any(axis=1)
    values, codes = values[known], codes[known]
    problems = thin_problems(schema, values, codes, one_category)
    if problems:
        raise problems_error(f"{where}: {len(values)} rows, too few to fit a distribution", problems)
    return values, codes


def _fit(schema: CovariateSchema, values: Floats, codes: Ints, cells: Ints) -> CovariateDistribution:
    """The model of the module's docstring on fixed cells (N, C), so that folds without some category still fit."""
    probability, means, scales, correlation = copula.fit_cells(values, codes, cells)
    marginals = []
    for j, c in enumerate(continuous_covariates(schema)):
        low, high = bounds(c)
        offset, step = copula.lattice(values[:, j], low, high)
        at, score = copula.smoothed_marginal(values[:, j], low, high, c.scale == "log")
        of_latent = copula.mixture_score(probability, means[:, j], scales[:, j])
        known = int(np.isfinite(values[:, j]).sum())
        knots = copula.with_even_tails(np.interp(of_latent, score, at), of_latent, known, c.scale == "log")
        marginals.append(
            ContinuousMarginal(name=c.name, knots=tuple(knots.tolist()), lattice_offset=offset, lattice_step=step)
        )
    names = [[c.categories[i] for c, i in zip(discrete_covariates(schema), cell, strict=True)] for cell in cells]
    return CovariateDistribution(
        schema=schema,
        n_rows=len(values),
        marginals=tuple(marginals),
        cells=tuple(
            Cell(categories=tuple(n), probability=float(p), means=tuple(m.tolist()), scales=tuple(s.tolist()))
            for n, p, m, s in zip(names, probability, means, scales, strict=True)
        ),
        correlation=tuple(tuple(row) for row in correlation.tolist()),
        support_threshold=float(np.sqrt(chdtri(max(len(marginals), 1), 0.001))),
    )


def _candidates(distribution: CovariateDistribution, seed: int, block: int) -> tuple[Floats, Ints]:
    """Block of 4,096 rows of the unconstrained model: values (B, D) on the lattice and category codes (B, C)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, block])))
    p, means, scales = _cell_arrays(distribution)
    cell_of = np.minimum(np.searchsorted(np.cumsum(p), rng.random(_BLOCK_ROWS), side="right"), len(p) - 1)
    white = rng.standard_normal((_BLOCK_ROWS, len(distribution.marginals)))
    latent = means[cell_of] + scales[cell_of] * (white @ np.linalg.cholesky(_correlation(distribution)).T)
    return _on_lattice(distribution, latent), _cell_codes(distribution)[cell_of]


def _on_lattice(distribution: CovariateDistribution, latent: Floats) -> Floats:
    """(B, D) values at latent scores."""
    values = np.empty_like(latent)
    for j, (m, c) in enumerate(zip(distribution.marginals, continuous_covariates(distribution.schema), strict=True)):
        low, high = bounds(c)
        inside = low + np.abs(np.interp(latent[:, j], LATENT, m.knots) - low)  # mirrored, as kernels are
        steps = np.rint((high - np.abs(high - inside) - m.lattice_offset) / m.lattice_step)
        first, last = ((bound - m.lattice_offset) / m.lattice_step for bound in (low, high))
        values[:, j] = m.lattice_offset + m.lattice_step * np.clip(steps, np.ceil(first), np.floor(last))
    return values


def _scores(distribution: CovariateDistribution, values: Floats) -> Floats:
    """(B, D) latent scores of values, NaN where unknown."""
    latent = np.full(values.shape, np.nan)
    for j, marginal in enumerate(distribution.marginals):
        latent[:, j] = np.interp(values[:, j], marginal.knots, LATENT)
    return latent


def _completed(d: CovariateDistribution, values: Floats, codes: Ints, seeds: Sequence[int]) -> tuple[Floats, Ints]:
    """A block of incomplete rows, as `completed` says."""
    p, means, scales = _cell_arrays(d)
    known, given, most = _scores(d, values), codes.copy(), -ndtri(0.5 / d.n_rows)
    for column, mean, scale in zip(known.T, means.T, scales.T, strict=True):
        column[:] = column.clip(*copula.latent_at(np.array([-most, most]), p, mean, scale))
    model = (p, means, scales, _correlation(d))
    unknown, usual = np.isnan(values), d._inside(values, codes)
    left = np.arange(len(values))
    for attempt in range(_COMPLETIONS):
        keys = (np.random.SeedSequence([seeds[i], attempt]) for i in left.tolist())
        streams = [np.random.Generator(np.random.Philox(key)) for key in keys]
        uniform = np.array([stream.random() for stream in streams])
        normal = np.array([stream.standard_normal(len(d.marginals)) for stream in streams])
        scores, codes[left] = copula.completed_scores(
            known[left], given[left], _cell_codes(d), model, most, uniform, normal
        )
        values[left] = np.where(unknown[left], _on_lattice(d, scores), values[left])
        left = left[usual[left] & ~d._inside(values[left], codes[left])]
        if not left.size:
            break
    return values, codes


def _kept(d: CovariateDistribution, constraints: Sequence[Constraint], values: Floats, codes: Ints) -> Bools:
    """(constraints + 1, B) what each row satisfies; the last line is the support guard."""
    columns = dict(zip([c.name for c in continuous_covariates(d.schema)], values.T, strict=True))
    columns |= dict(zip([c.name for c in discrete_covariates(d.schema)], codes.T, strict=True))
    return np.vstack([satisfied(constraints, d.schema, columns, d.quantile), d._inside(values, codes)])


def _judge(d: CovariateDistribution, constraints: Sequence[Constraint]) -> Bools:
    """(constraints + 1, 65536) what each candidate of a fixed stream satisfies."""
    return np.hstack([_kept(d, constraints, *_candidates(d, 0, block)) for block in range(_JUDGED_BLOCKS)])


def _correlation(d: CovariateDistribution) -> Floats:
    """(D, D)"""
    return np.array(d.correlation, dtype=np.float64).reshape(len(d.marginals), len(d.marginals))


def _cell_arrays(d: CovariateDistribution) -> tuple[Floats, Floats, Floats]:
    """Probabilities (N,), latent means (N, D) and scales (N, D) of the cells."""
    means, scales = np.array([c.means for c in d.cells]), np.array([c.scales for c in d.cells])
    return np.array([c.probability for c in d.cells]), means, scales


def _cell_codes(d: CovariateDistribution) -> Ints:
    """(N, C) category indices of the cells."""
    discrete = discrete_covariates(d.schema)
    codes = [[c.categories.index(name) for c, name in zip(discrete, cell.categories, strict=True)] for cell in d.cells]
    return np.array(codes, dtype=np.int64).reshape(len(d.cells), len(discrete))
