"""The CPUs that this process may use: what was reserved for it, its affinity, its container's quota. Imports no torch.

`os.cpu_count()` is the host's, whatever a container, a job scheduler or Ray gave to this process.
"""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
_reserved = 0.0


def reserve(cpus: float) -> None:
    """Note how many CPUs a scheduler keeps for this process."""
    global _reserved
    _reserved = cpus


def usable_cpus() -> int:
    """Those that this process may use, other processes aside: at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, _quota())))


def threads_of_worker(workers: int) -> int:
    """How many threads one of `workers` should compute with: what is reserved for it, else an even share."""
    return max(1, int(min(_reserved, usable_cpus())) if _reserved else usable_cpus() // max(1, workers))


def _quota() -> float:
    try:
        quota, period = _QUOTA_V2.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text().strip() for path in _QUOTA_V1)
        except OSError:
            return float("inf")
    return float("inf") if quota in ("max", "-1") else float(quota) / float(period)
