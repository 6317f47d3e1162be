"""Judge a measured dataset against measured real scans: does it obey its labels, and does it look like them.

Nothing is judged against a number of our own choosing. Each figure stands beside what the same instrument finds on real
scans that it was not fitted on (the validation split), and the verdict is whether the two intervals meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.agreement import Agreement, Discrimination, agreement, discrimination
from brainsynth.evaluation.bootstrap import bootstrap_interval
from brainsynth.evaluation.covariate_ruler import CovariateRuler
from brainsynth.evaluation.distributions import cohens_d, wasserstein_distance
from brainsynth.evaluation.measurement import BINS, measured_blocks, measured_table
from brainsynth.evaluation.segmentation import Calibration
from brainsynth.evaluation.ssim import four_g_r_ssim, ms_ssim, pair_indices
from brainsynth.records import record
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.reader import SyntheticDataset

F64 = npt.NDArray[np.float64]
LEAST, LEAST_TO_FIT = 8, 20
"""Known values of a covariate below which nothing is judged, and no ruler fitted."""
_WINDOW, _MAX_SCALES = 7, 5
_CONSTANT = 1e-6


@record
class Finding:
    """One line of the verdict table."""

    metric: str
    unit: str
    value: float
    low: float
    """With `high`, the 95 % confidence interval."""
    high: float
    n: int
    real: float
    """The same figure of real scans that no ruler was fitted on."""
    real_low: float
    real_high: float
    real_n: int
    better: Literal["higher", "lower", "equal"]
    """Which side of the real scans' interval is no fault."""

    @property
    def as_real(self) -> bool:
        """True when the interval meets that of real scans, or lies on the better side of it."""
        too_low, too_high = self.high < self.real_low, self.low > self.real_high
        return not {"higher": too_low, "lower": too_high, "equal": too_low or too_high}[self.better]


@record
class Scatter:
    """Asked and measured values of one covariate, for a figure and for the table of measured values."""

    covariate: str
    unit: str
    sample_ids: tuple[str, ...]
    asked: tuple[float, ...]
    measured: tuple[float, ...]
    """NaN where nothing could be measured. Binary: the probability of the second category."""


class Measured:
    """The measurements of a dataset: its table and the matrix of tissue features, row by row."""

    def __init__(self, root: str) -> None:
        self.table = measured_table(root)
        self.tissue = np.concatenate(list(measured_blocks(root, "tissue")))
        self.histogram = np.concatenate(list(measured_blocks(root, "histogram"))).astype(np.float64)
        assert len(self.table) == len(self.tissue) == len(self.histogram)

    def split(self, name: str) -> npt.NDArray[np.intp]:
        """Rows of one split. Raises UserError when there are too few."""
        if "split" not in self.table:
            raise UserError("reference: it has no splits; give a cohort made by jobs/prepare_cohort.py")
        rows = np.flatnonzero(self.table["split"] == name)
        if len(rows) < LEAST:
            raise UserError(f"reference: {len(rows)} measured scans in its {name} split; at least {LEAST} are needed")
        return rows


def assess(config: EvaluateConfig, made_root: str, real_root: str) -> tuple[list[Finding], list[Scatter]]:
    """All that the measurements tell: adherence per covariate, then fidelity.

    Raises:
        UserError: the reference has too few scans, or another schema of covariates.
    """
    made, real = Measured(made_root), Measured(real_root)
    covariates = read_plan(open_store(made_root)).covariates
    absent = [c for c in covariates.names if c not in real.table]
    if absent:
        raise UserError(f"reference: it does not know the covariate(s) {', '.join(absent)} of the dataset")
    train, held = real.split("train"), real.split("validation")
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
    return findings + _fidelity(made, real, train, held), scatters


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
    spread = _finding(f"{name}: SD measured over SD asked", "", ends[0], len(found), ends[1], len(own), "equal")
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
    return _finding(metric, unit, mine, made.n, theirs, real.n, better)


