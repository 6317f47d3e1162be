"""The quality gate: does a volume look like a scan of the training cohort, or is it broken, and if so how?

A gate is an envelope: for each of some fifty numbers (features.py) its usual range in the cohort. How far from the
middle a number may lie is learnt from scans left out of what they are compared with, so that it holds for scans that
the gate never saw. A check is a group of numbers; its score is the largest distance relative to the number's limit, so
that scores compare across checks and volumes: below 1 is usual, from 1 on the volume is rejected.

What a gate keeps of its cohort: medians, spreads and limits; the mean and at most 8 principal components of block
means of 8 mm; the mean difference of left and right. No subject's image or number is among them, nor can one be rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.gate.envelope import FOLDS, deviations, fit_envelope
from brainsynth.gate.features import Measured, measure
from brainsynth.gate.maps import CoarseMaps
from brainsynth.gate.passes import F64
from brainsynth.instruments.linear_ruler import LinearRuler
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.records import record
from brainsynth.volume import VolumeSpec

MIN_COHORT, RESERVOIR = 30, 2000
RANGE_TOLERANCE, WORST = 0.01, 99.0
FLIP_ACCURACY = 0.98
"""The left-right check is used only if it distinguishes at least this share of left-out scans from their mirror
images."""

CHECKS = {
    "finite": "voxels that are not finite",
    "range": "intensities outside [0, 1]",
    "empty": "hardly anything in the volume",
    "foreground": "unusual amount of brain",
    "cut": "brain cut off at the edge",
    "background": "signal where there should be none",
    "pieces": "brain in more than one piece",
    "shape": "not the shape of a brain of this cohort",
    "hole": "a hole: a place too dark for any brain of this cohort",
    "lump": "a place too bright for any brain of this cohort",
    "flip": "left and right exchanged",
    "checkerboard": "checkerboard pattern",
    "stripes": "periodic stripes",
    "sharpness": "too smooth or too sharp",
    "noise": "unusual noise",
    "slices": "jump from one slice to the next",
    "contrast": "unusual contrast of tissues",
    "bias": "uneven brightness",
}
"""Name of each check → what it says when a volume fails it."""


@record
class RulerSpec:
    """A ruler stored with a gate, except for its two arrays; one continuous covariate."""

    name: str
    unit: str
    intercept: float
    calibration: tuple[float, float]
    n: int
    """People on whom its error was found, none of whom it was fitted on (cross-validation)."""
    mae: float
    """Its own mean absolute error, in the unit."""
    r: float
    """Correlation of measured and true."""


@record
class GateSpec:
    """What a gate is, except for its arrays."""

    volume: VolumeSpec
    names: tuple[str, ...]
    """The numbers of the envelope, `check.number`, in the order of the arrays."""
    n: int
    """Volumes it was fitted on."""
    false_reject_rate: float
    """Share of good volumes that it was set to reject at most."""
    flip_accuracy: float
    """Share of left-out volumes that the left-right check distinguished from their mirror images."""
    exempt: tuple[str, ...] = ()
    """Checks that are measured and reported, but reject nothing."""
    rulers: tuple[RulerSpec, ...] = ()
    """Covariates that can be read off a volume."""


@record
class GateResult:
    """What the gate says about one volume."""

    passed: bool
    reason: str
    """The worst check in words, "" when the volume passed."""
    score: float
    """The largest score of all checks that count; 1 is the limit."""
    worst: str
    """The check that has it."""
    values: dict[str, float]
    """Check → score, exempt checks included."""


@dataclass(frozen=True, slots=True)
class QualityGate:
    """The envelope of a cohort. Made by `fit` or `load_gate`."""

    spec: GateSpec
    envelope: F64
    """(F, 4) middle, spread below, spread above, limit (in spreads) of each number."""
    maps: CoarseMaps
    rulers: tuple[LinearRuler, ...] = ()
    """In the order of `spec.rulers`."""

    @staticmethod
    def fit(
        volumes: Iterable[npt.NDArray[np.floating[Any]]],
        volume: VolumeSpec,
        false_reject_rate: float = 0.01,
        exempt: Sequence[str] = (),
    ) -> QualityGate:
        """Learn the envelope of (X, Y, Z) volumes in [0, 1], one session a subject; memory does not grow with their number.

        From the 2001st volume on, a random 2000 are kept. Volumes that are empty or not finite are left out.

        Raises:
            UserError: fewer than 30 usable volumes, another grid, a rate outside (0, 0.2], an unknown check.
        """
        if not 0 < false_reject_rate <= 0.2:
            raise UserError(f"false_reject_rate is {false_reject_rate:g}; it must be above 0 and at most 0.2")
        _check_exempt(exempt)
        return QualityGate.fit_measured(*_sample(volumes, volume), volume, false_reject_rate, exempt)

    @staticmethod
    def fit_measured(
        sample: list[Measured], seen: int, volume: VolumeSpec, false_reject_rate: float, exempt: Sequence[str] = ()
    ) -> QualityGate:
        """As `fit`, from volumes that were measured before."""
        if len(sample) < MIN_COHORT:
            raise UserError(
                f"a quality gate needs at least {MIN_COHORT} usable volumes to learn from, not {len(sample)}"
            )
        held_out, mirrored = _left_out(sample)
        names = tuple(held_out[0])
        table = np.array([[line[name] for name in names] for line in held_out])
        envelope = fit_envelope(table, names, false_reject_rate)
        spec = GateSpec(
            volume=volume,
            names=names,
            n=seen,
            false_reject_rate=false_reject_rate,
            flip_accuracy=float(np.mean([line["flip.side"] > m for line, m in zip(held_out, mirrored, strict=True)])),
            exempt=tuple(exempt),
        )
        return QualityGate(spec, envelope, CoarseMaps.fit(sample))

    def exempting(self, *checks: str) -> QualityGate:
        """The same gate with these checks, and no others, only reported. Raises UserError for an unknown name."""
        _check_exempt(checks)
        return replace(self, spec=replace(self.spec, exempt=checks))

    def with_rulers(self, specs: Sequence[RulerSpec], rulers: Sequence[LinearRuler]) -> QualityGate:
        """The same gate, able to measure covariates."""
        return replace(self, spec=replace(self.spec, rulers=tuple(specs)), rulers=tuple(rulers))

    def measure_covariates(self, volume: npt.NDArray[np.floating[Any]]) -> dict[str, float]:
        """Covariate → value in its unit, shrinkage corrected, as read off one volume. Raises UserError for a blank."""
        if not self.rulers:
            return {}
        x = tissue_features(volume, self.spec.volume)[None]
        pairs = zip(self.spec.rulers, self.rulers, strict=True)
        return {spec.name: float(ruler.predict(x, corrected=True)[0]) for spec, ruler in pairs}

    def check(self, volume: npt.NDArray[np.floating[Any]]) -> GateResult:
        """Judge one (X, Y, Z) volume on the gate's grid. Raises UserError for another shape."""
        if volume.shape != self.spec.volume.shape_xyz:
            raise UserError(f"this gate is for volumes of {self.spec.volume.shape_xyz} voxels, not {volume.shape}")
        hard = _hard_faults(volume)
        with np.errstate(divide="ignore"):
            measured = None if hard else measure(volume.astype(np.float32, copy=False), self.spec.volume.spacing_mm)
        if measured is None:
            name = hard or "empty"
            return GateResult(passed=False, reason=CHECKS[name], score=WORST, worst=name, values={name: WORST})
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # a constant volume has no correlation: NaN counts as worst
            return self.judge(measured)

    def judge(self, measured: Measured) -> GateResult:
        """Judge a volume that was measured before."""
        numbers = measured.numbers | self.maps.numbers(measured)
        ratios = deviations(np.array([[numbers[n] for n in self.spec.names]]), self.envelope, self.spec.names)[0]
        values: dict[str, float] = {}
        scores = np.nan_to_num(ratios / self.envelope[:, 3], nan=WORST, posinf=WORST).clip(0, WORST)
        for name, score in zip(self.spec.names, scores, strict=True):
            check = name.split(".")[0]
            values[check] = max(values.get(check, 0.0), float(score))
        silent = set(self.spec.exempt) | ({"flip"} if self.spec.flip_accuracy < FLIP_ACCURACY else set())
        counted = {check: score for check, score in values.items() if check not in silent} or {"": 0.0}
        worst = max(counted, key=lambda check: counted[check])
        passed = counted[worst] < 1
        reason = "" if passed else f"{CHECKS[worst]} (score {counted[worst]:.2f}, limit 1)"
        return GateResult(passed=passed, reason=reason, score=counted[worst], worst=worst, values=values)


