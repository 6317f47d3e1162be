"""Are volumes of one person under other covariates sound? Composition, reversibility, effectiveness, minimality, realism.

With x the scan, c its covariates, f(x, c → c') the counterfactual, and d the mean absolute difference over the voxels of the
scan's brain (docs/scan-in.md has the formulas and where they come from).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.gate.gate import QualityGate
from brainsynth.models.counterfactual import ScanGenerator

Images = npt.NDArray[np.float32]
BRAIN = 0.05
"""Intensity above which a voxel of the scan is brain."""
TEXTURE = ("noise", "sharpness", "checkerboard", "stripes", "slices")
"""Checks of a gate that judge the scanner rather than the brain: a real scan need not look like the cohort's."""


def difference(image: Images, other: Images, scan: Images) -> float:
    """Mean absolute difference over the voxels of the scan's brain."""
    return float(np.abs(image - other)[scan > BRAIN].mean())


def composition(generator: ScanGenerator) -> float:
    """d(x, f(x, c → c)) without the residual: with it, it is 0 by construction."""
    return difference(generator.scan, generator.person.reconstruction, generator.scan)


def reversibility(generator: ScanGenerator, volume: Images, row: pd.DataFrame) -> float:
    """d(x, f(f(x, c → c'), c' → c)): there and back, residuals added both times."""
    back = generator.predict(generator.abduct(volume, row), generator.own)[0]
    return difference(generator.scan, back, generator.scan)


def point(gate: QualityGate | None, scan: Images, own: dict[str, float], volume: Images) -> dict[str, Any]:
    """Of one counterfactual: its difference from the scan and, with a gate, measured covariates and the gate's score.

    `own`: what the gate measures on the scan.
    """
    found: dict[str, Any] = {"difference_from_scan": difference(volume, scan, scan)}
    if gate is None:
        return found
    for name, value in gate.measure_covariates(volume).items():
        found |= {f"measured_{name}": value, f"measured_change_{name}": value - own[name]}
    judged = gate.exempting(*TEXTURE).check(volume)
    return {**found, "gate_score": judged.score, "gate_passed": judged.passed}
