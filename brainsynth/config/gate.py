"""Knobs of the quality gate: how it is fitted when a bundle is exported, and what it may refuse during generation."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from brainsynth.records import left_out_at, record


@record
class GateFitConfig:
    """The gate that a bundle carries, fitted on the training split of its cohort."""

    cohort: str
    """The prepared cohort that the bundle was trained on."""
    reference: Literal["reconstructions", "rendered", "scans"] = "reconstructions"
    """What generated volumes must look like: training scans after the bundle's own autoencoder, which is what a perfect
    denoiser would give; the same made again as `decoder: rendered` does, for bundles that are used so; or the scans
    themselves, which are sharper than any decoder."""
    false_reject_rate: float = 0.01
    """Share of good volumes that the gate may refuse."""

    def __post_init__(self) -> None:
        if not 0 < self.false_reject_rate <= 0.2:
            raise ValueError("false_reject_rate must be above 0 and at most 0.2")


@record
class CountedConfig:
    """A volume that is counted on the label map."""

    structures: tuple[str, ...]
    """Names in the label table whose volumes in ml add up to it."""
    slope: float = 1.0
    """With `intercept`: counted ml = intercept + slope · covariate, where two segmentations differ."""
    intercept: float = 0.0

    def __post_init__(self) -> None:
        if not self.structures or not self.slope > 0:
            raise ValueError("counted: give at least one structure, and a slope above 0")


@record
class GateConfig:
    """What becomes of a generated volume that fails the bundle's gate; part of a dataset's identity."""

    max_attempts: int = 3
    """R: a row is drawn from its own seed, then from seeds derived from it; when all R volumes fail it is set aside."""
    exempt: tuple[str, ...] = ()
    """Checks that are scored and recorded but refuse nothing."""
    tolerance: dict[str, float] = field(default_factory=dict)
    """Continuous covariate → largest allowed distance of measured from asked, in the covariate's unit."""
    tolerance_errors: dict[str, float] = field(default_factory=dict)
    """The same in multiples of the ruler's own mean absolute error on people that it was not fitted on."""
    counted: Annotated[dict[str, CountedConfig], left_out_at({})] = field(default_factory=dict)
    """Covariates of `tolerance` that are counted on the label map instead of measured by the gate; needs label maps."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= 100:
            raise ValueError("max_attempts must be from 1 to 100")
        if min([*self.tolerance.values(), *self.tolerance_errors.values(), 1.0]) <= 0:
            raise ValueError("a tolerance must be above 0")
        both = sorted(set(self.tolerance) & set(self.tolerance_errors))
        if both:
            raise ValueError(f"{', '.join(both)}: give tolerance or tolerance_errors, not both")
        free = sorted(set(self.counted) - set(self.tolerance))
        if free:
            raise ValueError(f"counted: {', '.join(free)}: give its tolerance, too")