def _check_exempt(exempt: Sequence[str]) -> None:
    free = [name for name in CHECKS if name not in ("finite", "range", "empty")]
    unknown = [name for name in exempt if name not in free]
    if unknown:
        raise UserError(f"no checks that could be left out: {', '.join(unknown)}; there are {', '.join(free)}")


def _hard_faults(volume: npt.NDArray[Any]) -> str:
    """The check that fails whatever the cohort looks like, or ""."""
    low, high = float(volume.min()), float(volume.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "finite"
    return "range" if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE else ""


def _sample(volumes: Iterable[npt.NDArray[Any]], volume: VolumeSpec) -> tuple[list[Measured], int]:
    """A uniform random sample of at most RESERVOIR measured volumes (reservoir sampling), and how many were usable."""
    rng, kept, seen = np.random.default_rng(0), list[Measured](), 0
    for x in volumes:
        if x.shape != volume.shape_xyz:
            raise UserError(f"a volume to learn from has {x.shape} voxels, the grid {volume.shape_xyz}")
        measured = None if _hard_faults(x) else measure(x.astype(np.float32, copy=False), volume.spacing_mm)
        if measured is None:
            continue
        seen += 1
        slot = len(kept) if len(kept) < RESERVOIR else int(rng.integers(seen))
        if slot == len(kept):
            kept.append(measured)
        elif slot < RESERVOIR:
            kept[slot] = measured
    return kept, seen


def _left_out(sample: list[Measured]) -> tuple[list[dict[str, float]], list[float]]:
    """Each volume's numbers by maps fitted without it and its fold, and its left-right number when mirrored."""
    fold = np.random.default_rng(1).permutation(len(sample)) % FOLDS
    lines, mirrored = [dict[str, float]()] * len(sample), [0.0] * len(sample)
    for k in range(FOLDS):
        rest = [m for m, f in zip(sample, fold, strict=True) if f != k]
        maps = CoarseMaps.fit(rest)
        for i in np.flatnonzero(fold == k):
            lines[i] = sample[i].numbers | maps.numbers(sample[i])
            mirrored[i] = -lines[i]["flip.side"]  # the mirror image has the negative map
    return lines, mirrored
