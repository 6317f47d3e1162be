"""Which NVIDIA driver is here, and which one torch needs. Imports no torch, so that a plan need not wait for it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_NEEDED = {"11": "450", "12": "525", "13": "580"}
"""First driver branch for each major version of CUDA (CUDA release notes, "minor version compatibility")."""
_LOADED = Path("/proc/driver/nvidia/version")


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, None without one."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        words = asked.stdout.split() if asked.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        words = []
    if words:
        return words[0]
    try:
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _LOADED.read_text())
    except OSError:
        return None
    return found[1] if found else None


def needed_driver(cuda: str) -> str:
    """The first driver that can run a version of CUDA, in words."""
    branch = _NEEDED.get(cuda.split(".")[0])
    return f"an NVIDIA driver {branch} or newer" if branch else "a recent NVIDIA driver"
