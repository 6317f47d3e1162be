"""Does a measured dataset look like real scans, and is it as diverse: each figure next to the real-against-real floor.

The floor is the same figure of the validation scans against the training scans. Figures that depend on n (all distances)
are taken at one n throughout: as many generated volumes, validation scans and training scans, drawn at random; Cohen's d
and the left-right figure, which do not, use all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from brainsynth.evaluation.feature_distances import feature_distances
from brainsynth.evaluation.measured_sample import SIDES, MeasuredSample
from brainsynth.instruments.measured import BINS
from brainsynth.metrics.distributions import cohens_d
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.metrics.intervals import bootstrap_interval, jackknife_interval
from brainsynth.metrics.ssim import four_g_r_ssim, ms_ssim, pair_indices
from brainsynth.reading.dataset import SyntheticDataset

F64 = npt.NDArray[np.float64]
Better = Literal["higher", "lower", "equal"]
_WINDOW, _MAX_SCALES = 7, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Verdicts, and what they were found on, for the figures of a report."""

    findings: list[Finding]
    remarks: list[str]
    """What is not judged, and why."""
    made: MeasuredSample
    held: MeasuredSample
    """Validation scans: the floor."""
    train: MeasuredSample


def fidelity(made_root: str, real_root: str, by: str | None = None) -> Fidelity:
    """Distances of a measured dataset from the training scans, and those of the validation scans from them.

    With `by`, a covariate with categories, the Fréchet distance is taken within each of them, too.

    Memory does not grow with the number of volumes: `MeasuredSample` has what is kept.

    Raises:
        UserError: a set or a split has too few volumes.
    """
    train = MeasuredSample.read(real_root, "train")
    held = MeasuredSample.read(real_root, "validation", usual_skew=train.mean_skew)
    made = MeasuredSample.read(made_root, usual_skew=train.mean_skew)
    n = min(len(made), len(held), len(train))
    stacks = [sample.arrays["histogram"][:n].astype(np.float64) for sample in (made, held, train)]
    metric = "voxel intensity: Wasserstein-1 distance to training scans"
    findings, remarks = feature_distances(made, held, train, by)
    findings.append(_against(_intensity_distance, metric, "", stacks, "lower"))
    sides = _left_right(made, held)
    if sides is None:
        remarks.append("Left and right: not judged, for the validation scans show no asymmetry of the training scans.")
    findings += [*([sides] if sides else []), *_scalars(made, held, train, n)]
    return Fidelity(findings=findings, remarks=remarks, made=made, held=held, train=train)


def _scalars(made: MeasuredSample, held: MeasuredSample, train: MeasuredSample, n: int) -> list[Finding]:
    """Sharpness, and the volume of each tissue and structure."""
    columns = [sample.volumes for sample in (made, held, train)]
    values = {f"{name} volume": [c[name] for c in columns] for name in columns[2] if all(name in c for c in columns)}
    values["sharpness (mean gradient)"] = [s.table["gradient"].to_numpy(np.float64) for s in (made, held, train)]
    out = []
    for what, sets in values.items():
        known = [v[np.isfinite(v)] for v in sets]
        if min(map(len, known)) < LEAST or any(np.ptp(v) == 0 for v in known[1:]):
            continue
        out.append(_against(cohens_d, f"{what}: Cohen's d from training scans", "", known, "equal"))
        if what.endswith("volume"):
            metric = f"{what}: Wasserstein-1 distance to training scans"
            out.append(_against(wasserstein_distance, metric, "ml", [v[:n] for v in known], "lower"))
    return out


def _left_right(made: MeasuredSample, held: MeasuredSample) -> Finding | None:
    """Mean correlation of each volume's left-right difference with the training scans' mean one; a flip turns its sign.

    None where real scans have no asymmetry in common, for then nothing distinguishes left from right.
    """
    mine, theirs = (
        bootstrap_interval(np.mean, [sample.table[SIDES].to_numpy(np.float64)], method="percentile")
        for sample in (made, held)
    )
    if theirs.low <= 0:
        return None
    metric = "left-right: correlation with the training scans' mean asymmetry"
    return finding(metric, "", mine.figure, len(made), theirs.figure, len(held), "higher")


def _against(
    statistic: Callable[[Any, Any], float], metric: str, unit: str, sets: list[F64], better: Better
) -> Finding:
    """A figure of made and of held (the floor) against train. Distances, "lower", have the jackknife's interval."""
    made, held, train = sets
    mine, theirs = (
        jackknife_interval(statistic, [values, train], least=0.0)
        if better == "lower"
        else bootstrap_interval(statistic, [values, train], method="percentile", resamples=500)
        for values in (made, held)
    )
    return finding(metric, unit, mine.figure, len(made), theirs.figure, len(held), better)


def _intensity_distance(first: F64, second: F64) -> float:
    """Wasserstein-1 distance of two stacks of (N, BINS) histograms over [0, 1], all volumes of a stack together."""
    middles = (np.arange(BINS) + 0.5) / BINS
    return float(wasserstein_distance(middles, middles, first.sum(0), second.sum(0)))


def diversity(made: SyntheticDataset, real: SyntheticDataset, pairs: int) -> list[Finding]:
    """MS-SSIM and 4-G-R-SSIM of random pairs of the dataset and of as many random pairs of real scans."""
    side = min(made.volume(0).shape)
    scales = max((s for s in range(1, _MAX_SCALES + 1) if _WINDOW * 2 ** (s - 1) <= side), default=0)
    if not scales:
        return []
    names = (f"MS-SSIM of random pairs ({scales} scales, window {_WINDOW})", "4-G-R-SSIM of random pairs")
    count = min(pairs, *(len(dataset) * (len(dataset) - 1) // 2 for dataset in (made, real)))
    scores = [_pair_scores(dataset, count, scales) for dataset in (made, real)]
    out = []
    for column, name in enumerate(names):
        mine, theirs = (bootstrap_interval(np.mean, [values[:, column]], method="percentile") for values in scores)
        out.append(finding(name, "", mine.figure, count, theirs.figure, count, "equal"))
    return out


def _pair_scores(dataset: SyntheticDataset, count: int, scales: int) -> F64:
    scores = []
    for i, j in pair_indices(len(dataset), count, seed=0):
        first, second = dataset.volume(int(i)), dataset.volume(int(j))
        scores.append(
            [float(ms_ssim(first, second, window=_WINDOW, scales=scales)), float(four_g_r_ssim(first, second))]
        )
    return np.array(scores)
