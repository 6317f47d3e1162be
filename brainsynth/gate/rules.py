"""The gate at work: what one dataset asks of it, and its verdict on one generated volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from brainsynth.config.gate import GateConfig
from brainsynth.errors import UserError
from brainsynth.gate.gate import CHECKS, WORST, QualityGate
from brainsynth.labels import LabelTable
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


def gate_rules(config: GateConfig, gate: QualityGate, sha256: str, labels: LabelTable | None = None) -> GateRules:
    """The rules of a config, tolerances in units.

    Args:
        labels: the structures of the dataset's label maps, if it has any.

    Raises:
        UserError: an unknown check or structure, a covariate without ruler, a count without label maps.
    """
    gate.exempting(*config.exempt)
    rulers = {ruler.name: ruler for ruler in gate.spec.rulers}
    _check_counted(config, labels)
    unknown = sorted((set(config.tolerance) - set(config.counted) | set(config.tolerance_errors)) - set(rulers))
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
        measures=tuple(dict.fromkeys([*rulers, *config.counted])),
        counted=dict(sorted(config.counted.items())),
    )


def _check_counted(config: GateConfig, labels: LabelTable | None) -> None:
    if config.counted and labels is None:
        raise UserError(
            "gate.counted: volumes are counted on label maps, and this dataset has none: set labels to true"
        )
    known = set() if labels is None else {label.name for label in labels.labels}
    asked = {name for one in config.counted.values() for name in one.structures}
    unknown = sorted(asked - known)
    if unknown:
        raise UserError(
            f"gate.counted: no structure {', '.join(unknown)}: the label maps have {', '.join(sorted(known))}"
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
        ruled = [name for name in self.rules.tolerance if name not in self.rules.counted]
        return self._held(Verdict(True, "", result.score, result.worst, measured), ruled, asked)

    def count(self, verdict: Verdict, volumes_ml: Mapping[str, float], asked: Mapping[str, float]) -> Verdict:
        """The verdict on a volume that passed so far, with what is counted on its label map: structure → ml."""
        counted = {
            name: (sum(volumes_ml[structure] for structure in how.structures) - how.intercept) / how.slope
            for name, how in self.rules.counted.items()
        }
        return self._held(replace(verdict, measured=verdict.measured | counted), list(counted), asked)

    def _held(self, verdict: Verdict, names: Sequence[str], asked: Mapping[str, float]) -> Verdict:
        """The verdict, and whether these covariates are within their tolerance."""
        score, check, reason, measured = verdict.score, verdict.check, "", verdict.measured
        for name in names:
            away = abs(measured[name] - asked[name]) / self.rules.tolerance[name]
            if away > score:  # never for NaN
                score, check = min(away, WORST), f"{ADHERENCE}.{name}"
                reason = (
                    f"{name} is {measured[name]:.4g} where {asked[name]:.4g} was asked (score {score:.2f}, limit 1)"
                )
        passed = score < 1
        return Verdict(passed, "" if passed else reason, score, check, measured)
