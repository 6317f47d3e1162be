"""Metrics of a trained network on real test scans, with what another training and other test people would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from brainsynth.metrics.agreement import auc_of
from brainsynth.metrics.overlap import dice
from brainsynth.records import record
from brainsynth.usefulness.budgeted_training import VolumeRows
from brainsynth.usefulness.structures import Structures

F64 = npt.NDArray[np.float64]
Task = Literal["continuous", "binary", "segmentation", "structures"]
METRICS: dict[str, tuple[str, str]] = {
    "continuous": ("mae", "r"),
    "binary": ("auc", "balanced_accuracy"),
    "segmentation": ("dice", "volume_r"),
    "structures": ("dice", "dice_all_ventricles"),
}
"""The two metrics of a task; structures have their own Dice each, too. Only for `mae` (in the label's unit) is smaller
better."""
_RANGE = {"mae": (0.0, np.inf), "r": (-1.0, 1.0), "volume_r": (-1.0, 1.0)}
_SHARE = (0.0, 1.0)  # all others
_FREE = (-np.inf, np.inf)
_RESAMPLES = 500


@record
class Estimate:
    """A metric on the real test set, or a difference of it between two arms."""

    mean: float
    """Over the seeds."""
    low: float
    high: float
    """With `low`, the 95 % interval of that mean over seeds (Student's t): what another training would change."""
    people_low: float
    people_high: float
    """With `people_low`, the 95 % interval of the mean over test people (bootstrap): what other test scans would change."""
    per_seed: tuple[float, ...]


def metrics_of(task: Task, structures: Structures | None = None) -> tuple[str, ...]:
    """Names of all metrics of a task: of structures their mean, all ventricles as one if the names say which, and each."""
    if structures is None:
        return METRICS[task]
    together = METRICS[task] if structures.ventricles else METRICS[task][:1]
    return (*together, *(f"dice_{name}" for name in structures.names))


def _structure_outcome(predicted: npt.NDArray[Any], classes: npt.NDArray[Any], structures: Structures) -> F64:
    """(K,) `metrics_of` one test volume; NaN for structures that its own label map lacks, which count nowhere."""
    all_classes = range(1, len(structures.names) + 1)
    scores = [dice(predicted, classes, all_classes)]
    if structures.ventricles:
        marked, true = (np.isin(each, structures.ventricles).astype(np.uint8) for each in (predicted, classes))
        scores.insert(0, np.where(true.any(), dice(marked, true, (1,)), np.nan))
    scores[-1][~np.isin(all_classes, classes)] = np.nan
    return np.concatenate([[np.nanmean(scores[-1])], *scores])


def outcome_of(
    task: Task, predicted: npt.NDArray[Any], labels: npt.NDArray[Any] | VolumeRows, structures: Structures | None = None
) -> F64:
    """What the metrics need of each test volume.

    (N, 2) prediction and truth; of a structure (N, 3) Dice, marked and true voxels; of structures (N, K) their metrics.
    """
    if structures is not None:
        return np.stack([_structure_outcome(each, labels[row], structures) for row, each in enumerate(predicted)])
    true = labels[:]
    if task != "segmentation":
        return np.stack([predicted, true], 1).astype(np.float64)
    marked, true = predicted.reshape(len(true), -1) > 0, true.reshape(len(true), -1) > 0.5
    both, size = (marked & true).sum(1), marked.sum(1) + true.sum(1)
    overlap = np.where(size > 0, 2 * both / np.maximum(size, 1), 1.0)
    return np.stack([overlap, marked.sum(1), true.sum(1)], 1).astype(np.float64)


def _metrics(task: Task, outcome: F64) -> Sequence[float]:
    """The task's metrics of (N, …) outcomes; NaN where a resample lacks a category or a structure."""
    if task == "structures":
        known = np.isfinite(outcome).sum(0)
        return list(np.where(known > 0, np.nansum(outcome, 0) / np.maximum(known, 1), np.nan))
    if task == "segmentation":
        return float(outcome[:, 0].mean()), _correlation(outcome[:, 1], outcome[:, 2])
    predicted, true = outcome.T
    if task == "continuous":
        return float(np.abs(predicted - true).mean()), _correlation(predicted, true)
    if np.ptp(true) == 0:
        return float("nan"), float("nan")
    right = (predicted > 0) == (true == 1)
    return auc_of(predicted, true), float((right[true == 1].mean() + right[true == 0].mean()) / 2)


def _correlation(a: F64, b: F64) -> float:
    """Pearson's r, and 0 where one does not vary: a constant answer says nothing."""
    return float(np.corrcoef(a, b)[0, 1]) if min(np.ptp(a), np.ptp(b)) > 1e-9 else 0.0


def per_seed(task: Task, outcomes: list[F64]) -> F64:
    """(S, K) metrics of one (N, …) outcome per seed."""
    return np.array([_metrics(task, outcome) for outcome in outcomes])


def resampled(task: Task, outcomes: list[F64], people: npt.NDArray[Any]) -> F64:
    """(D, K) metrics, averaged over seeds, on test people drawn with replacement; the same draws for every arm.

    People is (N,), the subject of each row: all rows of a subject are drawn together.
    """
    unit = np.unique(people, return_inverse=True)[1]
    rows_of = [np.flatnonzero(unit == u) for u in range(unit.max() + 1)]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([rows_of[u] for u in rng.integers(0, len(rows_of), len(rows_of))])
        means.append(per_seed(task, [outcome[rows] for outcome in outcomes]).mean(0))
    return np.array(means)


def estimates(names: Sequence[str], seeds: F64, drawn: F64, *, clip: bool = True) -> dict[str, Estimate]:
    """Of (S, K) metrics per seed, and (D, K) their means over seeds on resampled test people.

    A structure that no test volume has is left out.

    Args:
        names: of the K metrics.
        clip: cut the intervals over seeds at the ends of the metric's range; not for differences.
    """
    count = len(seeds)
    half = float(student.ppf(0.975, count - 1)) * seeds.std(0, ddof=1) / np.sqrt(count)
    there = np.isfinite(seeds.mean(0))
    low, high = np.full((2, len(names)), np.nan)
    low[there], high[there] = np.nanquantile(drawn[:, there], (0.025, 0.975), axis=0)
    return {
        name: Estimate(
            mean=float(seeds[:, i].mean()),
            low=float(np.clip(seeds[:, i].mean() - half[i], *(_RANGE.get(name, _SHARE) if clip else _FREE))),
            high=float(np.clip(seeds[:, i].mean() + half[i], *(_RANGE.get(name, _SHARE) if clip else _FREE))),
            people_low=float(low[i]),
            people_high=float(high[i]),
            per_seed=tuple(float(value) for value in seeds[:, i]),
        )
        for i, name in enumerate(names)
        if there[i]
    }
