"""Fréchet and kernel distance, precision, recall, density and coverage of a measured dataset, and the real floor.

The yardstick of each is the same figure between real people and real people at the same n: as many validation scans as
generated volumes, against as many training scans. All but the kernel distance depend on n.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from brainsynth.errors import UserError
from brainsynth.evaluation.measured_sample import MeasuredSample
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.metrics.frechet import frechet_distance, frechet_of_rows, squared_mmd
from brainsynth.metrics.intervals import bootstrap_interval, jackknife_interval
from brainsynth.metrics.manifold import manifold_membership

F32 = npt.NDArray[np.float32]
PAIRWISE = 2000
"""Rows a set at most where all pairs of rows are looked at."""
NEIGHBOURS = 5
_FRECHET = "Fréchet distance to training scans"


def feature_distances(
    made: MeasuredSample, held: MeasuredSample, train: MeasuredSample, by: str | None = None
) -> tuple[list[Finding], list[str]]:
    """Verdicts, and remarks on what is not judged; nothing of either without features.

    With `by`, a covariate with categories, the Fréchet distance is taken within each of them, too.

    Intervals of the distances are the jackknife's; those of precision, recall and coverage are Wilson's and that of
    density the bootstrap's, over the rows that are counted, with the manifolds as they are.
    """
    if made.stats is None or train.stats is None:
        return [], ["No feature network was asked for: no Fréchet or kernel distance, precision or recall."]
    n = min(len(made), len(held), len(train))
    sets = [sample.arrays["features"][:n] for sample in (made, held, train)]
    few = [rows[:PAIRWISE] for rows in sets]
    within, remarks = _within(made, held, train, by) if by else ([], [])
    out = [
        _distance(_FRECHET, frechet_of_rows, sets),
        *within,
        _distance("kernel distance (KID) to training scans", squared_mmd, few),
        *_manifolds(few),
    ]
    remarks.append(
        f"Fréchet distance of all {made.count} generated volumes from all {train.count} training scans: "
        f"{frechet_distance(made.stats, train.stats):.4g} (not judged: it falls with n, and there are fewer real scans; the "
        "kernel distance has no bias at any n)."
    )
    return out, remarks


def _within(
    made: MeasuredSample, held: MeasuredSample, train: MeasuredSample, by: str
) -> tuple[list[Finding], list[str]]:
    """The Fréchet distance of each category that has enough rows in all three, and remarks on the others."""
    out, remarks = [], []
    for category in sorted(train.table[by].dropna().unique()):
        sets = [sample.arrays["features"][(sample.table[by] == category).to_numpy()] for sample in (made, held, train)]
        n = min(map(len, sets))
        if n >= LEAST:
            out.append(_distance(f"{_FRECHET} ({by} {category})", frechet_of_rows, [rows[:n] for rows in sets]))
        else:
            remarks.append(
                f"Fréchet distance ({by} {category}): not judged, as one of the sets has only {n} volumes of it."
            )
    return out, remarks


def _distance(name: str, statistic: Callable[..., float], sets: list[F32]) -> Finding:
    """A distance of made and of held (the floor) from train."""
    least = 0.0 if statistic is frechet_of_rows else -math.inf  # an estimate without bias may be negative
    mine, floor = (jackknife_interval(statistic, [rows, sets[2]], least=least) for rows in sets[:2])
    return finding(name, "", mine.figure, len(sets[0]), floor.figure, len(sets[1]), "lower")


def _manifolds(sets: list[F32]) -> list[Finding]:
    """Precision, recall, density and coverage with k = 5."""
    if min(map(len, sets)) < max(LEAST, NEIGHBOURS + 1):
        raise UserError(f"precision and recall need more than {NEIGHBOURS} rows in each set")
    memberships = [manifold_membership(sets[2], rows, k=NEIGHBOURS) for rows in sets[:2]]
    shares = {
        "precision": [m.generated_realistic for m in memberships],
        "recall": [m.reference_reached for m in memberships],
        "coverage": [m.reference_covered for m in memberships],
    }
    n = [len(rows) for rows in sets[:2]]
    out = []
    for name, flags in shares.items():
        mine, floor = (_share(values) for values in flags)
        out.append(finding(f"{name} (k = {NEIGHBOURS})", "", mine, n[0], floor, n[1], "higher"))
    balls = [bootstrap_interval(np.mean, [m.real_balls / m.k], method="percentile") for m in memberships]
    density = finding(f"density (k = {NEIGHBOURS})", "", balls[0].figure, n[0], balls[1].figure, n[1], "equal")
    return [*out, density]


def _share(flags: npt.NDArray[np.bool_]) -> list[float]:
    """A share with Wilson's interval, which has a width also at 0 and 1."""
    ends = binomtest(int(flags.sum()), len(flags)).proportion_ci(method="wilson")
    return [float(flags.mean()), float(ends.low), float(ends.high)]
