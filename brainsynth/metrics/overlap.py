"""Overlap of two label maps: the Dice coefficient of each structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def dice(first: npt.NDArray[Any], second: npt.NDArray[Any], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """(K,) Dice coefficient 2 |A ∩ B| / (|A| + |B|) of each label of `indices`; NaN where neither map has it.

    Args:
        first: label map, any shape, integers 0 to 255.
        second: another, of the same shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"label maps of shapes {first.shape} and {second.shape} cannot be compared")
    a, b = first.reshape(-1), second.reshape(-1)
    sizes = np.bincount(a, minlength=256) + np.bincount(b, minlength=256)
    both = np.bincount(a[a == b], minlength=256)
    chosen = list(indices)
    with np.errstate(invalid="ignore"):
        return np.asarray(2.0 * both[chosen] / sizes[chosen], np.float64)
