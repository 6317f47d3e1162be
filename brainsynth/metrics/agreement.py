"""How well measured values agree with true (or asked) ones, in any unit, with 95 % confidence intervals.

`agreement` is for numbers, `discrimination` for two categories. Both take `groups`: rows of one group (sessions of one
person) are not independent, so intervals treat a group as the unit that was sampled.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from brainsynth.errors import UserError
from brainsynth.records import record

F64 = npt.NDArray[np.float64]
_Z = 1.959964  # 97.5 % point of the normal distribution
_RESAMPLES = 2000
_PIECE = 1 << 22  # weights held at one time while resampling


@record
class Agreement:
    """Measured against true values. `_low` and `_high` are the ends of 95 % confidence intervals."""

    n: int
    n_groups: int
    """Independent units (people) among the n pairs."""
    r: float
    """Pearson correlation; its interval is Fisher's z with `n_groups` pairs."""
    r_low: float
    r_high: float
    mae: float
    """Mean absolute error, in the covariate's unit; its interval, like those below, is a bootstrap over groups."""
    mae_low: float
    mae_high: float
    slope: float
    """Measured per true (least squares); below 1, the ruler or the generator shrinks towards the mean."""
    slope_low: float
    slope_high: float
    bias: float
    """Mean of measured minus true, in the covariate's unit."""
    bias_low: float
    bias_high: float


@record
class Discrimination:
    """A score against two categories. `_low` and `_high` are the ends of 95 % confidence intervals."""

    n: int
    n_groups: int
    n_positive: int
    """Rows of the second category."""
    auc: float
    """Chance that a row of the second category scores above one of the first (ties count one half)."""
    auc_low: float
    auc_high: float
    balanced_accuracy: float
    """Mean of the two categories' shares that fall on their own side of the threshold; bootstrap over groups."""
    balanced_accuracy_low: float
    balanced_accuracy_high: float


