"""Full size with --chaos (`make chaos`), a few tries of everything without it (`make test`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.ledger import Ledger


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """Where a test notes what it found; a full run writes the table."""
    return Ledger(keep=request.config.getoption("--chaos"))


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`size(short, full)`: how many tries in this run."""
    full_run = bool(request.config.getoption("--chaos"))
    return lambda short, full: full if full_run else short
