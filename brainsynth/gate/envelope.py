"""How far each number of the quality gate may lie from the middle of its cohort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from brainsynth.gate.passes import F64

FOLDS, LEAST_LIMIT = 5, 3.0

_SIDE = dict.fromkeys(
    ["cut", "background", "pieces", "shape", "hole", "lump", "checkerboard", "stripes", "slices"], 1
) | {"flip": -1}
_FLOOR = {
    "foreground": 0.05, "cut": 0.8, "background": 0.2, "pieces": 0.03, "shape": 0.05, "hole": 0.05, "lump": 0.05,
    "flip": 0.1, "checkerboard": 0.15, "stripes": 0.15, "sharpness": 0.06, "noise": 0.1, "slices": 0.15,
    "contrast": 0.03, "bias": 0.05, "cut.x_step": 0.4, "cut.y_step": 0.4, "cut.z_step": 0.4, "hole.bright_size": 0.02,
    "hole.filled_size": 0.02, "hole.enclosed": 0.02, "lump.bright_size": 0.02,
    "lump.filled_size": 0.02,
}  # fmt: skip
# A cohort may be more alike than any eye can see (a background of exactly 0): no spread is taken to be smaller than this.


def fit_envelope(table: F64, names: Sequence[str], false_reject_rate: float) -> F64:
    """(F, 4) middle, spread below, spread above and limit of each column of (N, F) left-out numbers.

    Limits put all numbers on one scale: each is where the number's own tail falls to one in a thousand. Then all grow or
    shrink together until the given share of volumes would fail by their worst number, judged by limits of the other folds.
    """
    fold = np.random.default_rng(2).permutation(len(table)) % FOLDS
    worst = np.zeros(len(table))
    for k in range(FOLDS):
        others = _own_limits(table[fold != k], names)
        worst[fold == k] = (deviations(table[fold == k], others, names) / others[:, 3]).max(1)
    envelope = _own_limits(table, names)
    envelope[:, 3] *= tail_quantile(worst, false_reject_rate)
    return envelope


def _own_limits(table: F64, names: Sequence[str]) -> F64:
    middle, low, high = np.median(table, 0), np.quantile(table, 0.1, axis=0), np.quantile(table, 0.9, axis=0)
    floor = np.array([_FLOOR.get(name, _FLOOR.get(name.split(".")[0])) for name in names])
    spread = [np.maximum(floor, side / 1.2816) for side in (middle - low, high - middle)]
    envelope = np.stack([middle, *spread, np.ones_like(middle)], 1)
    distance = deviations(table, envelope, names)
    envelope[:, 3] = np.maximum([tail_quantile(d, 0.001) for d in distance.T], LEAST_LIMIT)
    return envelope


def tail_quantile(scores: F64, rate: float) -> float:
    """The value that a new score exceeds with probability `rate`: an order statistic of many scores.

    Else it is extrapolated: an exponential tail through the quantiles 0.75 and 0.95. Not through the largest scores: a
    cohort may hold a few broken scans, which must not widen the gate for themselves.
    """
    ordered = np.sort(scores)
    rank = math.ceil((len(ordered) + 1) * (1 - rate))
    if rank <= len(ordered) - 5:
        return float(ordered[rank - 1])
    start, end = np.quantile(ordered, [0.75, 0.95])
    return float(end + (end - start) / math.log(5) * math.log(0.05 / rate))


def deviations(table: F64, envelope: F64, names: Sequence[str]) -> F64:
    """(N, F) distances from the middle in spreads of that side; 0 on the side that a check does not mind."""
    side = np.array([_SIDE.get(name.split(".")[0], 0) for name in names])
    away = table - envelope[:, 0]
    return np.maximum(
        np.where(side >= 0, away / envelope[:, 2], 0), np.where(side <= 0, -away / envelope[:, 1], 0)
    ).clip(0)
