"""Lines that say how far long work is."""

from __future__ import annotations

import logging
import sys


def configure_logging() -> None:
    """Our own lines on standard output, with the time; other libraries' only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("brainsynth").setLevel(logging.INFO)


def in_minutes(seconds: float) -> str:
    """Seconds as every progress line shows them: 4m05s."""
    return f"{seconds // 60:.0f}m{int(seconds % 60):02d}s"
