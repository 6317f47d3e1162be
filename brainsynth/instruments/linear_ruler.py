"""Reads a covariate from the features of an image with weights that were fitted before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Kind = Literal["continuous", "binary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRuler:
    """What measuring needs of a ruler; `instruments/covariate_ruler.py` fits one and knows its error."""

    kind: Kind
    mean: F32
    """(F,) mean features of the fitting set."""
    weights: F32
    """(F,) covariate (binary: score) per feature."""
    intercept: float
    calibration: tuple[float, float]
    """(offset, slope). Continuous: out-of-fold prediction = offset + slope * true. Binary: log odds of a score."""

    def predict(self, features: npt.NDArray[np.floating[Any]], *, corrected: bool = False) -> F64:
        """(N,) values in the covariate's unit, or probabilities of the second category, of (N, F) features.

        Args:
            corrected: continuous only: undo the shrinkage towards the mean, (prediction - offset) / slope, with the line
                that out-of-fold predictions of the fitting set follow (Cole et al. 2018). It needs no true value.

        Raises:
            UserError: another number of features than the ruler was fitted on, or values that are not finite.
        """
        x = np.asarray(features)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise UserError(
                f"features of shape {x.shape} do not fit a ruler of {len(self.mean)} features: use one grid throughout"
            )
        if not np.isfinite(x).all():
            raise UserError("some features are not finite; leave out images that cannot be measured")
        raw = (x - self.mean).astype(np.float64) @ self.weights.astype(np.float64) + self.intercept
        return calibrated(raw, self.kind, self.calibration, corrected)


def calibrated(raw: F64, kind: Kind, line: tuple[float, float], corrected: bool) -> F64:
    """Raw predictions after a ruler's calibration line; see `LinearRuler.predict`."""
    offset, slope = line
    if kind == "binary":
        odds: F64 = 1 / (1 + np.exp(-np.clip(offset + slope * raw, -math.log(1e9), math.log(1e9))))
        return odds
    return (raw - offset) / slope if corrected else raw
