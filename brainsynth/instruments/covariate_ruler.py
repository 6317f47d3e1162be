"""A ruler for a covariate that an image shows: age, sex, any other; ridge regression on features of the image, known error.

The penalty is chosen by cross-validation over people, in closed form (all folds and penalties from one Gram matrix).
Quote the ruler's own error on real scans (`own_error`) with what it measures on generated ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.instruments.linear_ruler import F32, F64, Kind, LinearRuler, calibrated
from brainsynth.metrics.agreement import Agreement, Discrimination, agreement, discrimination
from brainsynth.records import record

_ALPHAS = 10.0 ** np.arange(-5, 3.1, 0.5)
"""Penalties tried, in units of the mean squared length of a centred row."""
_FOLDS, _OUTER_FOLDS, _MIN_ROWS = 5, 10, 20


@record
class OwnError:
    """A ruler's error on people that it was not fitted on: nested cross-validation within its fitting set."""

    kind: Kind
    folds: int
    plain: Agreement | None
    """Continuous: predictions as ridge regression gives them, shrunk towards the mean (slope below 1)."""
    corrected: Agreement | None
    """Continuous: after the correction of that shrinkage, which costs precision."""
    categories: Discrimination | None
    """Binary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CovariateRuler(LinearRuler):
    """A fitted ruler. Make one with `fit`."""

    alpha: float
    """Penalty, relative to the mean squared length of a centred row."""
    own_error: OwnError | None

    @classmethod
    def fit(
        cls,
        features: npt.NDArray[np.floating[Any]],
        values: npt.ArrayLike,
        *,
        groups: npt.ArrayLike,
        kind: Kind = "continuous",
        seed: int = 0,
        own_error: bool = True,
    ) -> CovariateRuler:
        """Regress (N,) values on (N, F) features, N >= 20.

        The cost grows with the cube of N: some seconds for 1,000 rows; a few thousand are enough for any ridge.

        Args:
            values: the covariate in its unit; binary: 0 for the first category, 1 for the second.
            groups: (N,) subject ids; rows of one subject never stand on both sides of a fold.
            seed: of the folds.
            own_error: also estimate the error on unseen people, by 10-fold cross-validation around all choices.

        Raises:
            UserError: unusable or mismatching arrays, too few rows or people, a covariate without variation.
        """
        x, y, unit = _checked(features, values, groups, kind)
        gram = x.astype(np.float64) @ x.T.astype(np.float64)
        rows = np.arange(len(y))
        alpha, line = _choose(gram, y, unit, kind, seed)
        dual, _ = _solve(gram, y, rows, alpha)
        mean = x.mean(0, dtype=np.float64)
        weights = dual @ (x - mean)
        return cls(
            kind=kind,
            mean=mean.astype(np.float32),
            weights=weights.astype(np.float32),
            intercept=float(y.mean()),
            alpha=alpha,
            calibration=line,
            own_error=_nested_error(gram, y, unit, kind, seed) if own_error else None,
        )


def _checked(
    features: npt.NDArray[Any], values: npt.ArrayLike, groups: npt.ArrayLike, kind: Kind
) -> tuple[F32, F64, npt.NDArray[np.intp]]:
    x, y, names = np.asarray(features, np.float32), np.asarray(values, np.float64), np.asarray(groups)
    if x.ndim != 2 or y.shape != (len(x),) or names.shape != y.shape:
        raise UserError(f"features {x.shape}, values {y.shape} and groups {names.shape} must be (N, F), (N,) and (N,)")
    unit = _units(names)
    if len(x) < _MIN_ROWS or unit.max() + 1 < _MIN_ROWS:
        raise UserError(
            f"a ruler needs at least {_MIN_ROWS} images of as many people, not {len(x)} of {unit.max() + 1}"
        )
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise UserError("some features or values are not finite; leave those images out and report how many")
    if kind not in ("continuous", "binary"):
        raise UserError(f"kind = {kind!r} must be 'continuous' or 'binary'")
    if kind == "binary" and (not np.isin(y, (0, 1)).all() or min(y.sum(), (1 - y).sum()) < _FOLDS):
        raise UserError(f"a binary covariate needs values 0 and 1, at least {_FOLDS} of each")
    if np.ptp(y) == 0 or float(x.std(0).max()) == 0:
        raise UserError("the covariate, or every feature, is the same in all images: there is nothing to fit")
    return x, y, unit


def _units(names: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """(N,) index of each row's subject, without gaps."""
    unit: npt.NDArray[np.intp] = np.unique(names, return_inverse=True)[1]
    return unit


def _fold_of(y: F64, unit: npt.NDArray[np.intp], folds: int, seed: int) -> npt.NDArray[np.intp]:
    """(N,) fold of each row, the same for all rows of a subject, with values spread evenly over the folds.

    Evenly, because a fold with high values leaves a training set with a low mean: a ruler that sees nothing predicts that
    mean, and would seem to correlate negatively.
    """
    sums, counts = np.bincount(unit, y), np.bincount(unit)
    rng = np.random.default_rng([seed, folds])
    order = np.lexsort((rng.random(len(sums)), sums / counts))
    fold = np.empty(len(sums), np.intp)
    for start in range(0, len(order), folds):
        block = order[start : start + folds]
        fold[block] = rng.permutation(folds)[: len(block)]
    spread: npt.NDArray[np.intp] = fold[unit]
    return spread


