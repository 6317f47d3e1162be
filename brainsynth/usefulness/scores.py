"""Metrics of a trained network on real test scans, with what another training and other test people would change."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from brainsynth.metrics.agreement import auc_of
from brainsynth.records import record

F64 = npt.NDArray[np.float64]
Task = Literal["continuous", "binary", "segmentation"]
METRICS: dict[str, tuple[str, str]] = {
    "continuous": ("mae", "r"),
    "binary": ("auc", "balanced_accuracy"),
    "segmentation": ("dice", "volume_r"),
}
"""The two metrics of a task. Only for `mae` (in the label's unit) is smaller better."""
_RANGE = {"mae": (0.0, np.inf), "r": (-1.0, 1.0), "volume_r": (-1.0, 1.0), "auc": (0.0, 1.0), "dice": (0.0, 1.0),
          "balanced_accuracy": (0.0, 1.0)}  # fmt: skip
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


def outcome_of(task: Task, predicted: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> F64:
    """(N, 2 or 3) what the metrics need of each test volume: prediction and truth, or Dice, marked and true voxels."""
    if task != "segmentation":
        return np.stack([predicted, labels], 1).astype(np.float64)
    marked, true = predicted.reshape(len(labels), -1) > 0, labels.reshape(len(labels), -1) > 0.5
    both, size = (marked & true).sum(1), marked.sum(1) + true.sum(1)
    dice = np.where(size > 0, 2 * both / np.maximum(size, 1), 1.0)
    return np.stack([dice, marked.sum(1), true.sum(1)], 1).astype(np.float64)


def _metrics(task: Task, outcome: F64) -> tuple[float, float]:
    """The task's two METRICS of (N, 2 or 3) outcomes; NaN where a resample lacks a category."""
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
    """(S, 2) metrics of one (N, 2 or 3) outcome per seed."""
    return np.array([_metrics(task, outcome) for outcome in outcomes])


def resampled(task: Task, outcomes: list[F64], people: npt.NDArray[Any]) -> F64:
    """(D, 2) metrics, averaged over seeds, on test people drawn with replacement; the same draws for every arm.

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


def estimates(task: Task, seeds: F64, drawn: F64, *, clip: bool = True) -> dict[str, Estimate]:
    """Of (S, 2) metrics per seed, and (D, 2) their means over seeds on resampled test people.

    Args:
        clip: cut the intervals over seeds at the ends of the metric's range; not for differences.
    """
    count = len(seeds)
    half = float(student.ppf(0.975, count - 1)) * seeds.std(0, ddof=1) / np.sqrt(count)
    low, high = np.nanquantile(drawn, (0.025, 0.975), axis=0)
    return {
        name: Estimate(
            mean=float(seeds[:, i].mean()),
            low=float(np.clip(seeds[:, i].mean() - half[i], *(_RANGE[name] if clip else _FREE))),
            high=float(np.clip(seeds[:, i].mean() + half[i], *(_RANGE[name] if clip else _FREE))),
            people_low=float(low[i]),
            people_high=float(high[i]),
            per_seed=tuple(float(value) for value in seeds[:, i]),
        )
        for i, name in enumerate(METRICS[task])
    }
