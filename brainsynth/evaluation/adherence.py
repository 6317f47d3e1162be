"""Do the images show what was asked for: each covariate measured on the image, against the value that was asked.

The ruler of a covariate is fitted or calibrated on the training scans; what it finds on the validation scans, people that
it was not fitted on, is its own error.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import SEGMENTED, EvaluateConfig
from brainsynth.covariates.arrays import as_numbers
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.evaluation.structures import structure_volume
from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.measured import Measured
from brainsynth.instruments.own_rulers import MeasuredTable, check_allowed, function_values
from brainsynth.instruments.segmentation import Calibration
from brainsynth.metrics.agreement import Agreement, Discrimination, agreement, discrimination
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.metrics.intervals import bootstrap_interval
from brainsynth.records import record

F64 = npt.NDArray[np.float64]
LEAST_TO_FIT = 20
"""Known values of a covariate below which no ruler is fitted."""
_CONSTANT = 1e-6


@record
class Scatter:
    """Asked and measured values of one covariate, for a figure and for the table of measured values."""

    covariate: str
    within: str = ""
    """What all its rows have in common, as figures name it."""
    unit: str
    ruler: str
    """What measured it."""
    sample_ids: tuple[str, ...]
    asked: tuple[float, ...]
    measured: tuple[float, ...]
    """NaN where nothing could be measured. Binary: the probability of the second category."""

    @property
    def title(self) -> str:
        """The covariate, and which rows."""
        return f"{self.covariate}{self.within}"


def adherence(
    config: EvaluateConfig,
    covariates: CovariateSchema,
    made: Measured,
    real: Measured,
    train: npt.NDArray[np.intp],
    held: npt.NDArray[np.intp],
    within: str = "",
) -> tuple[list[Finding], list[Scatter]]:
    """Every covariate that has a ruler: verdicts, and the values themselves.

    Args:
        train: rows of `real` that rulers are fitted on.
        held: rows of `real` that give the rulers' own errors.
        within: what all rows have in common, for the names of the figures.
    """
    findings: list[Finding] = []
    scatters: list[Scatter] = []
    for covariate in covariates.covariates:
        name = covariate.name
        asked, known = (as_numbers(t[name], covariate.categories) for t in (made.table, real.table))
        if len(_usable(train, known)) < LEAST_TO_FIT:
            continue
        measured, own = _measure(config, covariate, made, real, known, train)
        ids = tuple(made.table["sample_id"])
        scatters.append(
            Scatter(
                covariate=name,
                within=within,
                unit=covariate.unit,
                ruler=ruler_of(config, name),
                sample_ids=ids,
                asked=tuple(asked),
                measured=tuple(measured),
            )
        )
        pairs = _usable(np.arange(len(asked)), asked, measured), _usable(held, known, own)
        if min(map(len, pairs)) >= LEAST:
            compare = _numeric if covariate.kind == "continuous" else _category
            subjects = real.table["subject"].to_numpy()[pairs[1]]
            findings += compare(
                f"{name}{within}",
                covariate.unit,
                asked[pairs[0]],
                measured[pairs[0]],
                known[pairs[1]],
                own[pairs[1]],
                subjects,
            )
    return findings, scatters


def measured_values(scatters: list[Scatter]) -> pd.DataFrame:
    """sample_id and one `measured_…` column a covariate, in its unit; of two categories the second's probability."""
    if not scatters:
        return pd.DataFrame({"sample_id": pd.Series(dtype=str)})
    columns: dict[str, pd.Series] = {}
    for scatter in scatters:
        name = f"measured_{scatter.covariate}"
        values = pd.Series(scatter.measured, index=list(scatter.sample_ids), dtype=np.float64)
        columns[name] = pd.concat([columns[name], values]) if name in columns else values
    return pd.DataFrame(columns).rename_axis("sample_id").reset_index()


def check_rulers(config: EvaluateConfig, covariates: CovariateSchema, dataset: str) -> None:
    """Are the rulers of a config such as the dataset's covariates need? Reads the tables; imports and measures nothing.

    Raises UserError for a ruler of no covariate, a structure for a category, a table that does not fit.
    """
    known = {c.name: c for c in covariates.covariates}
    if config.by is not None and (config.by not in known or known[config.by].kind == "continuous"):
        categories = ", ".join(c.name for c in covariates.covariates if c.kind != "continuous") or "it has none"
        raise UserError(f"by: {config.by} is not a covariate of {dataset} that has categories ({categories})")
    for key in ("structures", "tables", "functions"):
        absent = [name for name in getattr(config, key) if name not in known]
        if absent:
            raise UserError(f"{key}: {', '.join(absent)} is not a covariate of {dataset} ({', '.join(known)})")
    for name in config.structures:
        if known[name].kind != "continuous":
            raise UserError(
                f"structures: {name} is not a number; name a table or a function that gives its probability"
            )
    for name, ruler in config.tables.items():
        for which in ("dataset", "reference"):
            MeasuredTable(ruler, which, name, known[name].unit)
    check_allowed(config.functions)