def _centred(gram: F64, rows: npt.NDArray[np.intp], train: npt.NDArray[np.intp]) -> F64:
    """Inner products of `rows` and `train` after the mean of `train` was taken from both."""
    inner = gram[np.ix_(train, train)]
    out: F64 = (
        gram[np.ix_(rows, train)] - gram[np.ix_(rows, train)].mean(1, keepdims=True) - inner.mean(0) + inner.mean()
    )
    return out


def _solve(gram: F64, y: F64, train: npt.NDArray[np.intp], alpha: float) -> tuple[F64, float]:
    """Dual weights (K + alpha * trace(K) / n)⁻¹ (y - mean), and that mean, of ridge regression on the rows `train`."""
    inner = _centred(gram, train, train)
    penalty = alpha * np.trace(inner) / len(train) * np.eye(len(train))
    dual: F64 = np.linalg.solve(inner + penalty, y[train] - y[train].mean())
    return dual, float(y[train].mean())


def _choose(gram: F64, y: F64, unit: npt.NDArray[np.intp], kind: Kind, seed: int) -> tuple[float, tuple[float, float]]:
    """Penalty of the smallest squared out-of-fold error, and the calibration that those predictions call for."""
    predictions = np.empty((len(_ALPHAS), len(y)))
    fold = _fold_of(y, unit, _FOLDS, seed)
    for i in range(_FOLDS):
        train, test = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        size, axes = np.linalg.eigh(_centred(gram, train, train))
        along = axes.T @ (y[train] - y[train].mean())
        seen = _centred(gram, test, train) @ axes
        for j, alpha in enumerate(_ALPHAS):
            predictions[j, test] = seen @ (along / (size + alpha * size.mean())) + y[train].mean()
    best = int(np.square(predictions - y).sum(1).argmin())
    out_of_fold = predictions[best]
    if kind == "binary":
        return float(_ALPHAS[best]), _log_odds(out_of_fold, y)
    slope = float(np.cov(out_of_fold, y)[0, 1] / np.var(y, ddof=1))
    # A ruler that sees nothing of the covariate has a slope near 0; to divide by it would only blow up noise.
    slope = max(slope, 0.1)
    return float(_ALPHAS[best]), (float(out_of_fold.mean() - slope * y.mean()), slope)


def _log_odds(score: F64, y: F64) -> tuple[float, float]:
    """(offset, slope) of the logistic regression of y on one score, by Newton steps, with a weak ridge (Platt 1999)."""
    design = np.stack([np.ones_like(score), (score - 0.5) / max(float(score.std()), 1e-12)])
    beta, ridge = np.zeros(2), np.diag([0.0, 1e-2 * len(y) / 100 + 1e-3])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(beta @ design, -30, 30)))
        curve = (design * (p * (1 - p))) @ design.T + ridge + 1e-9 * np.eye(2)
        step = np.linalg.solve(curve, design @ (y - p) - ridge @ beta)
        beta = beta + np.clip(step, -2, 2)
        if float(np.abs(step).max()) < 1e-9:
            break
    slope = float(beta[1] / max(float(score.std()), 1e-12))
    return float(beta[0] - 0.5 * slope), slope


def cross_predict(
    features: npt.NDArray[np.floating[Any]],
    values: npt.ArrayLike,
    *,
    groups: npt.ArrayLike,
    kind: Kind = "continuous",
    seed: int = 0,
) -> tuple[F64, F64]:
    """(N,) predictions, plain and corrected, each by a ruler that was fitted without that row's fold of people.

    Nested: every fold chooses its penalty and calibration from the other folds alone. Arguments and errors are those of
    `CovariateRuler.fit`; binary: both are the same probabilities.
    """
    x, y, unit = _checked(features, values, groups, kind)
    return _cross_predict(x.astype(np.float64) @ x.T.astype(np.float64), y, unit, kind, seed)


def _cross_predict(gram: F64, y: F64, unit: npt.NDArray[np.intp], kind: Kind, seed: int) -> tuple[F64, F64]:
    plain, corrected = np.empty(len(y)), np.empty(len(y))
    fold = _fold_of(y, unit, _OUTER_FOLDS, seed + 1)
    for i in range(_OUTER_FOLDS):
        train, test = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        alpha, line = _choose(gram[np.ix_(train, train)], y[train], _units(unit[train]), kind, seed)
        dual, mean = _solve(gram, y, train, alpha)
        raw = _centred(gram, test, train) @ dual + mean
        plain[test] = calibrated(raw, kind, line, False)
        corrected[test] = calibrated(raw, kind, line, True)
    return plain, corrected


def _nested_error(gram: F64, y: F64, unit: npt.NDArray[np.intp], kind: Kind, seed: int) -> OwnError:
    plain, corrected = _cross_predict(gram, y, unit, kind, seed)
    binary = kind == "binary"
    return OwnError(
        kind=kind,
        folds=_OUTER_FOLDS,
        plain=None if binary else agreement(plain, y, groups=unit, seed=seed),
        corrected=None if binary else agreement(corrected, y, groups=unit, seed=seed),
        categories=discrimination(plain, y, groups=unit, seed=seed) if binary else None,
    )