def _finding(
    metric: str,
    unit: str,
    mine: list[float],
    n: int,
    theirs: list[float],
    real_n: int,
    better: Literal["higher", "lower", "equal"],
) -> Finding:
    return Finding(
        metric=metric, unit=unit, value=mine[0], low=mine[1], high=mine[2], n=n,
        real=theirs[0], real_low=theirs[1], real_high=theirs[2], real_n=real_n, better=better,
    )  # fmt: skip


def _fidelity(made: Measured, real: Measured, train: npt.NDArray[np.intp], held: npt.NDArray[np.intp]) -> list[Finding]:
    """Distances of the dataset from the training scans, beside those of the validation scans from them."""
    out = [_against(_intensity_distance, "voxel intensity: Wasserstein-1 distance to training scans", "",
                    made.histogram, real.histogram[held], real.histogram[train], "lower")]  # fmt: skip
    columns = [c for c in real.table if c == "gradient" or str(c).endswith("_ml")]
    for column in columns:
        values = [t[column].to_numpy(np.float64) for t in (made.table, real.table.iloc[held], real.table.iloc[train])]
        values = [v[np.isfinite(v)] for v in values]
        if min(map(len, values)) < LEAST or any(np.ptp(v) == 0 for v in values[1:]):
            continue
        what = "sharpness (mean gradient)" if column == "gradient" else f"{column[:-3].replace('_', ' ')} volume"
        out.append(_against(cohens_d, f"{what}: Cohen's d from training scans", "", *values, "equal"))
        if column != "gradient":
            metric = f"{what}: Wasserstein-1 distance to training scans"
            out.append(_against(wasserstein_distance, metric, "ml", *values, "lower"))
    return out


def _against(
    statistic: Callable[[Any, Any], float],
    metric: str,
    unit: str,
    made: F64,
    held: F64,
    train: F64,
    better: Literal["higher", "lower", "equal"],
) -> Finding:
    mine, theirs = (bootstrap_interval(statistic, [v, train], method="percentile", resamples=500) for v in (made, held))
    ends = [[c.value, c.low, c.high] for c in (mine, theirs)]
    return _finding(metric, unit, ends[0], len(made), ends[1], len(held), better)


def _intensity_distance(first: F64, second: F64) -> float:
    """Wasserstein-1 distance of two stacks of (N, BINS) histograms over [0, 1], all volumes of a stack together."""
    gap = np.cumsum(first.sum(0) / first.sum() - second.sum(0) / second.sum())
    return float(np.abs(gap).sum() / BINS)


def diversity(made: SyntheticDataset, real: SyntheticDataset, pairs: int) -> list[Finding]:
    """MS-SSIM and 4-G-R-SSIM of random pairs of the dataset, beside random pairs of real scans of different people."""
    side = min(made.volume(0).shape)
    scales = max((s for s in range(1, _MAX_SCALES + 1) if _WINDOW * 2 ** (s - 1) <= side), default=0)
    if not scales:
        return []
    names = (f"MS-SSIM of random pairs ({scales} scales, window {_WINDOW})", "4-G-R-SSIM of random pairs")
    scores = [_pair_scores(dataset, pairs, scales) for dataset in (made, real)]
    out = []
    for column, name in enumerate(names):
        ends = []
        for values in scores:
            found = bootstrap_interval(np.mean, [values[:, column]], method="percentile")
            ends.append([found.value, found.low, found.high])
        out.append(_finding(name, "", ends[0], len(scores[0]), ends[1], len(scores[1]), "equal"))
    return out


def _pair_scores(dataset: SyntheticDataset, pairs: int, scales: int) -> F64:
    count = min(pairs, len(dataset) * (len(dataset) - 1) // 2)
    scores = []
    for i, j in pair_indices(len(dataset), count, seed=0):
        first, second = dataset.volume(int(i)), dataset.volume(int(j))
        scores.append(
            [float(ms_ssim(first, second, window=_WINDOW, scales=scales)), float(four_g_r_ssim(first, second))]
        )
    return np.array(scores)
