"""Rounding of the numbers that benchmarks write."""

from __future__ import annotations

from typing import Any


def rounded(value: Any) -> Any:
    """Every float within, rounded to four digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
