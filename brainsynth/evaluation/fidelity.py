"""Does a measured dataset look like real scans, and is it as diverse: each figure beside the real-against-real floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainsynth.evaluation.bootstrap import bootstrap_interval
from brainsynth.evaluation.distributions import cohens_d, wasserstein_distance
from brainsynth.evaluation.finding import LEAST, Finding, finding
from brainsynth.evaluation.measurement import BINS, Measured
from brainsynth.evaluation.ssim import four_g_r_ssim, ms_ssim, pair_indices
from brainsynth.storage.reader import SyntheticDataset

F64 = npt.NDArray[np.float64]
_WINDOW, _MAX_SCALES = 7, 5


def fidelity(made_root: str, real_root: str) -> list[Finding]:
    """Distances of the dataset from the training scans, beside those of the validation scans from them."""
    made, real = Measured(made_root), Measured(real_root)
    train, held = real.split("train"), real.split("validation")
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
    return finding(metric, unit, ends[0], len(made), ends[1], len(held), better)


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
        out.append(finding(name, "", ends[0], len(scores[0]), ends[1], len(scores[1]), "equal"))
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