def ruler_of(config: EvaluateConfig, covariate: str) -> str:
    """What measures a covariate, in words."""
    if covariate in config.structures:
        structure = config.structures[covariate]
        return f"{'segmentation' if structure in SEGMENTED else 'labeller'}, {structure}"
    if covariate in config.tables:
        return f"table, {' + '.join(config.tables[covariate].columns)}"
    return f"function {config.functions[covariate]}" if covariate in config.functions else "ridge on tissue maps"


def _measure(
    config: EvaluateConfig,
    covariate: Covariate,
    made: Measured,
    real: Measured,
    known: F64,
    train: npt.NDArray[np.intp],
) -> tuple[F64, F64]:
    """One covariate on the dataset and on the reference, in its unit; of two categories, the second's probability."""
    name = covariate.name
    if name in config.structures:
        measured, own = (structure_volume(m.table, config.structures[name]) for m in (made, real))
    elif name in config.tables:
        measured, own = (
            MeasuredTable(config.tables[name], which, name, covariate.unit).of(m.table["sample_id"])
            for which, m in (("dataset", made), ("reference", real))
        )
    elif name in config.functions:
        measured, own = (function_values(m.table, name) for m in (made, real))
    else:
        fit = _usable(train, known)
        kind: Literal["continuous", "binary"] = "continuous" if covariate.kind == "continuous" else "binary"
        groups = real.table["subject"].to_numpy()[fit]
        ruler = CovariateRuler.fit(real.tissue[fit], known[fit], groups=groups, kind=kind, own_error=False)
        return ruler.predict(made.tissue), ruler.predict(real.tissue)
    if not covariate.categories:
        return _calibrated(covariate, measured, own, known, train)
    if (both := np.concatenate([measured, own]))[np.isfinite(both) & ((both < 0) | (both > 1))].size:
        raise UserError(f"{name}: the ruler must give the probability of {covariate.categories[1]}, in [0, 1]")
    return measured, own


def _calibrated(
    covariate: Covariate, measured: F64, own: F64, known: F64, train: npt.NDArray[np.intp]
) -> tuple[F64, F64]:
    """Both on the scale of the known values, by a line through the training scans."""
    fit = _usable(train, known, own)
    try:
        line = Calibration.fit(own[fit], known[fit])
    except UserError as error:
        raise UserError(
            f"{covariate.name}: the ruler cannot be calibrated on {len(fit)} training scans that have a measured and a "
            f"known value: {error}"
        ) from None
    floor = 0.0 if covariate.low is not None and covariate.low >= 0 else -np.inf
    return line.apply(measured, floor), line.apply(own, floor)


def _usable(rows: npt.NDArray[np.intp], *columns: Any) -> npt.NDArray[np.intp]:
    """Those of the rows in which every column is known."""
    known = np.all([np.isfinite(np.asarray(column, np.float64)[rows]) for column in columns], axis=0)
    return rows[known]


def _numeric(
    name: str, unit: str, asked: F64, measured: F64, known: F64, own: F64, subjects: npt.NDArray[Any]
) -> list[Finding]:
    mine, theirs = (
        bootstrap_interval(_spread, pair, paired=True, method="percentile", resamples=500)
        for pair in ((measured, asked), (own, known))
    )
    metric = f"{name}: SD measured over SD asked"
    spread = finding(metric, "", mine.figure, len(measured), theirs.figure, len(own), "equal")
    if mine.value < _CONSTANT:
        return [spread]  # all images show one value: there is no correlation
    made, real = agreement(measured, asked), agreement(own, known, groups=subjects)
    return [
        spread,
        verdict(f"{name}: r of measured with asked", "", "r", made, real, "higher"),
        verdict(f"{name}: slope", "", "slope", made, real, "equal"),
        verdict(f"{name}: bias", unit, "bias", made, real, "equal"),
        verdict(f"{name}: mean absolute error", unit, "mae", made, real, "lower"),
    ]


def _spread(measured: F64, asked: F64) -> float:
    return float(measured.std() / max(asked.std(), 1e-12))


def _category(
    name: str, unit: str, asked: F64, measured: F64, known: F64, own: F64, subjects: npt.NDArray[Any]
) -> list[Finding]:
    if min(min(np.sum(v), np.sum(1 - v)) for v in (asked, known)) < 2:
        return []
    made, real = discrimination(measured, asked), discrimination(own, known, groups=subjects)
    return [
        verdict(f"{name}: AUC of measured for asked", "", "auc", made, real, "higher"),
        verdict(f"{name}: balanced accuracy", "", "balanced_accuracy", made, real, "higher"),
    ]


def verdict(
    metric: str,
    unit: str,
    key: str,
    made: Agreement | Discrimination,
    real: Agreement | Discrimination,
    better: Literal["higher", "lower", "equal"],
) -> Finding:
    """One figure of the agreement of the dataset and of real scans; `key` names it in both."""
    mine, theirs = ([float(getattr(v, key + end)) for end in ("", "_low", "_high")] for v in (made, real))
    return finding(metric, unit, mine, made.n, theirs, real.n, better)
