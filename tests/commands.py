"""The command line in this process, and what a folder holds: what many tests look at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from brainsynth import cli


def brainsynth(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["brainsynth", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