def agreement(
    measured: npt.ArrayLike, true: npt.ArrayLike, *, groups: npt.ArrayLike | None = None, seed: int = 0
) -> Agreement:
    """Agreement of (N,) measured with (N,) true values of one unit, N >= 4.

    Args:
        groups: (N,) names of the independent units; without it every row is one.
        seed: of the bootstrap; the same seed gives the same intervals.

    Raises:
        UserError: fewer than 4 pairs or groups, different lengths, values that are not finite, or all the same.
    """
    m, t = _pair(measured, true)
    unit, count = _units(groups, len(m))
    for name, values in (("measured", m), ("true", t)):
        if np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())):
            raise UserError(f"all {name} values are the same, so there is no correlation; use different ones")
    value = _moments(np.ones((1, len(m))), m, t)
    r = float(np.clip(value["r"][0], -1, 1))
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), _Z / math.sqrt(count - 3)
    ends: dict[str, float] = {}
    draws = [_moments(weights, m, t) for weights in _resampled(unit, count, len(m), seed)]
    for name in ("mae", "slope", "bias"):
        drawn = np.concatenate([draw[name] for draw in draws])
        low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
        ends |= {name: float(value[name][0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return Agreement(
        n=len(m), n_groups=count, r=r, r_low=min(r, math.tanh(z - half)), r_high=max(r, math.tanh(z + half)), **ends
    )


def discrimination(
    score: npt.ArrayLike,
    positive: npt.ArrayLike,
    *,
    threshold: float = 0.5,
    groups: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Discrimination:
    """Agreement of (N,) scores with (N,) categories (0 or False: the first, 1 or True: the second).

    The interval of the AUC is DeLong's (1988) on the logit scale, its influence values summed over groups (Obuchowski
    1997). Where the categories are separated completely that variance is 0; then the bound is the exact one of as many
    pairs, all in the right order, as the smaller category has rows.

    Args:
        threshold: scores of at least this count as the second category.
        groups: (N,) names of the independent units; without it every row is one.
        seed: of the bootstrap of the balanced accuracy.

    Raises:
        UserError: different lengths, values that are not finite, other categories than 0 and 1, or fewer than 2 of one.
    """
    s, p = _pair(score, positive)
    unit, count = _units(groups, len(s))
    if not np.isin(p, (0, 1)).all() or min(p.sum(), (1 - p).sum()) < 2:
        raise UserError(
            "categories must be 0 and 1 with at least 2 rows each; encode them, or add rows of the rarer one"
        )
    auc, error = _auc(s, p == 1, unit, count)
    low, high = _auc_interval(auc, error, int(min(p.sum(), (1 - p).sum())))
    right = ((s >= threshold) == (p == 1)).astype(np.float64)

    def balanced(weights: F64) -> F64:
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: F64 = (weights @ (right * p)) / (weights @ p) + (weights @ (right * (1 - p))) / (weights @ (1 - p))
        return shares / 2

    drawn = np.concatenate([balanced(weights) for weights in _resampled(unit, count, len(s), seed)])
    ends = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    return Discrimination(
        n=len(s),
        n_groups=count,
        n_positive=int(p.sum()),
        auc=auc,
        auc_low=low,
        auc_high=high,
        balanced_accuracy=float(balanced(np.ones((1, len(s))))[0]),
        balanced_accuracy_low=float(ends[0]),
        balanced_accuracy_high=float(ends[1]),
    )


def auc_of(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), of (N,) scores and (N,) categories 0 and 1, at least one each."""
    p = np.asarray(positive) == 1
    n, m = int(p.sum()), int((~p).sum())
    if not n or not m:
        raise UserError("an AUC needs rows of both categories; one of them is missing")
    return float((rankdata(score)[p].sum() - n * (n + 1) / 2) / (n * m))


def _pair(measured: npt.ArrayLike, true: npt.ArrayLike) -> tuple[F64, F64]:
    m, t = np.asarray(measured, np.float64), np.asarray(true, np.float64)
    if m.shape != t.shape or m.ndim != 1:
        raise UserError(f"measured {m.shape} and true {t.shape} values must be two lists of the same length")
    if len(m) < 4:
        raise UserError(f"a confidence interval needs at least 4 pairs of values, not {len(m)}")
    lost = int((~(np.isfinite(m) & np.isfinite(t))).sum())
    if lost:
        raise UserError(f"{lost} of {len(m)} pairs of values are not finite; leave them out and report how many")
    return m, t


def _units(groups: npt.ArrayLike | None, n: int) -> tuple[npt.NDArray[np.intp], int]:
    """(N,) index of each row's group, and the number of groups."""
    names = np.arange(n) if groups is None else np.asarray(groups)
    if names.shape != (n,):
        raise UserError(f"groups of shape {names.shape} must name the group of each of the {n} rows")
    unit = np.unique(names, return_inverse=True)[1]
    count = int(unit.max()) + 1
    if count < 4:
        raise UserError(f"a confidence interval needs at least 4 groups (people), not {count}")
    return unit, count


def _resampled(unit: npt.NDArray[np.intp], count: int, n: int, seed: int) -> Any:
    """Yields (B, N) weights: how often a bootstrap over groups drew each row."""
    rng = np.random.default_rng(seed)
    size = max(1, min(_RESAMPLES, _PIECE // max(count, n)))
    for start in range(0, _RESAMPLES, size):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(size, _RESAMPLES - start))
        yield drawn[:, unit].astype(np.float64)


def _moments(weights: F64, m: F64, t: F64) -> dict[str, F64]:
    """(B,) r, mae, slope and bias under each of (B, N) weights; not finite where a draw has no variation."""
    total = weights.sum(1)
    centred_m, centred_t = m - m.mean(), t - t.mean()  # sums of squares lose no digits this way
    mean_m, mean_t = weights @ centred_m / total, weights @ centred_t / total
    var_m, var_t = weights @ centred_m**2 / total - mean_m**2, weights @ centred_t**2 / total - mean_t**2
    joint = weights @ (centred_m * centred_t) / total - mean_m * mean_t
    with np.errstate(invalid="ignore", divide="ignore"):
        r, slope = joint / np.sqrt(var_m * var_t), np.where(var_t > 1e-12 * t.var(), joint / var_t, np.nan)
    return {"r": r, "mae": weights @ np.abs(m - t) / total, "slope": slope, "bias": weights @ (m - t) / total}


def _auc(s: F64, positive: npt.NDArray[np.bool_], unit: npt.NDArray[np.intp], count: int) -> tuple[float, float]:
    """AUC and its standard error by DeLong's placement values, computed from ranks (Sun & Xu 2014)."""
    n, m = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(s)
    place = np.empty(len(s))
    place[positive] = (ranks[positive] - rankdata(s[positive])) / m
    place[~positive] = 1 - (ranks[~positive] - rankdata(s[~positive])) / n
    auc = float(place[positive].mean())
    size = np.where(positive, n, m)
    influence = (place - auc) / np.sqrt(size * (size - 1.0))
    return auc, math.sqrt(float(np.square(np.bincount(unit, influence, count)).sum()))


def _auc_interval(auc: float, error: float, fewest: int) -> tuple[float, float]:
    if not 1e-9 < auc < 1 - 1e-9:
        room = 0.025 ** (1 / fewest)
        return (room, 1.0) if auc > 0.5 else (0.0, 1 - room)
    centre, half = math.log(auc / (1 - auc)), _Z * error / (auc * (1 - auc))
    low, high = (1 / (1 + math.exp(-min(700.0, max(-700.0, end)))) for end in (centre - half, centre + half))
    return low, high
