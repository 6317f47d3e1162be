"""Fixed splits of a generated dataset: who is in `train`, `validation` or `test` follows from the subject's id alone."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")
VALIDATION_FRACTION = TEST_FRACTION = 0.1


def fixed_split(sample_id: str) -> str:
    """`train` (80 %), `validation` (10 %) or `test` (10 %) by a hash of the id: the same everywhere, always.

    Adding, removing or choosing subjects moves nobody; shares are kept on average, not exactly.
    """
    place = hashed_place(f"brainsynth-split-v1\0{sample_id}")
    if place < TEST_FRACTION:
        return "test"
    return "validation" if place < TEST_FRACTION + VALIDATION_FRACTION else "train"


def hashed_place(text: str) -> float:
    """A number in [0, 1) that follows from the text alone, spread evenly over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
