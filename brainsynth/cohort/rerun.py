"""The same command again: scans that were missing and are there now are read, scans that changed on disk are named.

And when all is read: scans that are copies of each other.

A file is read only where its size or time is another one than the record has; its digest decides.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import pandas as pd

from brainsynth.cohort.scan import MISSING_LABELS
from brainsynth.errors import UserError
from brainsynth.manifest import SampleRecord
from brainsynth.plan import Plan
from brainsynth.storage.commit import committed_of, read_commit, read_plan, read_samples
from brainsynth.storage.filesystem import Store
from brainsynth.storage.whole_file import file_sha256

CLOCK_S = 60.0
"""Clocks of the machines that wrote the file and the record may differ by this much."""
_WAS_MISSING = {"missing file": "source", "missing mask file": "mask", MISSING_LABELS: "labels"}
"""Start of a reason → which file was missing."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a cohort to be looked at again."""

    refused: tuple[int, ...]
    """Rejected, and their file is there now, or is another one."""
    changed: tuple[int, ...]
    """Good, and their file, its mask or its label map, is not the one that was read."""


def rows_to_read_again(store: Store, plan: Plan, samples: pd.DataFrame, late: dict[int, dict[str, str]]) -> Rows:
    """What changed on disk since the shards were committed. `late`: files of rows that had none when they were planned."""
    refused, changed = [], []
    for shard in sorted(committed_of(store, plan)):
        record = read_commit(store, plan, shard)
        since = float(record.runtime.get("began_at", 0.0)) - CLOCK_S
        for sample in record.samples:
            row = samples.iloc[sample.row]
            named = {"labels": "", **row, **late.get(sample.row, {})}
            files = {"source": named["image"], "mask": named["mask"], "labels": named["labels"]}
            if sample.status == "rejected" and not row["excluded"] and _may_be_good_now(sample, files, since):
                refused.append(sample.row)
            elif sample.status == "ok" and any(_is_another(sample, which, file) for which, file in files.items()):
                changed.append(sample.row)
    return Rows(tuple(refused), tuple(changed))


def _may_be_good_now(sample: SampleRecord, files: dict[str, str], since: float) -> bool:
    there = [file for file in files.values() if file and Path(file).is_file()]
    for reason, which in _WAS_MISSING.items():
        if sample.reason.startswith(reason):
            return files[which] in there and not _is_pointer(files[which])
    return any(_touched(file, since) for file in there)


def _is_pointer(file: str) -> bool:
    """True for a small text that stands for content which is elsewhere (git-annex, Git LFS)."""
    with open(file, "rb") as handle:
        head = handle.read(256)
    return b"/annex/objects/" in head or head.startswith(b"version https://git-lfs")


def _touched(file: str, since: float) -> bool:
    status = Path(file).stat()
    return max(status.st_mtime, status.st_ctime) >= since


def _is_another(sample: SampleRecord, which: str, file: str) -> bool:
    """True when the file is there and is not the one that was read."""
    known = sample.extra
    if f"{which}_sha256" not in known or not file or not Path(file).is_file():
        return False
    status = Path(file).stat()
    if (known.get(f"{which}_bytes"), known.get(f"{which}_mtime")) == (status.st_size, round(status.st_mtime, 6)):
        return False
    return file_sha256(Path(file)) != known[f"{which}_sha256"]


def changed_rows(store: Store, samples: pd.DataFrame) -> str:
    """What a cohort's table says now that it did not say when the cohort was planned, for an error; empty if unknown."""
    try:
        before = read_samples(store, read_plan(store))
    except UserError:  # the folder is not a cohort, or is damaged, which the error that this is for says
        return ""
    if list(before.columns) != list(samples.columns):
        return ""
    rows = min(len(before), len(samples))
    old, new = before.iloc[:rows].astype(object), samples.iloc[:rows].astype(object)
    differs = (old != new) & ~(old.isna() & new.isna())
    shown = [
        f"\n  {new['sample_id'][row]}: {name} was {old[name][row]!r}, is {new[name][row]!r}"
        for row in differs.index[differs.any(axis=1)][:5]
        for name in differs.columns[differs.loc[row]]
    ]
    return (
        "".join(["\nThe table is another one (a corrected table makes another cohort):", *shown[:10]]) if shown else ""
    )


def copies(store: Store, plan: Plan, samples: pd.DataFrame) -> list[str]:
    """`a = b` of scans whose files are the same, byte for byte: one of them has another scan's covariates."""
    same: dict[str, list[int]] = defaultdict(list)
    for shard in sorted(committed_of(store, plan)):
        for sample in read_commit(store, plan, shard).samples:
            if sample.status == "ok" and "source_sha256" in sample.extra:
                same[str(sample.extra["source_sha256"])].append(sample.row)
    return [" = ".join(samples["sample_id"].iloc[rows]) for rows in same.values() if len(rows) > 1]
