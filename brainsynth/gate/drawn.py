"""One row of a dataset while it is being drawn: every attempt, and the record that comes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import Plan

if TYPE_CHECKING:
    from brainsynth.gate.rules import Verdict


class Drawn:
    """One row while it is drawn: its last volume, and what the gate said of every attempt."""

    def __init__(self) -> None:
        self.volume: npt.NDArray[Any] | None = None
        """As it will be stored; None before, and for one that is not finite."""
        self.labels: npt.NDArray[np.uint8] | None = None
        """The label map of that volume as it will be stored, where the dataset has label maps."""
        self.verdicts: list[Verdict] = []

    def add(self, volume: npt.NDArray[Any] | None, verdict: Verdict | None) -> None:
        """One more attempt: its voxels, and the gate's verdict if there is a gate."""
        self.verdicts += [] if verdict is None else [verdict]
        self.volume = None if self.refused else volume

    @property
    def refused(self) -> bool:
        """True when the gate refused the last attempt."""
        return bool(self.verdicts) and not self.verdicts[-1].passed

    def record(self, sample_id: str, row: int, stored: list[npt.NDArray[Any]], plan: Plan) -> SampleRecord:
        """The row's record; `stored` are its arrays, fill values for a row that is set aside.

        With a gate, `extra` says how many attempts were made (the last is the one kept), by which check each of the others
        was refused, the score and the worst check of the last, and the covariates measured on it.
        """
        if not self.verdicts:
            return describe_sample(sample_id, row, stored, plan=plan)
        last, tries = self.verdicts[-1], len(self.verdicts)
        extra: dict[str, str | int | float] = {
            "gate_attempts": tries,
            "gate_score": last.score,
            "gate_check": last.check,
        }
        extra["gate_refused"] = " ".join(v.check for v in self.verdicts if not v.passed)
        extra |= {f"measured_{name}": value for name, value in last.measured.items()}
        if last.passed:
            return describe_sample(sample_id, row, stored, extra, plan)
        reason = f"quality gate, {tries} attempt{'s' if tries > 1 else ''}, the last: {last.reason}"
        return SampleRecord(sample_id=sample_id, row=row, status="rejected", reason=reason, extra=extra)
