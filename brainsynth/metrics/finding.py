"""One line of an evaluation's verdict table: a figure of the dataset and the same figure of real scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from brainsynth.records import record

LEAST = 8
"""Values below which nothing is judged."""


@record
class Finding:
    """One line of the verdict table."""

    metric: str
    unit: str
    value: float
    low: float
    """With `high`, the 95 % confidence interval."""
    high: float
    n: int
    real: float
    """The same figure of real scans that no ruler was fitted on."""
    real_low: float
    real_high: float
    real_n: int
    better: Literal["higher", "lower", "equal"]
    """Which side of the real scans' interval is not a fault."""

    @property
    def as_real(self) -> bool:
        """True when the interval meets that of real scans, or is on the better side of it."""
        too_low, too_high = self.high < self.real_low, self.low > self.real_high
        return not {"higher": too_low, "lower": too_high, "equal": too_low or too_high}[self.better]


def finding(
    metric: str,
    unit: str,
    mine: Sequence[float],
    n: int,
    theirs: Sequence[float],
    real_n: int,
    better: Literal["higher", "lower", "equal"],
) -> Finding:
    """A line of `mine` and `theirs`, each a value with the ends of its interval."""
    return Finding(
        metric=metric, unit=unit, value=mine[0], low=mine[1], high=mine[2], n=n,
        real=theirs[0], real_low=theirs[1], real_high=theirs[2], real_n=real_n, better=better,
    )  # fmt: skip
