"""Arithmetic of the covariate distribution: plain arrays in, plain arrays out. `distribution` says what it means.

Shapes: B rows, N cells (combinations of categories), D continuous covariates, C discrete ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, chdtri, ndtr, ndtri
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LATENT = np.linspace(-8.0, 8.0, 321)
"""Latent scores at which every marginal stores its value."""

# Priors in rows. Held-out likelihood is flat around them (four cohorts, 12 half splits): a level is shrunk little, so
# that the sex effect stays whole, and a combination of levels much, so that a site's two women are not replayed.
_LEVEL_PRIOR, _CELL_PRIOR, _SCALE_PRIOR = 0.5, 30.0, 16.0
_BANDWIDTHS = np.array([0.35, 0.5, 0.7, 1.0])  # of Silverman's rule, which flattens the two-peaked ages of real cohorts
_KERNEL_ROWS = 500  # larger cohorts are smoothed from this many quantiles: the same curve in bounded memory


def fit_cells(values: Floats, codes: Ints, cells: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    """Cell probabilities (N,), latent means (N, D) and scales (N, D), and the correlation (D, D) within cells.

    Args:
        values: (B, D), NaN where missing.
        codes: (B, C) category indices, -1 where missing.
        cells: (N, C) category indices; a cell without rows is predicted from its levels.
    """
    scores = np.full(values.shape, np.nan)
    for column, score in zip(values.T, scores.T, strict=True):
        known = np.isfinite(column)
        score[known] = ndtri((rankdata(column[known]) - 0.5) / known.sum())
    member = (codes[:, None, :] == cells[None]).all(axis=2)
    means = _cell_means(scores, member, codes, cells)
    placed = member.any(axis=1)
    cell_of = member[placed].argmax(axis=1)
    residuals = scores[placed] - means[cell_of]
    scales = _cell_scales(residuals, cell_of, len(cells))
    return _cell_probability(member, codes, cells), means, scales, _rank_correlation(residuals / scales[cell_of])


def cell_distance(
    latent: Floats, codes: Ints, cells: Ints, means: Floats, scales: Floats, correlation: Floats
) -> Floats:
    """(B,) Mahalanobis distance to the nearest matching cell; inf without a match. NaN and code -1 are left out."""
    squared = np.full(len(latent), np.inf)
    for rows, has, precision in _patterns(latent, correlation):
        for cell, mean, scale in zip(cells, means, scales, strict=True):
            members = rows[((codes[rows] == cell) | (codes[rows] < 0)).all(axis=1)]
            e = (latent[np.ix_(members, has)] - mean[has]) / scale[has]
            squared[members] = np.minimum(squared[members], np.einsum("bi,ij,bj->b", e, precision, e))
        squared[rows] = _as_complete(squared[rows], int(has.sum()), has.size)
    distance: Floats = np.sqrt(squared)
    return distance


def completed_scores(
    latent: Floats,
    codes: Ints,
    cells: Ints,
    model: tuple[Floats, Floats, Floats, Floats],
    most: float,
    uniform: Floats,
    normal: Floats,
) -> tuple[Floats, Ints]:
    """Latent scores (B, D) and category indices (B, C) without gaps, drawn given what each row knows.

    A row's cell is drawn with the probability that Bayes' rule gives each that agrees with most of its known categories; its
    unknown scores then from the normal distribution given the known ones.

    Args:
        latent: (B, D), NaN where unknown.
        codes: (B, C), -1 where unknown.
        model: probabilities (N,), latent means (N, D) and scales (N, D) of the cells, correlation (D, D) within them.
        most: how far a known score may lie from the middle of its cell, in standard deviations; further ones count as this
            far.
        uniform: (B,) in [0, 1).
        normal: (B, D) standard normal.
    """
    probability, means, scales, correlation = model
    complete = latent.copy()
    shared = ((codes[:, None, :] == cells[None]) | (codes[:, None, :] < 0)).sum(axis=2)
    agrees = shared == shared.max(axis=1, keepdims=True)
    chosen = np.zeros(len(latent), dtype=np.int64)
    for rows, has, precision in _patterns(latent, correlation):
        e = (latent[rows][:, None, has] - means[:, has]) / scales[:, has]
        log_odds = np.log(probability) - np.log(scales[:, has]).sum(axis=1)
        log_odds = np.where(agrees[rows], log_odds - np.einsum("bni,ij,bnj->bn", e, precision, e) / 2, -np.inf)
        below = np.cumsum(np.exp(log_odds - log_odds.max(axis=1, keepdims=True)), axis=1)
        cell = (uniform[rows, None] * below[:, -1:] >= below).sum(axis=1)
        chosen[rows] = cell
        if not has.all():
            slopes = correlation[np.ix_(~has, has)] @ precision
            left = np.linalg.cholesky(correlation[np.ix_(~has, ~has)] - slopes @ correlation[np.ix_(has, ~has)])
            drawn = e[np.arange(len(rows)), cell].clip(-most, most) @ slopes.T + normal[rows][:, ~has] @ left.T
            complete[np.ix_(rows, ~has)] = means[cell][:, ~has] + scales[cell][:, ~has] * drawn
    return complete, np.where(codes < 0, cells[chosen], codes)


def _patterns(latent: Floats, correlation: Floats) -> Iterator[tuple[npt.NDArray[np.intp], Bools, Floats]]:
    """Rows that know the same scores: their indices, which scores (D,) those are, and the inverse of their correlation."""
    known = np.isfinite(latent)
    pattern_ids = known @ (1 << np.arange(latent.shape[1], dtype=np.int64))
    for pattern_id in np.unique(pattern_ids):
        rows = np.flatnonzero(pattern_ids == pattern_id)
        has: Bools = known[rows[0]]
        yield rows, has, np.asarray(np.linalg.inv(correlation[np.ix_(has, has)]), np.float64)


def _cell_probability(member: Bools, codes: Ints, cells: Ints) -> Floats:
    """(N,) cell frequencies, shrunk by half a row per cell to the product of the marginal frequencies."""
    independent = np.ones(len(cells))
    for column, levels in zip(codes.T, cells.T, strict=True):
        independent *= (column[:, None] == levels).sum(axis=0) / (column >= 0).sum()
    prior = 0.5 * len(cells)
    shrunk: Floats = (member.sum(axis=0) + prior * independent) / (member.sum() + prior)
    normalised: Floats = shrunk / shrunk.sum()
    return normalised


def _cell_means(scores: Floats, member: Bools, codes: Ints, cells: Ints) -> Floats:
    """(N, D) latent means: ridge regression on levels (weakly shrunk) and on their combinations (strongly)."""
    levels = [(k, level) for k in range(cells.shape[1]) for level in np.unique(cells[:, k])]
    rows = np.array([codes[:, k] == level for k, level in levels], dtype=bool).reshape(len(levels), len(codes)).T
    of_cells = np.array([cells[:, k] == level for k, level in levels], dtype=bool).reshape(len(levels), len(cells)).T
    penalty = np.full(len(levels), _LEVEL_PRIOR)
    if cells.shape[1] > 1:
        rows, of_cells = np.hstack([rows, member]), np.hstack([of_cells, np.eye(len(cells), dtype=bool)])
        penalty = np.concatenate([penalty, np.full(len(cells), _CELL_PRIOR)])
    means = np.zeros((len(cells), scores.shape[1]))
    for j, score in enumerate(scores.T):
        used = np.isfinite(score) & member.any(axis=1)
        design = rows[used].astype(np.float64)
        effects = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ score[used])
        means[:, j] = of_cells @ effects
    return means


def _cell_scales(residuals: Floats, cell_of: Ints, n_cells: int) -> Floats:
    """(N, D) latent standard deviations, shrunk to the pooled one."""
    known = np.isfinite(residuals)
    squares = np.where(known, residuals, 0.0) ** 2
    pooled = squares.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    inside = (cell_of[None] == np.arange(n_cells)[:, None]).astype(np.float64)
    scales: Floats = np.sqrt((_SCALE_PRIOR * pooled + inside @ squares) / (_SCALE_PRIOR + inside @ known))
    return np.maximum(scales, 0.05)  # a covariate that a category determines still needs some width


def _rank_correlation(e: Floats) -> Floats:
    """(D, D) latent correlation that gives the rank correlations of `e` (r = 2 sin(pi rho / 6)), positive definite."""
    matrix = np.eye(e.shape[1])
    for i, j in itertools.combinations(range(e.shape[1]), 2):
        both = np.isfinite(e[:, i]) & np.isfinite(e[:, j])
        if both.sum() > 2:
            with np.errstate(invalid="ignore"):
                spearman = np.corrcoef(rankdata(e[both, i]), rankdata(e[both, j]))[0, 1]
            matrix[i, j] = matrix[j, i] = 2 * np.sin(np.pi * np.nan_to_num(spearman) / 6)
    if matrix.size == 0:
        return matrix
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * np.maximum(values, 1e-4)) @ vectors.T  # pairwise estimates need not be positive definite
    spread = np.sqrt(np.diag(matrix))
    corrected: Floats = matrix / spread[:, None] / spread
    return corrected


def smoothed_marginal(column: Floats, low: float, high: float, in_log: bool) -> tuple[Floats, Floats]:
    """Grid of values and their normal scores under the kernel-smoothed marginal, on [low, high].

    Adaptive kernels (Abramson 1982): wide in the tails, where a person is alone. Kernels are mirrored at low and high,
    so no mass leaks out and none piles up at the ends. A log-scaled covariate is smoothed in the log.
    """
    x = column[np.isfinite(column)]
    if in_log:
        x, low, high = np.log(x), float(np.log(low)), float(np.log(high))
    silverman = 0.9 * _spread(x, 0.01 * (high - low)) * x.size**-0.2
    if x.size > _KERNEL_ROWS:
        x = np.quantile(x, (np.arange(_KERNEL_ROWS) + 0.5) / _KERNEL_ROWS)
    width = _kernel_widths(x, silverman)
    grid = np.linspace(max(low, (x - 6 * width).min()), min(high, (x + 6 * width).max()), 513)
    near_ends = np.geomspace(1e-8, 0.9, 60) * (grid[1] - grid[0])  # where scores run to infinity within one step
    grid = np.sort(np.concatenate([grid, grid[0] + near_ends, grid[-1] - near_ends]))
    below, above = np.zeros(grid.size), np.zeros(grid.size)
    for centre in (x, 2 * low - x, 2 * high - x):
        below += (ndtr((grid[:, None] - centre) / width) - ndtr((low - centre) / width)).sum(axis=1)
        above += (ndtr((centre - grid[:, None]) / width) - ndtr((centre - high) / width)).sum(axis=1)
    score = _normal_score(below / (below + above), above / (below + above))
    return (np.exp(grid) if in_log else grid), score


def _spread(x: Floats, fallback: float) -> float:
    """Standard deviation, or the scaled interquartile range where it is smaller and there is one."""
    spread = np.array([x.std(), (np.quantile(x, 0.75) - np.quantile(x, 0.25)) / 1.349])
    usable = spread[spread > 1e-4 * fallback]
    return float(usable.min()) if usable.size else fallback


def _kernel_widths(x: Floats, silverman: float) -> Floats:
    """(B,) adaptive widths; of some multiples of Silverman's rule, the one under which left-out people are likeliest.

    All people with the same value are left out together: whole-year ages would otherwise ask for needles.
    """
    squared, others = (x[:, None] - x) ** 2, x[:, None] != x
    best, best_score = np.full(x.size, silverman), -np.inf
    for pilot in silverman * _BANDWIDTHS:
        density = np.exp(-0.5 * squared / pilot**2).mean(axis=1)
        width = pilot * np.clip(np.sqrt(np.exp(np.log(density).mean()) / density), 0.5, 4.0)
        left_out = (np.exp(-0.5 * squared / width**2) / width * others).sum(axis=1)
        score = float(np.log(np.maximum(left_out, 1e-12)).mean())
        if score > best_score:
            best, best_score = width, score
    return best


def lattice(column: Floats, low: float, high: float) -> tuple[float, float]:
    """Offset and step of the values that may be drawn: the offset is as far as can be from every fitted remainder."""
    step = (high - low) * 2.0**-20
    remainders = np.unique((column[np.isfinite(column)] - low) % step)
    gaps = np.diff(remainders, append=remainders[0] + step)
    widest = int(gaps.argmax())
    return float(low + remainders[widest] + gaps[widest] / 2), step


def _normal_score(below: Floats, above: Floats) -> Floats:
    """Normal scores from both tails, exact in each, kept within ±9."""
    with np.errstate(divide="ignore"):
        scores: Floats = np.where(below < above, ndtri(np.maximum(below, 0.0)), -ndtri(np.maximum(above, 0.0)))
    return np.maximum.accumulate(np.clip(scores, -9.0, 9.0))


def mixture_score(probability: Floats, means: Floats, scales: Floats) -> Floats:
    """(321,) normal scores of the latent grid under the mixture of the cells."""
    e = (LATENT[:, None] - means) / scales
    return _normal_score(ndtr(e) @ probability, ndtr(-e) @ probability)


def with_even_tails(knots: Floats, scores: Floats, people: int, in_log: bool) -> Floats:
    """(321,) knots that continue in a straight line where less than half a person is expected, past low and high if need be.

    Kernels end within a few of their widths, and at low or high at once: somebody as old as a cohort's bound would have a
    score of 8, as far out as nobody is, and the threshold of the support would be measured on such people. The line's slope
    is the standard deviation that the middle 95 % suggest.

    Args:
        knots: (321,) values at the latent scores.
        scores: (321,) normal scores of the latent ones, `mixture_score`.
        people: who have a value.
        in_log: the line is one of logarithms.
    """
    line = np.log(knots) if in_log else knots.copy()
    inside = -ndtri(0.5 / people)
    first, low, high, last = np.interp([-inside, -2.0, 2.0, inside], scores, LATENT)
    below, left, right, above = np.interp([first, low, high, last], LATENT, line)
    slope = (right - left) / (high - low)
    line = np.where(first > LATENT, below + slope * (LATENT - first), line)
    line = np.where(last < LATENT, above + slope * (LATENT - last), line)
    return np.exp(line) if in_log else line


def latent_at(score: Floats, probability: Floats, means: Floats, scales: Floats) -> Floats:
    """Latent scores of a covariate that have these normal scores under the mixture of the cells."""
    return np.interp(score, mixture_score(probability, means, scales), LATENT)


def _as_complete(squared: Floats, n_known: int, n_all: int) -> Floats:
    """Squared distance on n_all covariates with the tail probability that this one has on n_known."""
    if n_known in (0, n_all):
        return squared
    tail = chdtrc(n_known, squared)
    return np.where(tail > 1e-290, chdtri(n_all, np.maximum(tail, 1e-290)), squared + n_all - n_known)
