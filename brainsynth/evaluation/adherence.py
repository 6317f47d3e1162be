"""Do the images show what was asked for: each covariate measured on the image, beside the value that was asked.

The ruler of a covariate is fitted or calibrated on the training scans; what it finds on the validation scans, people that
it was not fitted on, is its own error.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.covariates import CovariateSchema
from brainsynth.evaluation.agreement import Agreement, Discrimination, agreement, discrimination
from brainsynth.evaluation.bootstrap import bootstrap_interval
from brainsynth.evaluation.covariate_ruler import CovariateRuler
from brainsynth.evaluation.finding import LEAST, Finding, finding
from brainsynth.evaluation.measurement import Measured
from brainsynth.evaluation.segmentation import Calibration
from brainsynth.records import record

F64 = npt.NDArray[np.float64]
LEAST_TO_FIT = 20
"""Known values of a covariate below which no ruler is fitted."""
_CONSTANT = 1e-6


@record
class Scatter:
    """Asked and measured values of one covariate, for a figure and for the table of measured values."""

    covariate: str
    unit: str
    sample_ids: tuple[str, ...]
    asked: tuple[float, ...]
    measured: tuple[float, ...]
    """NaN where nothing could be measured. Binary: the probability of the second category."""


def adherence(
    config: EvaluateConfig,
    covariates: CovariateSchema,
    made: Measured,
    real: Measured,
    train: npt.NDArray[np.intp],
    held: npt.NDArray[np.intp],
) -> tuple[list[Finding], list[Scatter]]:
    """Every covariate that a ruler can be had for: verdicts, and the values themselves.

    Args:
        train: rows of `real` that rulers are fitted on.
        held: rows of `real` that give the rulers' own errors.
    """
    findings: list[Finding] = []
    scatters: list[Scatter] = []
    for covariate in covariates.covariates:
        name = covariate.name
        asked, known = (_numbers(t[name], covariate.categories) for t in (made.table, real.table))
        if len(_usable(train, known)) < LEAST_TO_FIT:
            continue
        if name in config.structures:
            column = config.structures[name]
            fit = _usable(train, known, real.table[column])
            line = Calibration.fit(real.table[column].to_numpy()[fit], known[fit])
            found, own = line.apply(made.table[column]), line.apply(real.table[column])
        else:
            fit = _usable(train, known)
            kind: Literal["continuous", "binary"] = "continuous" if covariate.kind == "continuous" else "binary"
            groups = real.table["subject"].to_numpy()[fit]
            ruler = CovariateRuler.fit(real.tissue[fit], known[fit], groups=groups, kind=kind, own_error=False)
            found, own = ruler.predict(made.tissue), ruler.predict(real.tissue)
        ids = tuple(made.table["sample_id"])
        scatters.append(
            Scatter(covariate=name, unit=covariate.unit, sample_ids=ids, asked=tuple(asked), measured=tuple(found))
        )
        pairs = _usable(np.arange(len(asked)), asked, found), _usable(held, known, own)
        if min(map(len, pairs)) >= LEAST:
            compare = _numeric if covariate.kind == "continuous" else _category
            subjects = real.table["subject"].to_numpy()[pairs[1]]
            findings += compare(
                name, covariate.unit, asked[pairs[0]], found[pairs[0]], known[pairs[1]], own[pairs[1]], subjects
            )
    return findings, scatters


def _numbers(values: pd.Series, categories: tuple[str, ...]) -> F64:
    """Values as numbers; of categories, 0 for the first and 1 for the others. NaN where unknown."""
    if not categories:
        return values.to_numpy(dtype=np.float64)
    return np.array([np.nan if pd.isna(v) or v == "" else float(v != categories[0]) for v in values])


def _usable(rows: npt.NDArray[np.intp], *columns: Any) -> npt.NDArray[np.intp]:
    """Those of the rows in which every column is known."""
    known = np.all([np.isfinite(np.asarray(column, np.float64)[rows]) for column in columns], axis=0)
    return rows[known]


def _numeric(
    name: str, unit: str, asked: F64, found: F64, known: F64, own: F64, subjects: npt.NDArray[Any]
) -> list[Finding]:
    ends = []
    for pair in ((found, asked), (own, known)):
        ratio = bootstrap_interval(_spread, pair, paired=True, method="percentile", resamples=500)
        ends.append([ratio.value, ratio.low, ratio.high])
    spread = finding(f"{name}: SD measured over SD asked", "", ends[0], len(found), ends[1], len(own), "equal")
    if ends[0][0] < _CONSTANT:
        return [spread]  # all images show one value: there is no correlation
    made, real = agreement(found, asked), agreement(own, known, groups=subjects)
    return [
        spread,
        _line(f"{name}: r of measured with asked", "", "r", made, real, "higher"),
        _line(f"{name}: slope", "", "slope", made, real, "equal"),
        _line(f"{name}: bias", unit, "bias", made, real, "equal"),
        _line(f"{name}: mean absolute error", unit, "mae", made, real, "lower"),
    ]


def _spread(found: F64, asked: F64) -> float:
    return float(found.std() / max(asked.std(), 1e-12))


def _category(
    name: str, unit: str, asked: F64, found: F64, known: F64, own: F64, subjects: npt.NDArray[Any]
) -> list[Finding]:
    if min(min(np.sum(v), np.sum(1 - v)) for v in (asked, known)) < 2:
        return []
    made, real = discrimination(found, asked), discrimination(own, known, groups=subjects)
    return [
        _line(f"{name}: AUC of measured for asked", "", "auc", made, real, "higher"),
        _line(f"{name}: balanced accuracy", "", "balanced_accuracy", made, real, "higher"),
    ]


def _line(
    metric: str,
    unit: str,
    key: str,
    made: Agreement | Discrimination,
    real: Agreement | Discrimination,
    better: Literal["higher", "lower", "equal"],
) -> Finding:
    mine, theirs = ([float(getattr(v, key + end)) for end in ("", "_low", "_high")] for v in (made, real))
    return finding(metric, unit, mine, made.n, theirs, real.n, better)
