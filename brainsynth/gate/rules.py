"""The gate at work: what one dataset asks of it, and its verdict on one generated volume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from brainsynth.config.gate import GateConfig
from brainsynth.errors import UserError
from brainsynth.gate.gate import CHECKS, WORST, QualityGate
from brainsynth.plan import GateRules

ADHERENCE = "adherence"


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one volume; `score` is the largest of all that count, 1 is the limit."""

    passed: bool
    reason: str
    score: float
    check: str
    measured: dict[str, float]
    """Covariate → value in its unit, read off the volume; empty when the checks refuse it."""


def gate_rules(config: GateConfig, gate: QualityGate, sha256: str) -> GateRules:
    """The rules of a config, tolerances in units. Raises UserError for an unknown check or a covariate without ruler."""
    gate.exempting(*config.exempt)
    rulers = {ruler.name: ruler for ruler in gate.spec.rulers}
    unknown = sorted((set(config.tolerance) | set(config.tolerance_errors)) - set(rulers))
    if unknown:
        raise UserError(
            f"gate: no tolerance can be held for {', '.join(unknown)}: the bundle's gate measures "
            f"{', '.join(rulers) or 'no covariate'}"
        )
    tolerance = config.tolerance | {name: k * rulers[name].mae for name, k in config.tolerance_errors.items()}
    return GateRules(
        sha256=sha256,
        max_attempts=config.max_attempts,
        exempt=tuple(sorted(config.exempt)),
        tolerance=dict(sorted(tolerance.items())),
        measures=tuple(rulers),
    )


class Gatekeeper:
    """Judges the volumes of one dataset."""

    def __init__(self, gate: QualityGate, rules: GateRules) -> None:
        self.gate, self.rules = gate.exempting(*rules.exempt), rules

    def judge(self, volume: npt.NDArray[np.float32], asked: Mapping[str, float]) -> Verdict:
        """(X, Y, Z) intensities in [0, 1] as a reader of the dataset gets them; `asked` values may be NaN (unknown)."""
        result = self.gate.check(volume)
        if not result.passed:
            return Verdict(False, result.reason, result.score, result.worst, {})
        try:
            measured = self.gate.measure_covariates(volume)
        except UserError:
            return Verdict(False, f"{CHECKS['empty']}: no tissue to measure", WORST, "empty", {})
        score, check, reason = result.score, result.worst, ""
        for name, tolerance in self.rules.tolerance.items():
            away = abs(measured[name] - asked[name]) / tolerance
            if away > score:  # never for NaN
                score, check = min(away, WORST), f"{ADHERENCE}.{name}"
                reason = (
                    f"{name} is {measured[name]:.4g} where {asked[name]:.4g} was asked (score {score:.2f}, limit 1)"
                )
        passed = score < 1
        return Verdict(passed, "" if passed else reason, score, check, measured)
