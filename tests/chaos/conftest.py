"""Full size with --chaos (`make chaos`), a few tries of everything without it (`make test`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.chaos.ledger import Ledger


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Where a test notes what it found; the table is written at the end of a full run."""
    book = Ledger(keep=request.config.getoption("--chaos"))
    yield book
    book.write()


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`size(short, full)`: how many tries in this run."""
    full_run = bool(request.config.getoption("--chaos"))
    return lambda short, full: full if full_run else short
