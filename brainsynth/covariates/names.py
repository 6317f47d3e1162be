"""Names that a covariate may not bear: those of our own columns, of a sample's keys, and of the options of a row.

A new cohort is refused any of them when its config is read. What was stored before keeps opening; a generation is refused
only where the name would be written twice into one table, or hide a value of ours (`CLASHES`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_OF_ROWS = {"sample_id", "participant_id", "row", "shard", "status", "reason", "extra", "voxel_sha256"}
_OF_VOXELS = {"minimum", "maximum", "mean", "std", "p01", "p99", "zero_fraction"}
_OF_PLANS = {"seed", "noise_seed", "extrapolated", "split", "subject", "image", "mask", "excluded"}
_OF_LATENTS = {"cohort_row", "mirrored", "source_row"}
_OF_SAMPLES = {"affine", "start", "t1w", "x", "y", "z"}
CLASHES = frozenset(_OF_ROWS | _OF_VOXELS | _OF_PLANS | _OF_LATENTS | _OF_SAMPLES)
"""Columns of the tables of a dataset, keys of a sample, coordinates of an array."""
_WORDS = {"session", "labels", "label", "index", "line", "path", "shape", "spacing", "units", "synthetic", "covariates"}
RESERVED = CLASHES | _WORDS | {"sigma", "subject_id", "session_id"}
PREFIXES = ("gate_", "label_volume_", "measured_")


def reserved(names: Sequence[str]) -> list[str]:
    """Those of the names that a covariate of a new cohort may not bear."""
    return [name for name in names if name in RESERVED or name.startswith(PREFIXES)]


def clashing(names: Sequence[str]) -> list[str]:
    """Those of the names under which a dataset would hold two different things."""
    return [name for name in names if name in CLASHES or name.startswith(PREFIXES)]


def folded(names: Sequence[str]) -> list[str]:
    """Those of the names that are another spelling of letters that look alike: a condition could not say them."""
    return [name for name in names if unicodedata.normalize("NFKC", name) != name]


def refusal(taken: Sequence[str]) -> str:
    """Why names are refused, all that are, and the way out."""
    return (
        f"covariates: {', '.join(taken)} is the name of our own column or key; call the covariate otherwise, and name its "
        f"column in source.columns (as in `columns: {{my_{taken[0]}: {taken[0]}}}`). Not to be used: "
        f"{', '.join(sorted(RESERVED))}, and what begins with {', '.join(PREFIXES[:-1])} or "
        f"{PREFIXES[-1]}"
    )
